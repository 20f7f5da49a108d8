"""What a gradient holds: bytes that the forward pass keeps, bytes at the peak, segments, and what does not fit."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import TOLERANCE, assert_close, equations

import parscan
from parscan import machines, memory, planning, timing
from parscan.methods import Lax
from parscan.planning import plan_for

LENGTH = 128
SEGMENTS = {
    "sequential": parscan.Sequential(segment=16),
    "walk": parscan.Walk(4),
    "chunked": parscan.Chunked(4, segment=16),
    "tree": parscan.Tree(segment=4),
}


def rnn(w, h, x):
    return jnp.tanh(h @ w[0] + x)


def gru(w, h, x):
    z, r = jax.nn.sigmoid(x + h @ w[0]), jax.nn.sigmoid(x - h @ w[1])
    return z * h + (1 - z) * jnp.tanh(x + (r * h) @ w[2])


def linear(w, h, x):
    """The loop's own backward pass keeps but the state and the input."""
    return h @ w[0] + x


def pairs(w, h, x):
    a, b = h[..., ::2], h[..., 1::2]
    turned = jnp.stack([jnp.cos(x[..., ::2]) * a - jnp.sin(x[..., ::2]) * b, jnp.sin(x[..., 1::2]) * a + jnp.cos(x[..., 1::2]) * b], -1)
    return jnp.tanh(turned.reshape(h.shape) + x @ w[0])


CELLS = {"rnn": rnn, "gru": gru, "linear": linear, "pairs": pairs}


def problem(cell, batch, width, length=LENGTH):
    """(scan -> loss of weights and first state, whose every hidden state is read), and these."""
    keys = jax.random.split(jax.random.key(0), 4)
    weights = [0.5 * jax.random.normal(k, (width, width), jnp.float32) for k in keys[:3]]
    xs, start = jax.random.normal(keys[3], (length, batch, width), jnp.float32), jnp.zeros((batch, width), jnp.float32)

    def loss(scan):
        def through(w, h):
            final, states = scan(lambda h, x: 2 * (CELLS[cell](w, h, x),), h, xs)
            return jnp.mean(states**2) + final.sum()

        return through

    return loss, (weights, start)


def by(method):
    return lax.scan if method is None else functools.partial(parscan.scan, method=method)


@functools.cache
def kept(cell, method):
    """Bytes that the forward pass keeps."""
    loss, at = problem(cell, 4, 8)
    leaves = jax.tree.leaves(jax.eval_shape(lambda *at: jax.vjp(loss(by(method)), *at)[1], *at))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@functools.cache
def peak(cell, batch, width, method):
    """Temporary bytes of the gradient."""
    loss, at = problem(cell, batch, width)
    return jax.jit(jax.grad(loss(by(method)), (0, 1))).lower(*at).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("method", ["sequential", "walk", "tree", "associative", "chunked", *SEGMENTS.values()], ids=str)
@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_the_forward_pass_keeps_the_states_and_hardly_more_than_the_loop_does(cell, method):
    """The states, the inputs and what the loss keeps; `lax.scan` keeps the least that it may, three arrays for this RNN from JAX 0.12 on."""
    assert kept(cell, method) <= 1.1 * kept(cell, None)


@pytest.mark.parametrize("method", SEGMENTS.values(), ids=str)
@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_in_segments_the_peak_is_below_the_loops(cell, method):
    assert peak(cell, 4, 8, method) < peak(cell, 4, 8, None)


def test_a_peak_in_segments_grows_with_the_segment():
    found = [peak("rnn", 4, 8, parscan.Walk(segment)) for segment in (8, 32, LENGTH)]
    assert found[0] < found[1] < found[2]


def given(cell, batch, width):
    """The steps, and the structure of their Jacobians, for the length of these tests."""
    _, at = problem(cell, batch, width)
    found = parscan.plan(lambda h, x: 2 * (CELLS[cell](at[0], h, x),), at[1], jnp.zeros((LENGTH, batch, width), jnp.float32), method="sequential")._given
    return found.steps[0], found.structures[0]


def chosen(cell, batch, width, platform):
    """What `auto` takes there."""
    return plan_for(given(cell, batch, width)[0].program, LENGTH, None, None, fallback=Lax(), platform=platform)[0].method


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "cell, batch, width", [("rnn", 4, 8), ("gru", 4, 8), ("gru", 1, 8), ("rnn", 4, 32), ("linear", 4, 8), ("linear", 64, 4), ("pairs", 1, 4)]
)
def test_what_auto_takes_peaks_at_twice_the_loop_at_most(cell, batch, width, platform, monkeypatch):
    monkeypatch.setattr(memory, "LITTLE", 0)
    method = chosen(cell, batch, width, platform)
    assert isinstance(method, Lax) or peak(cell, batch, width, method) <= 2 * peak(cell, batch, width, None), method


