"""What `lax.scan` takes, `parscan.scan` takes, and gives the same values, dtypes and gradients."""

from __future__ import annotations

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Converts
from jax import lax
from support import assert_close, round_through

import parscan

Point = collections.namedtuple("Point", ["a", "b"])
START = jnp.array([[0.1, -0.4, 0.3], [0.2, 0.5, -0.6]])
XS = jnp.sin(jnp.arange(42.0)).reshape(7, 2, 3)


def keyed(carry, x):
    h, key, i = carry
    key, sub = jax.random.split(key)
    h = jnp.tanh(h + x * jax.random.normal(sub, h.shape)) * jnp.where(i % 2 == 0, 1.0, 0.5)
    return (h, key, i + 1), (h, i, sub)


CASES = {
    # name: (f, init, xs, options)
    "nothing emitted": (lambda h, x: (jnp.tanh(h + x), None), START, XS, {}),
    "the carry emitted": (lambda h, x: ((g := jnp.tanh(h + x)), g), START, XS, {}),
    "the old carry emitted": (lambda h, x: (jnp.tanh(h + x), h), START, XS, {}),
    "the carry emitted twice": (lambda h, x: ((g := jnp.tanh(h + x)), (g, g)), START, XS, {}),
    "x emitted": (lambda h, x: (jnp.tanh(h + x), x), START, XS, {}),
    "constants emitted": (lambda h, x: (jnp.tanh(h + x), (1.0, jnp.arange(3))), START, XS, {}),
    "in reverse": (lambda h, x: ((g := jnp.tanh(h[::-1] + x)), (g, h.sum())), START, XS, {"reverse": True}),
    "no xs": (lambda h, _: (jnp.tanh(1.1 * h), h), START, None, {"length": 5}),
    "no steps": (lambda h, x: (jnp.tanh(h + x), h), START, XS[:0], {}),
    "one step": (lambda h, x: (jnp.tanh(h + x), h), START, XS[:1], {}),
    "unrolled": (lambda h, x: (jnp.tanh(h + x), h), START, XS, {"unroll": 3}),
    "unrolled wholly": (lambda h, x: (jnp.tanh(h + x), h), START, XS, {"unroll": True}),
    "a dict and a tuple": (lambda c, x: ({"a": c["b"][0] + x["u"], "b": (jnp.sin(c["a"]), None)}, x), {"a": START, "b": (START, None)}, {"u": XS, "v": ()}, {}),
    "a namedtuple": (lambda c, x: (Point(c.b * x, c.a), c), Point(START, 2 * START), XS, {}),
    "leaves exchanged": (lambda c, x: ((c[1], c[0]), c[0] * x), (START, 2 * START), XS, {}),
    "a key, a counter, a state": (keyed, (START, jax.random.key(0), jnp.int32(0)), XS, {}),
    "a boolean": (lambda c, x: ((jnp.where(c[1], c[0] * x, c[0]), ~c[1]), c[1]), (START, jnp.bool_(True)), XS, {}),
    "integer xs": (lambda h, x: (jnp.tanh(h * x), h), START, jnp.arange(7), {}),
    "key xs": (lambda h, k: (jnp.tanh(h + jax.random.normal(k, h.shape)), h), START, jax.random.split(jax.random.key(1), 7), {}),
    "a leaf that nothing changes": (lambda c, x: ((jnp.tanh(c[0] * c[1]), c[1]), None), (START, 0.5 * START), XS, {}),
    "a leaf that is overwritten": (lambda c, x: ((jnp.tanh(c[0] + x), x), c[1]), (START, START), XS, {}),
    "stopped gradients": (lambda h, x: (jnp.tanh(h + lax.stop_gradient(h) * x), h), START, XS, {}),
    "a scalar carry": (lambda h, x: (jnp.tanh(h * x.sum()), h), jnp.float64(0.3), XS, {}),
    "a carry of three axes": (lambda h, x: (jnp.tanh(jnp.einsum("abc,cd->abd", h, jnp.outer(x[0], x[1]))), None), jnp.stack([START, -START]), XS, {}),
    "an empty leaf": (lambda c, x: ((jnp.tanh(c[0] + x), c[1]), None), (START, jnp.zeros((0, 3))), XS, {}),
    "mixed precisions": (
        lambda c, x: ((jnp.tanh(c[0] + x + c[1].astype(c[0].dtype)), (c[1] * 0.5 + x.sum()).astype(jnp.float32)), c),
        (START, START.astype(jnp.float32)),
        XS,
        {},
    ),
    "custom_jvp functions": (lambda h, x: (jax.nn.relu(h + x) + jax.nn.silu(h), jax.nn.softplus(h)), START, XS, {}),
    "checkpoint inside": (lambda h, x: (jax.checkpoint(lambda h: jnp.tanh(jnp.sin(h) + x))(h), h), START, XS, {}),
    "linear algebra inside": (lambda h, x: (jnp.linalg.solve(jnp.eye(2) * 3 + h @ h.T, x), jnp.linalg.norm(h)), START, XS, {}),
}


