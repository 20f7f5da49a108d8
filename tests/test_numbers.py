"""Long products: never non-finite where the sequential pass is finite, in `jvp` and in `grad`."""

from __future__ import annotations

import functools

import finiteness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finiteness import CASES, METHODS, MODES, derivatives, gap, missing, parting, single
from jax import lax
from support import assert_close, equations

import parscan
from parscan import guard
from parscan.jaxprs import roundoff

# --- what a precision can hold and products of it cannot: tests/finiteness.py --------------------------------------------------------

GROWTH = "growth into one axis, read on the other"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_finite_and_equal(method, name):
    for mode in MODES:
        assert any(np.isfinite(leaf).any() for leaf in jax.tree.leaves(derivatives(name, None)[mode])), "a case where the loop itself fails says nothing"
        assert missing(name, method, mode) == 0
        assert CASES[name].chaotic or gap(name, method, mode) < 1e-4


def test_a_number_that_is_lost_is_counted(monkeypatch):
    of = {None: {"jvp": np.array([1.0, np.inf, 0.0])}, "tree": {"jvp": np.array([np.nan, np.nan, 1.0])}}
    monkeypatch.setattr(finiteness, "derivatives", lambda name, method: of[method])
    assert finiteness.missing("any", "tree", "jvp") == 1
    assert not finiteness.gap("any", "tree", "jvp") < 1


def test_the_gradient_through_growth_is_exact():
    for method in METHODS:
        np.testing.assert_array_equal(derivatives(GROWTH, method)["grad"][0], [0.0, 1.0])


@pytest.mark.parametrize("method", METHODS)
def test_parallel_backward_through_growth(method):
    case = CASES[GROWTH]
    grads = parscan.parallel_backward(lambda m, h: m @ h, case.xs, jnp.zeros((129, 2), jnp.float32), case.read, method=METHODS[method])
    np.testing.assert_array_equal(grads.input, [0.0, 1.0])


@pytest.mark.parametrize("method", METHODS)
def test_linear_scan_through_growth(method):
    case = CASES[GROWTH]

    def loss(start):
        return jnp.vdot(case.read, parscan.linear_scan(parscan.Dense(case.xs), jnp.zeros((128, 2), jnp.float32), start, method=METHODS[method])[-1])

    np.testing.assert_array_equal(jax.grad(loss)(jnp.zeros(2, jnp.float32)), [0.0, 1.0])


@pytest.mark.parametrize("method", METHODS)
def test_random_steps_of_many_magnitudes(method):
    """The carry stays moderate, the steps do not: h' = s_i tanh(h / s_{i-1}) with s over sixteen decades."""
    scales = jnp.asarray(10.0 ** np.random.default_rng(1).uniform(-8, 8, (201, 3)), jnp.float32)

    def loss(scan):
        def f(h, s):
            return s[1] * jnp.tanh(h / s[0] + 0.1 * jnp.roll(h / s[0], 1)), None

        return jax.grad(lambda h: jnp.sum(scan(f, h, (scales[:-1], scales[1:]))[0] / scales[-1]))(0.3 * scales[0])

    want, got = loss(lax.scan), loss(lambda *a: parscan.scan(*a, method=METHODS[method]))
    assert np.all(np.isfinite(want))
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_growth_by_a_constant_that_the_compiler_knows(method):
    f = lambda h, _: (h * jnp.asarray([16.0, 1.0], jnp.float32), h)
    run = lambda scan: jax.grad(lambda h: scan(f, h, None, length=128)[0][1])(jnp.zeros(2, jnp.float32))
    np.testing.assert_array_equal(run(lambda *a, **k: parscan.scan(*a, **k, method=METHODS[method])), [0.0, 1.0])
    alike = lambda h, _: (16 * h, h)
    tangent = jax.jvp(lambda h: parscan.scan(alike, h, None, length=128, method=METHODS[method])[0], (jnp.zeros(2),), (jnp.zeros(2),))[1]
    np.testing.assert_array_equal(tangent, [0.0, 0.0])


# --- what a mask keeps out ---------------------------------------------------------------------------------------------------------