def test_little_is_not_cut(monkeypatch):
    whole = chosen("rnn", 4, 8, "gpu")
    assert chosen("rnn", 4, 8, "cpu").segment is None
    assert whole.segment is None and 2 * peak("rnn", 4, 8, None) < peak("rnn", 4, 8, whole) < memory.LITTLE
    monkeypatch.setattr(memory, "LITTLE", peak("rnn", 4, 8, whole) // 2)
    assert chosen("rnn", 4, 8, "gpu").segment < LENGTH


def test_much_is_cut_where_memory_is_handed_out_anew(monkeypatch):
    """What is held at once stays below what is kept from call to call, if that is told to pay."""

    step, structure = given("rnn", 4, 8)

    def told(**times):
        return timing.cut(parscan.Sequential(), [step], [structure], replace(machines.default("cpu"), **times)).segment

    assert told() is None
    monkeypatch.setattr(timing, "KEPT", 2**16)
    monkeypatch.setattr(timing, "HANDED_OUT", 2**16 + 2**14)
    whole, cut = (timing.held(step, structure, parscan.Sequential(segment=segment)) for segment in (None, told(fresh=10.0)))
    assert cut <= timing.KEPT and whole > timing.HANDED_OUT and timing.FEWEST <= told(fresh=10.0) < LENGTH
    assert told(fresh=1e-6) is None  # it costs nothing
    assert told(fresh=10.0, launch=1e9) is None  # segments cost more


@pytest.mark.parametrize("segment", [None, 64, 16])
@pytest.mark.parametrize("cell, batch, width", [("rnn", 4, 8), ("rnn", 4, 32), ("linear", 4, 8), ("pairs", 4, 4)])
def test_what_a_gradient_holds_is_told_within_a_factor_of_two(cell, batch, width, segment):
    told = timing.held(*given(cell, batch, width), parscan.Sequential(segment=segment))
    assert 0.5 < told / peak(cell, batch, width, parscan.Sequential(segment=segment)) < 2


# --- segments give what the whole gives -------------------------------------------------------------------------------------


def everything(scan, reverse, branches):
    """A step that emits, counts, and may branch; read in part. Gradients in weights, start and inputs, a tangent, and a second derivative."""
    random = np.random.default_rng(0)
    w, start, xs = (jnp.asarray(0.5 * random.standard_normal(shape)) for shape in ((3, 3), (2, 3), (11, 2, 3)))

    def loss(w, start, xs):
        def f(carry, x):
            h, count = carry
            h = jnp.tanh(h @ w + x)
            if branches:
                h = lax.cond(count % 2 == 0, jnp.sin, lambda h: h * h, h)
            return (h, count + 1), (h, (h @ w.T)[..., 0], count)

        (final, _), (states, some, _) = scan(f, (start, 0), xs, reverse=reverse)
        return jnp.sum(final**3) + jnp.sum(jnp.sin(states)) + jnp.sum(some**2)

    def derivatives(*at):
        tangent = jax.jvp(loss, at, at)[1]
        return jax.grad(loss, (0, 1, 2))(*at), tangent, jax.grad(lambda w: jax.jvp(lambda w: loss(w, *at[1:]), (w,), (w,))[1])(w)

    return jax.jit(derivatives)(w, start, xs)


@functools.cache
def everything_by_the_loop(reverse, branches):
    return everything(lax.scan, reverse, branches)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "method, branches",
    [
        (parscan.Sequential(segment=4), False),
        (parscan.Sequential(segment=5), True),
        (parscan.Walk(3), True),
        (parscan.Tree(segment=4), False),
        (parscan.Associative(segment=5), False),
        (parscan.Chunked(2, segment=1), False),
        (parscan.Chunked(2, segment=5), True),
    ],
    ids=str,
)
def test_in_segments_derivatives_are_the_loops(method, branches, reverse):
    assert_close(everything(by(method), reverse, branches), everything_by_the_loop(reverse, branches), TOLERANCE["float64"])


