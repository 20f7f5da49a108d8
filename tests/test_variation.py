"""Where the blocks of a Jacobian are equal: what is found, and that it is so in numbers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend import core
from support import composed, derivative_of

from parscan.jaxprs import dependence, variation

RANDOM = np.random.default_rng(0)


def some(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape))


W, LAM, X, K = some(4, 4), some(4), some(3, 4), some(4)
POSITIVE = W @ W.T + 4 * jnp.eye(4)
H = some(3, 4)
S = some(4, 6)  # a matrix state


def layer_norm(h):
    centred = h - h.mean(1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)


def delta_rule(s):
    return s - 0.3 * (s @ some(6))[:, None] * jnp.sin(some(6))[None, :]


def convolved(h):
    return lax.conv_general_dilated(h[..., None], W[:3, :1, None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))[..., 0]


@jax.custom_jvp
def odd(x):
    return jnp.sin(x)


@jax.custom_jvp
def even(x):
    return 2 * x


odd.defjvp(lambda primals, tangents: (odd(*primals), 2 * tangents[0]))
even.defjvp(lambda primals, tangents: (even(*primals), primals[0] * tangents[0]))


CASES = {
    # name: (step, state, dimensions of the new state along which its coefficients may vary)
    "linear layer": (lambda h: h @ W, H, {1}),
    "linear layer, bias": (lambda h: h @ W + X, H, {1}),
    "linear layer, batch last": (lambda h: W @ h, H.T, {0}),
    "linear layer with slopes": (lambda h: jnp.tanh(h @ W), H, {0, 1}),
    "residual": (lambda h: h + 0.1 * h @ W, H, {1}),
    "matrix state, columns alike": (lambda s: W @ s, S, {0}),
    "matrix state, from both sides": (lambda s: W @ s @ some(6, 6), S, {0, 1}),
    "delta rule, rows alike": (delta_rule, S, {1}),
    "delta rule, a step size for each row": (lambda s: s - LAM[:, None] * (s @ some(6))[:, None] * some(6)[None], S, {0, 1}),
    "rates": (lambda h: h * LAM, H, {1}),
    "rates of the batch": (lambda h: h * X, H, {0, 1}),
    "one rate": (lambda h: 0.9 * h, H, set()),
    "one rate, an array": (lambda h: h * LAM[0], H, set()),
    "slopes": (jnp.sin, H, {0, 1}),
    "one slope for all": (lambda h: h * jnp.sin(lax.stop_gradient(h).sum()), H, set()),
    "a slope for every column": (lambda h: h * jnp.sin(lax.stop_gradient(h).sum(0)), H, {1}),
    "layer norm": (layer_norm, H, {0, 1}),
    "centred": (lambda h: h - h.mean(1, keepdims=True), H, set()),
    "dropout": (lambda h: h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), H, {0, 1}),
    "dropout, one mask": (lambda h: h * jax.random.bernoulli(jax.random.key(0), 0.5, (4,)), H, {1}),
    "dropout, a key each": (lambda h: jax.vmap(lambda k, r: r * jax.random.bernoulli(k, 0.5, (4,)))(jax.random.split(jax.random.key(0), 3), h), H, {0, 1}),
    "positions": (lambda h: h * jnp.arange(4), H, {1}),
    "positions of the batch": (lambda h: h * jnp.arange(3)[:, None], H, {0}),
    "selected columns": (lambda h: jnp.where(jnp.arange(4) < 2, h, 0.5 * h), H, {1}),
    "selected entries": (lambda h: jnp.where(X > 0, h, 0.5 * h), H, {0, 1}),
    "updated columns": (lambda h: h.at[:, 1].multiply(2), H, {1}),
    "updated row": (lambda h: h.at[1].multiply(2), H, {0}),
    "overwritten row": (lambda h: lax.dynamic_update_slice(h, X[:1], (0, 0)), H, {0}),
    "exchanged columns": (lambda h: h[:, jnp.array([1, 0, 3, 2])], H, {1}),
    "exchanged rows": (lambda h: h[jnp.array([1, 0, 2])], H, {0}),
    "a row chosen, the same for all columns": (lambda h: h[jnp.array([1, 1, 0])], H, {0}),
    "chosen in each row": (lambda h: jnp.take_along_axis(h, jnp.argsort(X, axis=1), axis=1), H, {0, 1}),
    "halves": (lambda h: jnp.concatenate([h[:, 2:], 0.5 * h[:, :2]], axis=1), H, {1}),
    "running sum": (lambda h: jnp.cumsum(h, axis=1), H, {1}),
    "reversed": (lambda h: h[:, ::-1], H, {1}),
    "heads": (lambda h: jnp.einsum("bhi,hij->bhj", h.reshape(3, 2, 2), some(2, 2, 2)).reshape(3, 4), H, {1}),
    "heads alike": (lambda h: jnp.einsum("bhi,ij->bhj", h, W[:2, :2]), some(3, 5, 2), {2}),
    "convolution": (convolved, H, {1}),
    "Fourier transform": (lambda h: (jnp.fft.ifft(jnp.fft.fft(h, axis=1) * jnp.exp(-LAM)) + 0).real, H, {1}),
    "triangular solve": (lambda h: jax.scipy.linalg.solve_triangular(W, h.T).T, H, {1}),
    "linear solve": (lambda h: jnp.linalg.solve(POSITIVE, h.T).T, H, {1}),
    "linear solves, one each": (lambda h: jax.vmap(jnp.linalg.solve)(POSITIVE + X[:, :, None] * X[:, None], h), H, {0, 1}),
    "linear solves, alike": (lambda h: jax.vmap(lambda r: jnp.linalg.solve(POSITIVE, r))(h), H, {1}),
    "vmap": (lambda h: jax.vmap(lambda r: W @ r)(h), H, {1}),
    "map over rows": (lambda h: lax.map(lambda r: W @ r, h), H, {1}),
    "map over rows, a rate each": (lambda h: lax.scan(lambda _, a: (None, a[0] * a[1].sum()), None, (h, X))[1], H, {0}),
    "map over rows, counted": (lambda h: lax.scan(lambda i, r: (i + 1, r * i), 1.0, h)[1], H, {0}),
    "map over rows of rows": (lambda h: lax.map(lambda m: lax.map(lambda r: W @ r, m), h), some(2, 3, 4), {2}),
    "map over rows of rows, a rate for each outer row": (
        lambda h: lax.scan(lambda _, a: (None, lax.map(lambda r: a[1] * (W @ r), a[0])), None, (h, LAM[:2]))[1],
        some(2, 3, 4),
        {0, 2},
    ),
    "jit and checkpoint": (lambda h: jax.jit(jax.checkpoint(lambda h: h @ W))(h), H, {1}),
    "cond": (lambda h: lax.cond(lax.stop_gradient(h).sum() > 0, lambda h: h @ W, lambda h: h, h), H, {1}),
    "cond, one branch of slopes": (lambda h: lax.cond(h.sum() > 0, lambda h: h @ W, jnp.sin, h), H, {0, 1}),
    "inner loop": (lambda h: lax.scan(lambda c, w: (c @ w, None), h, some(5, 4, 4))[0], H, {1}),
    "inner loop, slopes at the end": (lambda h: lax.scan(lambda c, a: (c * a, None), h, some(5, 3, 1))[0], H, {0}),
    "while loop": (lambda h: lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] @ W, c[1] + 1), (h, 0))[0], H, {1}),
    "while loop, a number of trips that depends on the state": (lambda h: lax.fori_loop(0, jnp.sum(h > 0), lambda _, c: c @ W, h), H, {1}),
    "while loops, a number of trips for each row": (
        lambda h: jax.vmap(lambda r: lax.while_loop(lambda c: c[1] < r.sum(), lambda c: (c[0] @ W, c[1] + 1), (r, 0.0))[0])(h),
        H,
        {0, 1},
    ),
    "trips for each row of a map": (lambda h: lax.map(lambda r: lax.fori_loop(0, jnp.sum(r > 0), lambda _, c: c @ W, r), h), H, {0, 1}),
    "branch for each row of a map": (lambda h: lax.map(lambda r: lax.cond(r.sum() > 0, lambda r: r @ W, lambda r: r, r), h), H, {0, 1}),
    "a batch of one": (jnp.sin, some(1, 4), {1}),
    "constant": (lambda h: jnp.zeros((3, 4)), H, set()),
    "a custom rule": (lambda h: odd(h), H, set()),
    "a custom rule with slopes": (lambda h: even(h), H, {0, 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_found(name):
    step, state, varies = CASES[name]
    (found,) = variation(*derivative_of(step, state))
    assert found == varies
    check(step, state)


def test_each_of_two_leaves():
    step = lambda s: (s[0] @ W + s[1], jnp.sin(s[1]))
    assert variation(*derivative_of(step, (H, H))) == [{1}, {0, 1}]


def check(step, state):
    """Blocks in numbers: zero off the diagonal where an axis is kept, equal along it where nothing varies. Returns how many axes are so."""
    closed, tangents = derivative_of(step, state)
    (kept,), (varies,) = dependence(closed, tangents), variation(closed, tangents)
    run = core.jaxpr_as_fun(closed)
    basis = jnp.eye(state.size).reshape(state.size, *state.shape)
    images = jax.vmap(lambda t: run(t, state)[0])(basis)
    jacobian = np.moveaxis(np.asarray(images), 0, -1).reshape(*images.shape[1:], *state.shape)
    scale, rank, alike = 1e-12 * (1 + np.abs(jacobian).max()), images.ndim - 1, 0
    for axis, d in enumerate(kept.get(0, ())):
        if d is None:
            continue
        apart = np.moveaxis(jacobian, (d, rank + axis), (0, 1))
        size = apart.shape[0]
        assert np.all(apart[~np.eye(size, dtype=bool)] == 0)
        if d not in varies:
            blocks = apart[np.arange(size), np.arange(size)]
            assert np.all(np.abs(blocks - blocks[:1]) <= scale)
            alike += size > 1
    return alike


# --- random programs ------------------------------------------------------------------------------------------------------------

A, B, C = some(3, 3), some(4, 4), some(2, 2)


def fixed(*shape):
    """Constants, the same for the same shape."""
    return jnp.asarray(np.random.default_rng(math.prod(shape)).standard_normal(shape))


def along(axis, matrix):
    """A product along one axis of a (3, 4, 2) array."""
    return lambda a: jnp.moveaxis(jnp.tensordot(a, matrix, (axis, 0)), -1, axis)


def mapped(axis, step):
    return lambda a: jnp.moveaxis(lax.map(step, jnp.moveaxis(a, axis, 0)), 0, axis)


def with_rows(step, *rows):
    return lambda a: lax.scan(lambda _, some: (None, step(*some)), None, (a, *rows))[1]


UNARY = [
    along(0, A),
    along(1, B),
    along(2, C),
    jnp.sin,
    odd,
    even,
    lambda a: a * fixed(3, 1, 1),
    lambda a: a * fixed(4, 1),
    lambda a: a * fixed(2),
    lambda a: a * fixed(3, 4, 1),
    lambda a: a * lax.stop_gradient(a).sum((0, 1)),
    lambda a: a * lax.stop_gradient(a).sum((1, 2), keepdims=True),
    lambda a: a - a.mean(0),
    lambda a: a - a.mean((1, 2), keepdims=True),
    lambda a: a * jnp.arange(4)[:, None],
    lambda a: a[::-1],
    lambda a: jnp.roll(a, 1, axis=1),
    lambda a: a[:, :, jnp.array([1, 0])],
    lambda a: a[jnp.arange(3), :, ::-1],
    lambda a: jnp.cumsum(a, axis=1),
    lambda a: jnp.sort(a, axis=1),
    lambda a: a.at[1].multiply(2),
    lambda a: a.at[:, 1:3, 0].add(a[:, :2, 1]),
    lambda a: a.at[jnp.array([0, 2]), :, 1].set(0.5),
    lambda a: lax.dynamic_update_slice(a, 3 * a[:, 1:3], (0, 0, 0)),
    lambda a: lax.dynamic_slice(jnp.concatenate([a, a]), (2, 0, 0), (3, 4, 2)),
    lambda a: jnp.pad(a, ((0, 0), (1, 0), (0, 0)))[:, :-1],
    lambda a: jnp.concatenate([a[:, 2:], 0.5 * a[:, :2]], axis=1),
    lambda a: jnp.concatenate(jnp.split(a, 2, axis=1)[::-1], axis=1),
    lambda a: a.reshape(3, 2, 2, 2).sum(2).repeat(2, axis=1),
    lambda a: a.reshape(12, 2)[::-1].reshape(3, 4, 2),
    lambda a: a.reshape(3, 8)[:, ::-1].reshape(3, 4, 2),
    lambda a: jnp.broadcast_to(a[:, :1], (3, 4, 2)),
    lambda a: jnp.where(fixed(4, 1) > 0, a, 2 * a),
    lambda a: jnp.where(a > 0, a, 0.1 * a),
    lambda a: jnp.stack([a[:, :, 0], 2 * a[:, :, 1]], axis=2),
    lambda a: jnp.stack(jnp.unstack(a, axis=1), axis=1),
    lambda a: jnp.einsum("abc,abcd->abd", a, fixed(3, 4, 2, 2)),
    lambda a: jnp.einsum("abc,bcd->abd", a, fixed(4, 2, 2)),
    lambda a: jnp.einsum("abc,ade->dbc", a, fixed(3, 3, 2)),
    lambda a: jnp.fft.fft(a, axis=2).real,
    jax.vmap(lambda m: jax.scipy.linalg.solve_triangular(B, m)),
    lambda a: jax.vmap(lambda m: jnp.linalg.solve(B, m))(a),
    lambda a: jax.vmap(lambda m, k: jnp.linalg.solve(B + k * jnp.eye(4), m))(a, fixed(3) + 9),
    mapped(0, lambda m: B @ m),
    mapped(1, lambda m: A @ m),
    mapped(2, lambda m: m * m.sum()),
    mapped(0, mapped(0, lambda r: C @ r)),
    mapped(0, lambda m: lax.cond(m.sum() > 0, lambda m: B @ m, lambda m: m, m)),
    mapped(1, lambda m: lax.fori_loop(0, jnp.sum(m > 0), lambda _, m: A @ m, m)),
    with_rows(lambda m, k: k * m, X[:, 0]),
    with_rows(lambda m, k: (B + k * jnp.eye(4)) @ m, X[:, 0]),
    with_rows(lambda m, k: mapped(0, lambda r: k.sum() * r)(m), X),
    lambda a: lax.scan(lambda i, m: (i + 1, i * m), 1.0, a)[1],
    lambda a: lax.scan(lambda c, m: (c + m, c), jnp.zeros((4, 2)), a)[1],
    lambda a: lax.scan(lambda c, k: (c * k, None), a, fixed(3, 1, 4, 1))[0],
    lambda a: lax.scan(lambda c, k: (along(1, k)(c), c[0]), a, fixed(3, 4, 4))[1],
    lambda a: lax.cond(a.sum() > 0, along(1, B), lambda a: 2 * a, a),
    lambda a: lax.while_loop(lambda c: c[1] < 2, lambda c: (along(0, A)(c[0]), c[1] + 1), (a, 0))[0],
    lambda a: jax.vmap(lambda m: lax.while_loop(lambda c: c[1] < 3 * jnp.tanh(m.sum()), lambda c: (2 * c[0], c[1] + 1), (m, 0.0))[0])(a),
    lambda a: jax.jit(jax.checkpoint(along(2, C)))(a),
    lambda a: lax.conv_general_dilated(a, B[:2, None, :2], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2),
    lambda a: lax.conv_general_dilated(a, C[None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
    lambda a: lax.reduce_window(a, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "SAME"),
    lambda a: jax.lax.reduce_window(a, 0.0, lax.add, (1, 1, 2), (1, 1, 1), "SAME"),
]
BINARY = [
    lambda a, b: a,
    jnp.add,
    lambda a, b: a - b.mean(0),
    lambda a, b: a * lax.stop_gradient(b).mean(1, keepdims=True),
    lambda a, b: jnp.where(lax.stop_gradient(b)[:, :1] > 0, a, b),
    lambda a, b: jnp.concatenate([a[:, :2], b[:, 2:]], axis=1),
    lambda a, b: jnp.multiply(a, b),
]


choices = st.tuples(st.integers(0, len(UNARY) - 1), st.integers(0, len(BINARY) - 1), st.integers(0, 5))


@settings(max_examples=25, deadline=None)
@given(st.lists(choices, min_size=1, max_size=4), st.integers(0, 2**31 - 1))
def test_blocks_are_equal_where_nothing_varies(program, seed):
    check(composed(program, UNARY, BINARY), jnp.asarray(np.random.default_rng(seed).standard_normal((3, 4, 2))))


@pytest.mark.parametrize("unary", range(len(UNARY)))
def test_each_operation(unary):
    check(UNARY[unary], jnp.asarray(np.random.default_rng(unary).standard_normal((3, 4, 2))))