TURN = jnp.asarray(0.3 * np.random.default_rng(0).standard_normal((3, 3)))
MASKED = {
    "sqrt of relu": lambda h, x: jnp.tanh(h @ TURN + jnp.sqrt(jax.nn.relu(h)) + x),
    "sqrt of relu of a product": lambda h, x: jnp.sqrt(jax.nn.relu(h @ TURN + x)) - 0.5,
    "a user's transpose": lambda h, x: jnp.tanh(lax.custom_linear_solve(lambda v: 2 * v, h, lambda mv, b: b / 2, lambda mv, b: b / 3) @ TURN + x),
}


@functools.cache
def masked(name, scan, **options):
    loss = lambda h, x: jnp.sum(scan(lambda h, x: (MASKED[name](h, x), None), h, x, **options)[0] ** 2)
    return jax.jit(jax.grad(loss, (0, 1)))(-jnp.ones((4, 3)), -jnp.ones((9, 4, 3)))


@pytest.mark.parametrize("method", [*METHODS, "auto", "sequential"])
@pytest.mark.parametrize("name", MASKED)
def test_an_infinite_slope_behind_a_mask(name, method):
    """Jacobians are formed in the direction of travel: 0 · inf, kept out one way, would be let in the other."""
    assert_close(masked(name, parscan.scan, method=METHODS.get(method, method)), masked(name, lax.scan), 1e-12)


# --- what products of maps lose, and the guard gives back ---------------------------------------------------------------------------------

SWAP = jnp.asarray([[8.5, 7.5], [7.5, 8.5]])  # the difference of the two stays as it is, their sum grows
SLANTED = CASES["growth along no axis"].xs[0]
pair = lambda a, b: {"a": a, "b": b}
broken = lambda t: jnp.where(t == 50, jnp.nan, 1.0)
LOST = {  # name: (step, start, xs, what is read)
    "growth of the sum, read by the difference": (lambda h, t: (SWAP @ h, None), jnp.asarray([1.0, -1.0]), lambda h, ys: h[0] - h[1]),
    "the same, later": (lambda h, t: (jnp.where(t > 70, SWAP, jnp.eye(2)) @ h, None), jnp.asarray([1.0, -1.0]), lambda h, ys: h[0] - h[1]),
    "growth along no axis": (lambda h, t: (SLANTED @ h, None), jnp.asarray([1, -1], jnp.float32), lambda h, ys: h[0] - h[1]),
    "momentum of bodies that part": (
        lambda h, t: (parting(h, 0), None),
        CASES["momentum of bodies that part"].start,
        lambda h, ys: h[1].sum(),
    ),
    "cotangents that cancel": (lambda h, t: (2 * h, h), jnp.ones(()), lambda h, ys: h - ys[1:].sum()),
    "one coordinate overflows": (
        lambda h, t: (pair(2.0**12 * h["a"], h["b"] + 0.5 * h["a"]), None),
        pair(jnp.ones(4), jnp.ones(4)),
        lambda h, ys: h["a"].sum() + h["b"].sum(),
    ),
    "NaN at one step": (lambda h, t: (pair(jnp.tanh(broken(t) * h["a"]), h["b"] + h["a"]), None), pair(jnp.ones(4), jnp.ones(4)), lambda h, ys: h["b"].sum()),
    "an infinite cotangent": (
        lambda h, t: (pair(jnp.sin(h["a"]), h["b"] + h["a"]), None),
        pair(jnp.ones(4), jnp.ones(4)),
        lambda h, ys: jnp.inf * h["a"][0] + h["b"].sum(),
    ),
}


@functools.cache
def lost(name, method, mode):
    step, start, read = LOST[name]
    scan = lax.scan if method is None else functools.partial(parscan.scan, method=method)
    run = lambda h: scan(step, h, jnp.arange(128))
    if mode == "grad":
        return jax.jit(jax.grad(lambda h: read(*run(h))))(start)
    if mode == "grad of vmap":
        both = lambda h: jnp.sum(jax.vmap(lambda h: read(*run(h)))(jax.tree.map(lambda x: jnp.stack([x, jnp.zeros_like(x)]), h)))
        return jax.jit(jax.grad(both))(start)
    return jax.jit(lambda h: jax.jvp(lambda h: run(h)[0], (h,), (h,))[1])(start)