@pytest.mark.parametrize("method", ["sequential", *SEGMENTS.values()], ids=str)
def test_a_network_goes_run_by_run_in_segments(method):
    """Runs of 1, 9 and 7 layers, between states of different widths."""
    random = np.random.default_rng(1)
    widths = [5, *[4] * 10, *[2] * 8]
    ws = [jnp.asarray(random.standard_normal(shape) / 2) for shape in itertools.pairwise(widths)]
    layers, start = [lambda w, h: jnp.tanh(h @ w)] * len(ws), jnp.asarray(random.standard_normal((3, 5)))
    segment = parscan.Sequential(segment=4) if method == "sequential" else type(method)(**{**vars(method), "segment": 4})

    def loss(method):
        return lambda ws, h: jnp.sum(jnp.stack([h.sum() for h in parscan.chain(layers, method=method, return_activations=True)(ws, h)[1]]) ** 2)

    want = jax.grad(loss("lax"), (0, 1))(ws, start)
    assert_close(jax.grad(loss(segment), (0, 1))(ws, start), want, TOLERANCE["float64"])
    y, activations = parscan.forward(layers, ws, start)
    got, plain = (parscan.parallel_backward(layers, ws, activations, y, method=m) for m in (segment, "lax"))
    assert_close((got.params, got.activations), (plain.params, plain.activations), TOLERANCE["float64"])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_linear_scan_goes_in_segments(shared, reverse):
    random = np.random.default_rng(2)
    A, b, h = (jnp.asarray(random.standard_normal(shape) / 2) for shape in ((3, 3) if shared else (10, 3, 3), (10, 3), (3,)))

    def loss(method):
        return lambda A, b, h: jnp.sum(parscan.linear_scan(parscan.Dense(A), b, h, reverse=reverse, method=method) ** 3)

    want = jax.grad(loss("lax"), (0, 1, 2))(A, b, h)
    for method in (parscan.Tree(segment=4), parscan.Walk(3), parscan.Sequential(segment=4), parscan.Chunked(2, segment=5)):
        assert_close(jax.grad(loss(method), (0, 1, 2))(A, b, h), want, TOLERANCE["float64"])


def test_a_segment_is_a_loop_in_the_program():
    """Of steps so many at once as asked for, and so many times."""
    loss, at = problem("rnn", 4, 8)
    program = jax.make_jaxpr(jax.grad(loss(by(parscan.Tree(segment=16))), (0, 1)))(*at)
    assert LENGTH // 16 in [eqn.params["length"] for eqn in equations(program) if eqn.primitive.name == "scan"]


def test_plans_count_the_bytes_of_one_segment():
    _, (weights, start) = problem("rnn", 4, 8)
    plan = lambda method: parscan.plan(lambda h, x: (rnn(weights, h, x), None), start, jnp.zeros((LENGTH, 4, 8), jnp.float32), method=method)
    whole, cut = plan("tree"), plan(parscan.Tree(segment=16))
    assert whole.bytes["forming"] == 8 * cut.bytes["forming"] and whole.flops["forming"] == cut.flops["forming"]
    assert whole.bytes["down-sweep"] == cut.bytes["down-sweep"]
    assert whole.depth < cut.depth < LENGTH


# --- what does not fit ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_device(monkeypatch):
    """A device with so many bytes."""
    return lambda size: monkeypatch.setattr(memory, "of_device", lambda platform: size)


def plan_of(method, width=32, length=1024):
    w = jnp.zeros((width, width), jnp.float32)
    return parscan.plan(lambda h, x: (jnp.tanh(h @ w + x), None), jnp.zeros(width, jnp.float32), jnp.zeros((length, width), jnp.float32), method=method)


@pytest.mark.parametrize("method", ["tree", "chunked", "associative", "sequential"])
def test_a_plan_that_would_not_fit_goes_in_segments_that_do(small_device, method):
    whole = plan_of(method)
    assert whole.method.segment is None
    small_device(2_000_000 if method in ("tree", "associative") else 500_000)
    plan = plan_of(method)
    given = plan._given
    assert 1 <= plan.method.segment < 1024
    assert memory.held(given.steps[0], given.structures[0], plan.method, plan.method.segment) <= memory.of_device("cpu") / 2
    assert f"in segments of {plan.method.segment}: all at once would hold about" in plan.reason and "and the device has" in plan.reason