def floats(tree):
    leaves, structure = jax.tree.flatten(tree)
    where = [jnp.issubdtype(jnp.asarray(leaf).dtype if not hasattr(leaf, "dtype") else leaf.dtype, jnp.floating) for leaf in leaves]

    def rebuild(some):
        rest = iter(some)
        return jax.tree.unflatten(structure, [next(rest) if is_float else leaf for leaf, is_float in zip(leaves, where, strict=True)])

    return [leaf for leaf, is_float in zip(leaves, where, strict=True) if is_float], rebuild


@functools.cache
def everything(scan, name, **extra):
    """Values, gradients and tangents."""
    f, init, xs, options = CASES[name]
    start, rebuild_init = floats(init)
    inputs, rebuild_xs = floats(xs)

    def outputs(start, inputs):
        out = scan(f, rebuild_init(start), rebuild_xs(inputs), **options, **extra)
        return out, floats(out)[0]

    out = outputs(start, inputs)[0]

    @jax.jit
    def derivatives(start, inputs):
        grads = jax.grad(lambda *a: sum(jnp.sum(jnp.cos(leaf)).astype(float) for leaf in outputs(*a)[1]), (0, 1))(start, inputs)
        return grads, jax.jvp(lambda *a: outputs(*a)[1], (start, inputs), (start, inputs))[1]

    return out, derivatives(start, inputs)


@pytest.mark.parametrize("method", ["auto", "tree"])
@pytest.mark.parametrize("name", CASES)
def test_like_lax_scan(name, method):
    (got, got_derivatives), (want, want_derivatives) = everything(parscan.scan, name, method=method), everything(lax.scan, name)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype, getattr(g, "weak_type", False)) == (w.shape, w.dtype, getattr(w, "weak_type", False))
        plain = (lambda a: jax.random.key_data(a)) if jnp.issubdtype(g.dtype, jax.dtypes.prng_key) else (lambda a: a)
        np.testing.assert_array_equal(plain(g), plain(w))
    assert_close(got_derivatives, want_derivatives, 1e-5 if name == "mixed precisions" else 1e-10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["tree", "walk", "chunked", "sequential"])
def test_half_precision(dtype, method):
    def grads(scan, dtype):
        start, xs = START.astype(dtype), XS.astype(dtype)
        return jax.grad(lambda h, x: scan(lambda h, x: (jnp.tanh(h + x), h), h, x)[0].astype(jnp.float32).sum(), (0, 1))(start, xs)

    got = grads(lambda *a: parscan.scan(*a, method=method), dtype)
    assert all(leaf.dtype == dtype for leaf in got)
    assert_close(got, grads(lax.scan, "float64"), 0.03)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("init", [0.0, 1, (0.0, jnp.ones(3))])
def test_weak_types_are_promoted_as_by_lax_scan(init, dtype):
    f = lambda h, x: (jax.tree.map(lambda leaf: leaf * 0.5 + x, h), h)
    got, want = (scan(f, init, jnp.ones(5, dtype)) for scan in (parscan.scan, lax.scan))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.dtype, g.weak_type) == (w.dtype, w.weak_type)
        np.testing.assert_array_equal(g, w)


def test_integer_leaves_of_parallel_backward_have_float0_gradients():
    def layer(p, h):
        return {"x": jnp.tanh(h["x"] * p["w"] + p["i"]), "n": h["n"] + 1}

    params = {"w": jnp.ones((4, 3)), "i": jnp.arange(4)}
    state = {"x": jnp.ones(3), "n": jnp.int32(0)}
    y, activations = parscan.forward(layer, params, state)
    cotangent = {"x": jnp.ones(3), "n": np.zeros((), jax.dtypes.float0)}
    for run in (lambda f: f, jax.jit):
        grads = run(lambda a: parscan.parallel_backward(layer, params, a, cotangent))(activations)
        assert grads.params["i"].dtype == jax.dtypes.float0 and grads.params["i"].shape == (4,)
        assert grads.activations["n"].dtype == jax.dtypes.float0 and grads.activations["n"].shape == (5,)
    want = jax.grad(lambda w: lax.scan(lambda h, p: (layer(p, h), None), state, {"w": w, "i": params["i"]})[0]["x"].sum())(params["w"])
    assert_close(grads.params["w"], want, 1e-12)
    assert y["n"] == 4