GROWN = ("growth along no axis", "momentum of bodies that part")
IN_SEGMENTS = [
    parscan.Walk(8),
    parscan.Tree(segment=8),
    parscan.Chunked(4, segment=16),
    parscan.Chunked(3, levels=0, segment=16),
    parscan.Associative(segment=9),
]


@pytest.mark.parametrize("method", IN_SEGMENTS, ids=repr)
@pytest.mark.parametrize("name", GROWN)
def test_what_grows_from_segment_to_segment(method, name):
    """Every product is right to the last digits, and so is every segment."""
    jax.tree.map(np.testing.assert_array_equal, lost(name, method, "grad"), lost(name, None, "grad"))


ALONG_NO_AXIS = [*METHODS.values(), *IN_SEGMENTS, parscan.Chunked(8, levels=2), parscan.Chunked(7, levels=0)]


@pytest.mark.parametrize("method", ALONG_NO_AXIS, ids=repr)
@pytest.mark.parametrize("dtype, length", [("float32", 64), ("float64", 128)])
def test_linear_scan_through_growth_along_no_axis(method, dtype, length):
    read = jnp.asarray([1, -1], dtype)
    loss = lambda h: jnp.vdot(read, parscan.linear_scan(parscan.Dense(SLANTED.astype(dtype)), jnp.zeros((length, 2), dtype), h, method=method)[-1])
    np.testing.assert_array_equal(jax.grad(loss)(jnp.zeros(2, dtype)), read)


@pytest.mark.parametrize(
    "method, mode",
    [*((method, mode) for method in METHODS for mode in ("grad", "jvp")), ("tree", "grad of vmap")],
)
@pytest.mark.parametrize("name", LOST)
def test_as_one_step_after_another(method, name, mode):
    got, want = lost(name, METHODS[method], mode), lost(name, None, mode)
    rtol = 1e-4 if name in GROWN and mode == "jvp" else 1e-6  # their tangents grow, and roundings with them
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=rtol), got, want)


def test_without_its_guard_a_tree_loses_them():
    got, want = (lost("growth of the sum, read by the difference", method, "grad") for method in (parscan.Tree(guard=False), None))
    assert not np.allclose(got, want)


@pytest.mark.parametrize("method", ["tree", parscan.Tree(segment=8)], ids=str)
def test_one_branch_under_vmap(method):
    """A batched answer would compute both branches, always."""
    run = lambda h: parscan.scan(lambda h, _: (SWAP @ h, None), h, None, length=64, method=method)[0]
    program = jax.make_jaxpr(jax.grad(lambda h: jnp.sum(jax.vmap(jax.vmap(run))(h))))(jnp.ones((3, 2, 2)))
    branches = [eqn for eqn in equations(program) if eqn.primitive.name == "cond"]
    assert branches and all(eqn.invars[0].aval.shape == () for eqn in branches)
    loops = [eqn for eqn in equations(program) if eqn.primitive.name == "while"]
    assert bool(loops) == (method != "tree") and all(eqn.params["cond_jaxpr"].out_avals[0].shape == () for eqn in loops)


PROMISED = 3e-3  # half of the digits
READ = jnp.asarray([0.1, -0.1, 0.3, -0.3], jnp.float32)  # of four that the mean has no part in
BETWEEN = [*METHODS.values(), parscan.Chunked(16), parscan.Chunked(16, levels=0), parscan.Chunked(16, segment=48), parscan.Tree(segment=25), parscan.Walk(7)]


def means(grown, kept, read=READ):
    """The gradient in what is added at every step, where the mean grows, and is now and then set to zero; with `lax.scan` and by a method."""

    def step(h, some):
        grow, keep, new = some
        h = h * keep + new
        return h + grow * h.mean(), None

    def gradient(scan):
        last = lambda new: scan(step, jnp.zeros(4, jnp.float32), (grown, kept, new))[0]
        return jax.jit(jax.grad(lambda new: jnp.dot(last(new), read)))(jnp.zeros((len(grown), 4), jnp.float32))

    return gradient