def test_what_is_asked_for_and_does_not_fit_is_refused_with_what_would(small_device):
    small_device(2_000_000)
    with pytest.raises(ValueError) as error:
        plan_of(parscan.Tree(segment=1024))
    said = str(error.value)
    assert said.startswith(
        "`method=Tree(segment=1024)` would hold about 13.4 MB for the Jacobians of 1024 steps at once (Dense, 32 coordinates), "
        "beside 1.31 MB for the chain's states and what else has their size, and the device has 2 MB:"
    )
    fits = int(said.split("segment=")[2].split(" ")[0])
    assert plan_of(parscan.Tree(segment=fits)).method.segment == fits
    assert said.endswith(f"segment={fits} would fit, or `method='sequential'`, which forms none.")


def test_a_single_jacobian_that_does_not_fit_is_refused(small_device):
    small_device(5_000)
    with pytest.raises(ValueError, match=r"`method=Tree\(\)` would hold about .* and the device has 5 kB: `method='sequential'` forms none\."):
        plan_of("tree")
    assert plan_of("sequential").method.segment >= 1


def test_this_device_says_how_much_memory_it_has():
    found = memory.of_device(jax.default_backend())
    assert found is None or found > 2**28
    assert memory.of_device("no such platform") is None


# --- more elements than a 32-bit number counts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [parscan.Tree(segment=2**24), parscan.Chunked(4, segment=2**24), parscan.Walk(2**24), parscan.Associative(segment=2**24)], ids=str
)
def test_more_than_2_to_the_31_elements_are_indexed_rightly(monkeypatch, method):
    """2²⁴ steps, 4 blocks of 16: 2³⁴ numbers in their Jacobians. No array is indexed by a 32-bit number along an axis that it does not count."""
    monkeypatch.setattr(memory, "of_device", lambda platform: None)
    length, dtype = 2**24, jnp.bfloat16
    some = jax.ShapeDtypeStruct((4, 16), dtype), jax.ShapeDtypeStruct((length, 4, 16), dtype), jax.ShapeDtypeStruct((16, 16), dtype)

    def loss(h, xs, w):
        return parscan.scan(lambda h, x: (jnp.tanh(h @ w + x), None), h, xs, method=method)[0].sum()

    program = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*some)
    biggest = max(math.prod(v.aval.shape) for eqn in equations(program) for v in eqn.outvars if hasattr(v.aval, "shape"))
    assert biggest > 2**31
    for eqn in equations(program):
        if eqn.primitive.name in ("gather", "scatter", "scatter-add", "dynamic_slice", "dynamic_update_slice", "iota", "argmax", "cumsum"):
            assert max((side for v in (*eqn.outvars, *eqn.invars[:1]) for side in v.aval.shape), default=0) < 2**31, eqn
    assert jax.tree.map(lambda v: v.shape, program.out_avals) == [(4, 16), (length, 4, 16), (16, 16)]


def test_planning_counts_them_too(monkeypatch):
    monkeypatch.setattr(memory, "of_device", lambda platform: None)
    _, (weights, start) = problem("rnn", 4, 8)
    plan = parscan.plan(lambda h, x: (rnn(weights, h, x), None), start, jax.ShapeDtypeStruct((2**26, 4, 8), jnp.float32), method="tree")
    assert plan.bytes["forming"] == 2**26 * 4 * 8 * 8 * 4 > 2**35
    assert planning.sized(parscan.Walk(), 2**31 + 2, {8: 4}).segment <= 1024


def test_what_auto_takes_is_never_refused(small_device):
    """A step that would not fit even alone is cut as far as it can be: `lax.scan` would be tried, too."""
    small_device(100)
    loss, at = problem("rnn", 4, 8)
    for platform in ("cpu", "gpu"):
        assert not isinstance(chosen("rnn", 4, 8, platform), Lax)
    assert_close(jax.grad(loss(by("auto")))(*at), jax.grad(loss(by(None)))(*at), TOLERANCE["float32"])


@pytest.mark.parametrize("method", ["sequential", "tree", parscan.Tree(segment=2)], ids=str)
def test_outputs_leak_no_tracer(method):
    """What is computed again is remembered by JAX, and with it all that it closes over."""
    start = jnp.full(3, 0.3)

    def loss(scan):
        return lambda w: scan(lambda h, x: (jnp.sin(h @ w), (h @ w)[0]), start, None, length=5)[1].sum()

    with jax.checking_leaks():
        for gradient in (jax.grad(loss(by(method))), jax.jit(jax.grad(loss(by(method))))):
            assert_close(gradient(jnp.eye(3)), jax.grad(loss(lax.scan))(jnp.eye(3)), TOLERANCE["float64"])