def test_chain_equals_scan():
    layer = lambda p, h: jnp.tanh(h @ p)
    params = jnp.sin(jnp.arange(63.0)).reshape(7, 3, 3)
    np.testing.assert_array_equal(parscan.chain(layer)(params, START), parscan.scan(lambda h, p: (layer(p, h), None), START, params)[0])


def test_chain_of_one_shared_layer():
    layer = lambda p, h: jnp.tanh(h @ p["w"])
    params = {"w": jnp.sin(jnp.arange(9.0)).reshape(3, 3)}
    apply = parscan.chain(layer, params_axes=None, length=6, method="tree")
    want = jax.grad(lambda p: lax.scan(lambda h, _: (layer(p, h), None), START, None, length=6)[0].sum())(params)
    assert_close(jax.grad(lambda p: apply(p, START).sum())(params), want, 1e-12)


EMPTY = {
    "no carry": (lambda h, x: ((), jnp.sin(x)), ()),
    "an integer carry": (lambda h, x: (h + 1, jnp.sin(x) * h), jnp.int32(0)),
    "a carry without coordinates": (lambda h, x: (h, jnp.sin(x)), jnp.zeros((0, 3))),
}


@pytest.mark.parametrize("method", ["auto", "tree", "walk"])
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_differentiate_in_the_carry(name, method):
    f, init = EMPTY[name]
    grad = lambda scan: jax.grad(lambda x: scan(f, init, x)[1].sum())(XS)
    assert_close(grad(lambda *a: parscan.scan(*a, method=method)), grad(lax.scan), 0)


@pytest.mark.parametrize("method", ["auto", "tree", "lax"])
def test_parallel_backward_of_states_without_coordinates(method):
    grads = parscan.parallel_backward(lambda p, h: h + 1, jnp.ones(3), jnp.arange(4), jnp.int32(0), method=method)
    assert_close(grads.params, jnp.zeros(3), 0)
    grads = parscan.parallel_backward(lambda p, h: h * p, jnp.ones(3), jnp.ones((4, 0)), jnp.ones(0), method=method)
    assert grads.activations.shape == (4, 0)


def test_input_under_vmap_beside_an_integer_leaf():
    layer = lambda p, h: {"x": jnp.tanh(h["x"] * p), "n": h["n"] + 1}
    activations = {"x": jnp.ones((2, 4, 3)), "n": jnp.zeros((2, 4), jnp.int32)}
    run = jax.vmap(lambda a: parscan.parallel_backward(layer, jnp.ones((3, 3)), a, {"x": jnp.ones(3), "n": 0}, method="tree").input["x"])
    assert run(activations).shape == (2, 3)


@pytest.mark.parametrize("outside", ["jit", "vmap", "grad"])
def test_a_rule_that_closes_over_a_tracer(outside):
    def loss(scan):
        def value(w, h):
            @jax.custom_jvp
            def q(h):
                return jnp.sin(h)

            q.defjvp(lambda p, t: (q(p[0]), w * t[0]))
            return jnp.sum(scan(lambda h, x: (q(h) + x, None), h, XS)[0])

        grads = jax.grad(value, 1)
        return {
            "jit": lambda: jax.jit(grads)(2.0, START),
            "vmap": lambda: jax.vmap(grads, (0, None))(jnp.array([1.0, 2.0]), START),
            "grad": lambda: jax.grad(lambda w: grads(w, START).sum())(2.0),
        }[outside]()

    assert_close(loss(lambda *a: parscan.scan(*a, method="tree")), loss(lax.scan), 1e-12)


def doubled(rule, **options):
    """sin by a rule of its own."""
    q = jax.custom_jvp(lambda h, *_: jnp.sin(h), **options)
    q.defjvp(rule)
    return q


def test_the_second_derivative_of_a_rule_is_that_of_a_plain_loop():
    """`lax.scan` of JAX 0.10 and 0.11 forgets there that the function has a rule, and differentiates the function itself; that of 0.12 does not."""
    step = lambda h: jnp.tanh(h + jnp.cos(h) * round_through(2 * h))

    def curvature(repeated):
        return jax.jvp(jax.grad(lambda h: jnp.sum(jnp.sin(repeated(h)))), (START,), (jnp.cos(START),))

    loop = lambda h: functools.reduce(lambda h, _: step(h), range(3), h)
    assert_close(curvature(lambda h: parscan.scan(lambda h, _: (step(h), None), h, length=3, method="tree")[0]), curvature(loop), 1e-12)