ones = lambda count: jnp.ones(count, jnp.float32)
MEANS = {
    "and a reset inside a chunk of 16": means((0 * ones(64)).at[16:48].set(0.9), ones(64).at[17].set(0)),
    "and a reset inside eight steps": means((0 * ones(33)).at[11:25].set(2.4), ones(33).at[10].set(0)),
    "of numbers close to the smallest": means(0.4 * ones(48), ones(48), 1e-34 * READ),
}


@pytest.mark.parametrize("method", BETWEEN, ids=repr)
@pytest.mark.parametrize("name", MEANS)
def test_growth_of_the_mean(name, method):
    got, want = (MEANS[name](functools.partial(parscan.scan, method=one)) for one in (method, "lax"))
    np.testing.assert_allclose(got, want, rtol=PROMISED)


@pytest.mark.parametrize("way", ["grad", "jvp in reverse"])
def test_growth_in_the_rest_of_a_segment(way):
    """Where the steps that fill no chunk come first in the journey, an error that arrives grows in them, and a reset hides it."""
    grown, kept = (0 * ones(46)).at[31:39].set(1).at[16:23].set(15), ones(46)
    gradient, kept_back = means(grown, kept.at[16].set(0)), kept.at[15].set(0)

    def step(h, some):
        h = h * some[1] + some[0] * (h * some[1]).mean()
        return h, h

    def tangents(scan):
        return jax.jvp(lambda h: scan(step, h, (grown, kept_back), reverse=True)[1], (0 * READ,), (READ,))[1]

    of = gradient if way == "grad" else tangents
    got, want = (of(functools.partial(parscan.scan, method=method)) for method in (parscan.Chunked(8, segment=23), "lax"))
    np.testing.assert_allclose(got, want, rtol=PROMISED)


@pytest.mark.parametrize("method", METHODS)
def test_a_carry_in_half_precision_is_compared_as_it_is_stored(monkeypatch, method):
    """Through padding a vector stays as it is, and rounding it to the carry's precision at every step is no error that adds up."""
    judged, is_sound = [], guard.is_sound
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)) / 2.5, jnp.bfloat16)
    step = lambda h, real: (jnp.where(real, jnp.tanh(h @ weights), h), None)

    def seen(*given):
        good = is_sound(*given)
        jax.debug.callback(lambda good: judged.append(bool(good)), good)
        return good

    monkeypatch.setattr(guard, "is_sound", seen)
    last = lambda h: parscan.scan(step, h, jnp.arange(520) >= 500, method=METHODS[method])[0]
    jax.grad(lambda h: jnp.sum(last(h)).astype(jnp.float32))(jnp.full((2, 8), 0.3, jnp.bfloat16))
    jax.effects_barrier()
    assert judged and all(judged)


@pytest.mark.parametrize("method", [*BETWEEN, "auto"], ids=repr)
def test_a_decay_behind_growth(method):
    """Inside the journey's last chunk: the largest vector there is not what the last one is compared with."""
    grown, kept = (0 * ones(32)).at[16:].set(0.3), ones(32).at[:16].set(0.5)
    step = lambda h, some: ((h - h.mean()) * some[1] + h.mean() * (1 + some[0]), None)
    gradient = lambda method: jax.grad(lambda h: jnp.dot(parscan.scan(step, h, (grown, kept), method=method)[0], READ))(jnp.zeros(4, jnp.float32))
    want = gradient("lax")
    np.testing.assert_allclose(gradient(method), want, rtol=0, atol=PROMISED * jnp.abs(want).max())  # of the block, as it is promised


@pytest.mark.parametrize("method", [*BETWEEN, "auto"], ids=repr)
def test_a_redundant_total(method):
    """The third row is the sum of the others, exactly in the step and not in its Jacobian: what is not zero there is rounding, from the first step on."""
    into, out = (jnp.asarray(m, jnp.float32) for m in ([[3, 1, -2], [1, -2, 4], [2, 5, 1]], [[1, 2, 3], [4, -1, 2], [5, 1, 5]]))
    xs = jnp.asarray(np.random.default_rng(1).standard_normal((40, 2, 3)), jnp.float32)
    last = lambda xs: parscan.scan(lambda h, x: (((h @ into.T) * x * 0.2) @ out.T, None), jnp.ones((2, 3), jnp.float32), xs, method=method)[0]
    assert not jnp.any(jax.grad(lambda xs: jnp.sum(last(xs) @ jnp.asarray([1, 1, -1], jnp.float32)))(xs))


