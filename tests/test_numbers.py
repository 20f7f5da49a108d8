"""Long products: never non-finite where the sequential pass is finite, in `jvp` and in `grad`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import LOG_DEPTH, assert_close, equations

import parscan

METHODS = {**LOG_DEPTH, "walk": parscan.Walk()}


def linear(scan, matrices, start, read):
    """Reads the final state of h' = M h + 0 x."""
    final, _ = scan(lambda h, m: (m @ h, None), start, matrices)
    return jnp.vdot(read, final)


def repeated(matrix, times):
    return jnp.broadcast_to(jnp.asarray(matrix, jnp.float32), (times, *np.shape(matrix)))


def alternating(times):
    up, down = np.diag([1e20, 1e-20]), np.diag([1e-20, 1e20])
    return jnp.asarray(np.stack([up if i % 2 == 0 else down for i in range(times)]), jnp.float32)


def expansion(times):
    turns = np.linalg.qr(np.random.default_rng(0).standard_normal((times, 3, 3)))[0]
    return jnp.asarray(2.0 * turns, jnp.float32)


CASES = {
    # matrices, of one shape if possible, since that is one compilation; start or its tangent; what is read at the end
    "growth into one axis, read on the other": (repeated([[16, 1], [0, 1]], 128), (0.0, 0.0), (0.0, 1.0)),
    "growth out of one axis": (repeated([[16, 0], [1, 1]], 128), (0.0, 1.0), (1.0, 1.0)),
    "growth along one axis": (repeated(np.diag([16, 1]), 128), (0.0, 1.0), (0.0, 1.0)),
    "steps of 1e20 and 1e-20": (alternating(128), (1.0, 1.0), (1.0, 1.0)),
    "contraction to nothing": (repeated(np.diag([1e-3, 0.25]), 128), (1.0, 1.0), (1.0, 1.0)),
    "expansion of a tiny vector": (expansion(120), (1e-30, 1e-31, -1e-30), (1e-30, 1e-30, 1e-31)),
    "exactly singular": (repeated([[1, 1], [1, 1]], 30), (1.0, -1.0), (1.0, -1.0)),
    "zero": (repeated(np.zeros((2, 2)), 128), (1.0, 1.0), (1.0, 1.0)),
    "permutation": (repeated(np.roll(np.eye(5), 1, 0), 101), (1.0, 2.0, 3.0, 4.0, 5.0), (1.0, 0.0, 0.0, 0.0, 7.0)),
}


@functools.cache
def compiled(method, mode):
    """Of (matrices, start, read): once for all cases of one shape. `lax.scan` where there is no method."""
    scan = lax.scan if method is None else functools.partial(parscan.scan, method=METHODS[method])
    if mode == "grad":
        return jax.jit(lambda matrices, start, read: jax.grad(lambda s: linear(scan, matrices, s, read))(start))
    push = lambda matrices, start: jax.jvp(lambda s: scan(lambda h, m: (m @ h, None), s, matrices)[0], (jnp.zeros_like(start),), (start,))[1]
    return jax.jit(lambda matrices, start, read: push(matrices, start))


def by(method, name, mode):
    matrices, start, read = CASES[name]
    return compiled(method, mode)(matrices, jnp.asarray(start, jnp.float32), jnp.asarray(read, jnp.float32))


# Cotangents travel through the transposed maps, where this one's growth does reach what is read: infinite sequentially, too.
BOTH = [(name, mode) for name in CASES for mode in ("grad", "jvp") if (name, mode) != ("growth out of one axis", "grad")]


@pytest.mark.parametrize("name, mode", BOTH)
@pytest.mark.parametrize("method", METHODS)
def test_finite_and_equal(method, name, mode):
    want = by(None, name, mode)
    assert np.all(np.isfinite(want)), "a case where the sequential pass itself fails says nothing"
    assert_close(by(method, name, mode), want, 1e-4)


def test_the_gradient_through_growth_is_exact():
    for method in METHODS:
        np.testing.assert_array_equal(by(method, "growth into one axis, read on the other", "grad"), [0.0, 1.0])


@pytest.mark.parametrize("method", METHODS)
def test_parallel_backward_through_growth(method):
    matrices, _, read = CASES["growth into one axis, read on the other"]
    grads = parscan.parallel_backward(lambda m, h: m @ h, matrices, jnp.zeros((129, 2), jnp.float32), jnp.asarray(read, jnp.float32), method=METHODS[method])
    np.testing.assert_array_equal(grads.input, [0.0, 1.0])


@pytest.mark.parametrize("method", METHODS)
def test_linear_scan_through_growth(method):
    matrices, _, read = CASES["growth into one axis, read on the other"]

    def loss(start):
        return jnp.vdot(
            jnp.asarray(read, jnp.float32), parscan.linear_scan(parscan.Dense(matrices), jnp.zeros((128, 2), jnp.float32), start, method=METHODS[method])[-1]
        )

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
pair = lambda a, b: {"a": a, "b": b}
broken = lambda t: jnp.where(t == 50, jnp.nan, 1.0)
LOST = {  # name: (step, start, xs, what is read)
    "growth of the sum, read by the difference": (lambda h, t: (SWAP @ h, None), jnp.asarray([1.0, -1.0]), lambda h, ys: h[0] - h[1]),
    "the same, later": (lambda h, t: (jnp.where(t > 70, SWAP, jnp.eye(2)) @ h, None), jnp.asarray([1.0, -1.0]), lambda h, ys: h[0] - h[1]),
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


@pytest.mark.parametrize("mode", ["grad", "jvp", "grad of vmap"])
@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("method", METHODS)
def test_as_one_step_after_another(method, name, mode):
    got, want = lost(name, METHODS[method], mode), lost(name, None, mode)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6), got, want)


def test_without_its_guard_a_tree_loses_them():
    got, want = (lost("growth of the sum, read by the difference", method, "grad") for method in (parscan.Tree(guard=False), None))
    assert not np.allclose(got, want)


def test_one_branch_under_vmap():
    """A batched answer would compute both branches, always."""
    run = lambda h: parscan.scan(lambda h, _: (SWAP @ h, None), h, None, length=64, method="tree")[0]
    program = jax.make_jaxpr(jax.grad(lambda h: jnp.sum(jax.vmap(jax.vmap(run))(h))))(jnp.ones((3, 2, 2)))
    branches = [eqn for eqn in equations(program) if eqn.primitive.name == "cond"]
    assert branches and all(eqn.invars[0].aval.shape == () for eqn in branches)