@dataclasses.dataclass
class Rule:
    """A rule with a state, which cannot be hashed."""

    slope: float

    def __call__(self, primals, tangents):
        return jnp.sin(primals[0]), self.slope * tangents[0]


class Mixing:
    """A rule that is a bound method, and changes its mind."""

    mixes = False

    def rule(self, primals, tangents):
        return jnp.sin(primals[0]), tangents[0] + (0.5 * tangents[0][::-1] if self.mixes else 0)


def test_rules_are_told_apart_by_what_they_compute():
    """One process, the same primal equations, ever another derivative: nothing may be remembered that no longer holds."""
    both = lambda q: [jax.grad(lambda h, s=s: s(lambda h, x: (q(h) + x, h), h, XS)[1].sum())(START) for s in (tree, lax.scan)]
    tree = lambda *a: parscan.scan(*a, method="tree")
    slope, mixing = Rule(2.0), Mixing()
    static = doubled(lambda k, p, t: (jnp.sin(p[0]), k * t[0]), nondiff_argnums=(1,))
    stateful, bound = doubled(slope), doubled(mixing.rule)
    for q in (stateful, bound, lambda h: static(h, 2.0), lambda h: static(h, 3.0)):
        assert_close(*both(q), 1e-12)
    assert parscan.plan(lambda h, x: (bound(h) + x, h), START, XS).kind == "Diagonal"
    slope.slope, mixing.mixes = 3.0, True
    assert_close(*both(stateful), 1e-12)
    assert_close(*both(bound), 1e-12)
    assert parscan.plan(lambda h, x: (bound(h) + x, h), START, XS).blocks == {2: 3}


CLOCK = {
    # what tells the time, and where it starts: the derivative there is infinite
    "a clock that starts at a singular point": (lambda t: jnp.sqrt(t), 0.0),
    "a clock that passes one": (lambda t: jnp.sqrt(jnp.abs(t - 3)), 0.0),
    "a clock that stands still": (lambda t: jnp.where(t > 0, t, jnp.sqrt(t)), 0.0),
}


@functools.cache
def timed(name, scan, **options):
    """First and second order."""
    read, begin = CLOCK[name]

    def loss(weights, h):
        def f(carry, x):
            h, t = carry
            h = jnp.tanh(h @ weights + x * read(t))
            return (h, t + 1.0), (h, t)

        (h, t), (hs, ts) = scan(f, (h, jnp.full(3, begin)), XS, **options)
        return jnp.sum(h**2) + jnp.sum(hs**3) + jnp.sum(jnp.sqrt(ts)) + t.sum()

    return jax.jit(lambda *a: jax.jvp(jax.grad(loss, (0, 1)), a, a))(jnp.cos(jnp.arange(9.0)).reshape(3, 3), START)


@pytest.mark.parametrize("method", ["auto", "sequential", "walk", "tree", "associative", parscan.Chunked(3)], ids=str)
@pytest.mark.parametrize("name", CLOCK)
def test_a_leaf_that_nothing_differentiates_has_no_derivative(name, method):
    """`lax.scan` never takes it; taken, it is infinite, and infinity times zero is not a number."""
    want = timed(name, lax.scan)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(want)), "a case where the sequential pass itself fails says nothing"
    assert_close(timed(name, parscan.scan, method=method), want, 1e-10)


@pytest.mark.parametrize("method", ["chunked", "walk"])
def test_without_jit(method):
    layer = lambda p, h: jnp.tanh(h + p)
    with jax.disable_jit():
        got = parscan.parallel_backward(layer, jnp.ones((5, 4)), jnp.ones((6, 4)), jnp.ones(4), method=method)
    want = parscan.parallel_backward(layer, jnp.ones((5, 4)), jnp.ones((6, 4)), jnp.ones(4), method="lax")
    assert_close((got.params, got.activations), (want.params, want.activations), 1e-12)


def test_numpy_arrays_in_double_precision():
    with jax.enable_x64(False):
        grads = parscan.parallel_backward(lambda p, h: jnp.tanh(h * p), jnp.ones((5, 3)), np.ones((6, 3)), jnp.ones(3))
        assert grads.input.dtype == jnp.float32


def test_containers_hold_nothing_but_arrays():
    f = lambda c, x: (Converts(jnp.tanh(c.a + x.a)), c.a)
    grad = lambda scan: jax.grad(lambda a: scan(f, Converts(a), Converts(XS))[1].sum())(START)
    assert_close(grad(lambda *a: parscan.scan(*a, method="tree")), grad(lax.scan), 1e-12)