# --- how finely a step rounds ------------------------------------------------------------------------------------------------------------

WIDE = single(np.random.default_rng(0).standard_normal((16, 16)) / 8)
ROUNDING = {  # name: (step, platform, the distance from 1 to the next number)
    "single": (lambda h: jnp.tanh(h @ WIDE), "cpu", 2.0**-23),
    "products on a GPU": (lambda h: jnp.tanh(h @ WIDE), "gpu", 2.0**-10),
    "products on a TPU": (lambda h: jnp.tanh(h @ WIDE), "tpu", 2.0**-7),
    "highest": (lambda h: jnp.tanh(jnp.matmul(h, WIDE, precision="highest")), "gpu", 2.0**-23),
    "an algorithm": (lambda h: lax.dot(h, WIDE, precision="BF16_BF16_F32"), "cpu", 2.0**-7),
    "half inside": (lambda h: jnp.tanh(h.astype(jnp.bfloat16)).astype(jnp.float32), "cpu", 2.0**-7),
    "reduced": (lambda h: lax.reduce_precision(h, 8, 10), "cpu", 2.0**-10),
    "half beside": (lambda h: (jnp.tanh(h), h.astype(jnp.bfloat16)), "cpu", 2.0**-23),
    "nothing that rounds": (lambda h: h[::-1].astype(jnp.int32), "cpu", 2.0**-23),
}


@pytest.mark.parametrize("name", ROUNDING)
def test_how_finely_a_step_rounds(name):
    step, platform, want = ROUNDING[name]
    assert roundoff(jax.make_jaxpr(step)(jnp.ones((16, 16), jnp.float32)), [0], [0], platform) == want


# --- precision ---------------------------------------------------------------------------------------------------------------------

asked = functools.partial(jnp.matmul, precision="high")  # of the step's own products
PRODUCTS = {  # kind: (step, start)
    "Dense": (lambda h, _: (jnp.tanh(asked(WIDE, h)), h), jnp.ones(16, jnp.float32)),
    "LowRank": (lambda h, _: (0.9 * h + asked(WIDE[:, :1], asked(WIDE[:1], h)), h), jnp.ones(16, jnp.float32)),
    "Kronecker": (lambda h, _: (asked(asked(WIDE, h), WIDE), h), jnp.ones((16, 16), jnp.float32)),
}


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_product_states_its_precision(method, kind):
    """Left unsaid, it is TF32 or bfloat16 on an accelerator. The step's own products keep what they ask for; Jacobians are multiplied at the highest."""
    step, start = PRODUCTS[kind]
    run = lambda h: jnp.sum(parscan.scan(step, h, None, length=32, method=METHODS[method])[1])
    assert kind in repr(parscan.plan(step, start, None, length=32, method=METHODS[method]).kind)
    products = [eqn.params["precision"] for eqn in equations(jax.make_jaxpr(jax.grad(run))(start)) if eqn.primitive.name == "dot_general"]
    assert set(products) == {(lax.Precision.HIGH,) * 2, (lax.Precision.HIGHEST,) * 2}


BY_CHANCE = {parscan.Tree(): (0.17406082153320312, 0.1718463897705078, 0.17075252532958984), parscan.Chunked(size=8): (0.17273426055908203, 0.1644887924194336)}


@pytest.mark.parametrize("method", BY_CHANCE, ids=repr)
def test_defects_that_cancel_by_chance_are_seen_through(method):
    """(1, -1) passes exactly where sums grow. The defects of these chains, rounded, amount to next to nothing, and the vector is up to a percent off."""
    c = jnp.array([1.0, -1.0], "float32")

    @jax.jit
    def gradient(J):
        return jax.grad(lambda h: jnp.vdot(c, parscan.scan(lambda h, _: (J @ h, None), h, None, length=64, method=method)[0]))(jnp.zeros(2, "float32"))

    for a in BY_CHANCE[method]:
        b = round(0.37 * a * 2**20) / 2**20
        np.testing.assert_allclose(gradient(jnp.array([[1 + a, b], [a, 1 + b]], "float32")), c, atol=3e-3)