def test_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        half = jax.grad(lambda h: parscan.scan(lambda h, x: (jnp.tanh(h * x), None), h, XS.astype(jnp.bfloat16), method="tree")[0].sum())(
            START.astype(jnp.bfloat16)
        )
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("method", ["auto", "tree"])
def test_a_function_with_a_state_of_its_own_is_traced_once(method, jitted):
    """As Flax's counters of random numbers: traced a second time it would be another function."""

    def run(scan):
        seen = []

        def f(h, x):
            seen.append(None)
            return jnp.tanh(h + x) * len(seen), h

        call = lambda h: scan(f, h, XS)
        return (jax.jit(call) if jitted else call)(START), len(seen)

    got, want = run(functools.partial(parscan.scan, method=method)), run(lax.scan)
    assert_close(got, want, 1e-14)
    assert got[1] == 1


MIXINGS = {
    "Banded": lambda h: h + 0.3 * jnp.roll(h, 1).at[0].set(0),
    "Sparse": lambda h: h + 0.3 * h[np.arange(24) // 5 * 5],
    "LowRank": lambda h: 0.5 * h + h.mean(),
    "Dense": lambda h: jnp.cos(jnp.outer(jnp.arange(24.0), jnp.arange(24.0))) @ h / 5,
}


@pytest.mark.parametrize("kind", MIXINGS)
def test_no_promotion_of_rank(kind, method="tree"):
    """The setting is for the user's step: parscan's own arrays of maps, vectors and exponents are not its business."""
    f = lambda h, x: (jnp.tanh(MIXINGS[kind](h) + x), h)
    xs = jnp.sin(jnp.arange(24.0 * 7)).reshape(7, 24)
    with jax.numpy_rank_promotion("raise"):
        assert parscan.plan(f, xs[0], xs, method=method).kind == kind
        run = lambda scan: jax.jit(jax.grad(lambda h, xs: jnp.sum(scan(f, h, xs)[1] ** 2), (0, 1)))(xs[0], xs)
        assert_close(run(functools.partial(parscan.scan, method=method)), run(lax.scan), 1e-10)
        layer = lambda x, h: f(h, x)[0]
        grads = parscan.parallel_backward(layer, xs, parscan.forward(layer, xs, xs[0])[1], xs[0], method=method)
        assert grads.input.shape == (24,)
        with pytest.raises(ValueError, match="rank_promotion"):
            run(lambda _, h, xs: parscan.scan(lambda h, x: ((jnp.ones((2, 24)) * h).sum(0), h), h, xs, method=method))


def test_a_length_that_is_an_array():
    f = lambda h, _: (jnp.tanh(h), h)
    assert_close(parscan.scan(f, START, length=jnp.int32(3)), lax.scan(f, START, length=3), 0)


def test_an_integer_that_vmap_does_not_batch():
    f = lambda c, x: ((c[0] + 1, jnp.tanh(c[1] + x)), None)
    run = lambda scan: jax.vmap(lambda h: scan(f, (0, h), jnp.ones((12, 4, 3)))[0], out_axes=(None, 0))(jnp.ones((2, 4, 3)))
    assert_close(run(lambda *a: parscan.scan(*a, method="walk")), run(lax.scan), 1e-12)


@pytest.mark.parametrize("method", ["tree", "lax"])
def test_weakly_typed_cotangents_take_the_activations_dtype(method):
    layer, weights = lambda p, h: jnp.tanh(h @ p), jnp.ones((5, 3, 3), jnp.bfloat16)
    _, activations = parscan.forward(layer, weights, jnp.ones((4, 3), jnp.bfloat16))
    ones = jnp.broadcast_to(1.0, activations.shape)
    grads = parscan.parallel_backward(layer, weights, activations, None, layer_cotangents=ones, method=method)
    assert grads.activations.dtype == jnp.bfloat16


def test_gradients_of_different_plans_have_one_structure():
    layer, weights = lambda p, h: jnp.tanh(h @ p), jnp.ones((12, 3, 3)) / 3
    y, activations = parscan.forward(layer, weights, jnp.ones((4, 3)))
    by = lambda method: parscan.parallel_backward(layer, weights, activations, y, method=method)
    difference = jax.tree.map(jnp.subtract, by("tree"), by("walk"))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(difference)) < 1e-12
    assert lax.cond(True, lambda: by("tree"), lambda: by("walk")).params.shape == weights.shape
