"""Structure: what is proved, what must not be, what is claimed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from support import assert_close, composed, labels_of_blocks, round_through

import parscan

RANDOM = np.random.default_rng(0)
W = jnp.asarray(RANDOM.standard_normal((8, 8)) / 3)
W24 = jnp.asarray(RANDOM.standard_normal((8, 24)) / 3)
EYE = jnp.eye(8)
V = jnp.asarray(RANDOM.standard_normal(8))


def gru(h, x):
    zr, c = jnp.split(h @ W24, [16], axis=-1)
    z, r = jnp.split(jax.nn.sigmoid(zr + x.sum()), 2, axis=-1)
    c = jnp.tanh(x + r * c)
    return z * h + (1 - z) * c


def lstm(state, x):
    c, h = state
    i, f, g = jnp.split(h @ W24 + x.sum(), 3, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return c, jnp.tanh(c) * h


def elementwise_lstm(state, x):
    c, h = state
    c = jax.nn.sigmoid(V * h + x) * c + jnp.tanh(h - x)
    return c, jnp.tanh(c)


def layer_norm(h, x):
    centred = h - h.mean(-1, keepdims=True)
    return h + jnp.tanh(centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)) * V


def dropout(h, x):
    return jnp.tanh(h @ W) * jax.random.bernoulli(jax.random.key(3), 0.5, h.shape)


@jax.custom_jvp
def secretly_mixing(x):
    return jnp.sin(x)


secretly_mixing.defjvp(lambda primals, tangents: (secretly_mixing(*primals), jnp.cos(primals[0]) * tangents[0] + 0.1 * tangents[0][::-1]))

TRIANGLE = jnp.tril(W, -1) + 2 * EYE
PICTURE = jnp.asarray(RANDOM.standard_normal((2, 6, 3)))  # batch, places, channels


def pooled(h):
    return lax.reduce_window(h, -jnp.inf, lax.max, (1, 3), (1, 1), "SAME")


def convolved(h, kernel, groups=1):
    return lax.conv_general_dilated(h, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups)


def over_rows(step, h):
    return lax.map(lambda r: step(r), h)


def carried_beside(h, x):
    return lax.scan(lambda c, r: (c + 1, c * jnp.tanh(r @ W + x)), 0.1, h)[1]


def on_one_device(h):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("one",))
    return lax.with_sharding_constraint(h, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("one")))


BATCH = jnp.asarray(RANDOM.standard_normal((32, 8)))
X = jnp.asarray(RANDOM.standard_normal(8))

FOUND = {
    # name: (step on the state, state, blocks)
    "tanh RNN": (lambda h, x: jnp.tanh(h @ W + x), BATCH, {8: 32}),
    "tanh RNN, batch last": (lambda h, x: jnp.tanh(W @ h + x[:, None]), BATCH.T, {8: 32}),
    "GRU": (gru, BATCH, {8: 32}),
    "LSTM": (lstm, (BATCH, BATCH), {16: 32}),
    "LSTM, batch axes that differ": (lambda s, x: tuple(a.T if i else a for i, a in enumerate(lstm((s[0], s[1].T), x))), (BATCH, BATCH.T), {16: 32}),
    "elementwise LSTM": (elementwise_lstm, (BATCH, BATCH), {2: 256}),
    "elementwise": (lambda h, x: jnp.tanh(V * h + x), BATCH, {1: 256}),
    "no batch": (lambda h, x: jnp.tanh(h @ W + x), V, {8: 1}),
    "heads": (lambda h, x: jnp.tanh(jnp.einsum("bhi,ij->bhj", h, W[:4, :4]) + x[:4]), jnp.ones((5, 3, 4)), {4: 15}),
    "matrix state, columns apart": (lambda h, x: W @ h * x[:, None], jnp.ones((8, 6)), {8: 6}),
    "layer norm": (layer_norm, BATCH, {8: 32}),
    "dropout": (dropout, BATCH, {8: 32}),
    "softmax": (lambda h, x: jax.nn.softmax(h @ W + x, axis=-1), BATCH, {8: 32}),
    "residual with a nested jit": (lambda h, x: h + jax.jit(jnp.tanh)(h @ W), BATCH, {8: 32}),
    "checkpoint": (lambda h, x: jax.checkpoint(lambda h: jnp.tanh(h @ W))(h), BATCH, {8: 32}),
    "cond": (lambda h, x: lax.cond(x.sum() > 0, lambda h: jnp.tanh(h @ W), jnp.sin, h), BATCH, {8: 32}),
    "cond, elementwise both": (lambda h, x: lax.cond(x.sum() > 0, jnp.tanh, jnp.sin, h), BATCH, {1: 256}),
    "inner scan": (lambda h, x: lax.scan(lambda h, _: (jnp.tanh(h @ W), None), h, None, length=3)[0], BATCH, {8: 32}),
    "cumsum along the width": (lambda h, x: jnp.tanh(jnp.cumsum(h, axis=1)), BATCH, {8: 32}),
    "vmap inside": (lambda h, x: jax.vmap(lambda g: jnp.tanh(W @ g + x))(h), BATCH, {8: 32}),
    "gather along the width": (lambda h, x: jnp.tanh(h[:, jnp.array([1, 0, 2, 3, 4, 5, 6, 7])]), BATCH, {1: 192, 2: 32}),
    "update of the first column": (lambda h, x: jnp.tanh(h).at[:, 0].add(h[:, 1]), BATCH, {1: 192, 2: 32}),
    "concatenate along the width": (lambda h, x: jnp.concatenate([jnp.tanh(h[:, 4:]), h[:, :4]], axis=1), BATCH, {2: 128}),
    "identity": (lambda h, x: h, BATCH, {1: 256}),
    "constant": (lambda h, x: jnp.zeros_like(h), BATCH, {1: 256}),
    "reshape inside the width": (lambda h, x: jnp.tanh((h.reshape(32, 2, 4) * 2).reshape(32, 8) @ W), BATCH, {8: 32}),
    "two leaves that do not meet": (lambda s, x: (jnp.tanh(s[0] @ W), jnp.sin(s[1])), (BATCH, BATCH[:, 0]), {1: 32, 8: 32}),
    "map over rows": (lambda h, x: over_rows(lambda r: jnp.tanh(W @ r + x), h), BATCH, {8: 32}),
    "map over rows, elementwise": (lambda h, x: over_rows(lambda r: jnp.tanh(V * r + x), h), BATCH, {1: 256}),
    "map over rows of rows": (lambda h, x: over_rows(lambda m: over_rows(lambda r: jnp.tanh(W @ r), m), h), BATCH[:8].reshape(2, 4, 8), {8: 8}),
    "map over rows, elementwise along the other axis": (lambda h, x: over_rows(lambda m: jnp.tanh(W @ m), h), BATCH.reshape(4, 8, 8), {8: 32}),
    "map over columns": (lambda h, x: over_rows(lambda r: jnp.tanh(W @ r), h.T).T, BATCH.T, {8: 32}),
    "map over rows in reverse": (lambda h, x: lax.scan(lambda _, r: (None, jnp.tanh(W @ r)), None, h, reverse=True)[1], BATCH, {8: 32}),
    "map over rows with an inner loop": (lambda h, x: over_rows(lambda r: lax.fori_loop(0, 3, lambda i, r: jnp.tanh(W @ r), r), h), BATCH, {8: 32}),
    "map over rows with a branch that depends on the row": (
        lambda h, x: over_rows(lambda r: lax.cond(r.sum() > 0, jnp.tanh, lambda r: W @ r, r), h),
        BATCH,
        {8: 32},
    ),
    "map over rows beside a carry": (carried_beside, BATCH, {8: 32}),
    "Fourier transform along the width": (lambda h, x: jnp.fft.ifft(jnp.fft.fft(h, axis=1) * x).real, BATCH, {8: 32}),
    "triangular solve for every row": (lambda h, x: jnp.tanh(jax.scipy.linalg.solve_triangular(TRIANGLE, h.T, lower=True).T), BATCH, {8: 32}),
    "triangular solves, batched": (
        lambda h, x: jax.vmap(lambda r: jax.scipy.linalg.solve_triangular(TRIANGLE + jnp.diag(r**2), r, lower=True))(h),
        BATCH,
        {8: 32},
    ),
    "tridiagonal solve": (lambda h, x: lax.linalg.tridiagonal_solve(V.at[0].set(0) / 9, 2 + V / 9, V.at[-1].set(0) / 9, jnp.sin(h).T).T, BATCH, {8: 32}),
    "linear solve for every row": (lambda h, x: jnp.linalg.solve(TRIANGLE, jnp.sin(h).T).T, BATCH, {8: 32}),
    "Cholesky factors of a batch": (lambda h, x: jnp.linalg.cholesky(h @ h.mT + 5 * jnp.eye(3)), BATCH[:3, :6].reshape(2, 3, 3), {9: 2}),
    "orthogonal factors of a batch": (lambda h, x: jnp.linalg.qr(h + 5 * jnp.eye(3))[0], BATCH[:3, :6].reshape(2, 3, 3), {9: 2}),
    "inverse of a batch": (lambda h, x: jnp.linalg.inv(h + 9 * jnp.eye(3)), BATCH[:3, :6].reshape(2, 3, 3), {9: 2}),
    "largest first": (lambda h, x: jnp.tanh(lax.top_k(h, 8)[0]), BATCH, {8: 32}),
    "max pooling along the width": (lambda h, x: jnp.tanh(pooled(h)), BATCH, {8: 32}),
    "pull-back of max pooling": (lambda h, x: jax.vjp(pooled, BATCH + x)[1](h)[0], BATCH, {8: 32}),
    "convolution": (lambda h, x: convolved(h, W[:, :3].reshape(-1)[:18].reshape(2, 3, 3)), PICTURE, {18: 2}),
    "depthwise convolution": (lambda h, x: convolved(h, W[:2, None, :3], 3), PICTURE, {6: 6}),
    "pointwise convolution": (lambda h, x: convolved(h, W[None, :3, :3]), PICTURE, {3: 12}),
    "first row overwritten": (lambda h, x: lax.dynamic_update_slice(jnp.tanh(V * h), x[None], (0, 0)), BATCH, {1: 256}),
    "sharding constraint": (lambda h, x: on_one_device(jnp.tanh(V * h)), BATCH, {1: 256}),
    "an integer counter beside": (lambda s, x: (jnp.tanh(s[0] @ W) * s[1], s[1] + 1), (BATCH, jnp.int32(1)), {8: 32}),
    "a rule that mixes what its function does not": (lambda h, x: secretly_mixing(h), V, {2: 4}),
    "transpose of a square state": (lambda h, x: jnp.tanh(h.T), W, {1: 8, 2: 28}),
    "the state plus its transpose": (lambda h, x: jnp.tanh(h + h.T), W, {1: 8, 2: 28}),
    "reversal of both axes": (lambda h, x: jnp.tanh(h @ W)[::-1], BATCH, {16: 16}),
    "map over rows, written elsewhere": (lambda h, x: over_rows(lambda r: jnp.tanh(W @ r), h)[::-1], BATCH, {16: 16}),
    "map over rows of rows, axes exchanged": (
        lambda h, x: over_rows(lambda m: over_rows(lambda r: jnp.tanh(W[:4, :4] @ r), m), h.transpose(1, 0, 2)),
        jnp.ones((4, 4, 4)),
        {4: 4, 8: 6},
    ),
}

DENSE = {
    "straight-through round of a product": (lambda h, x: round_through(h @ W), V),
    "straight-through round": (lambda h, x: jnp.tanh(round_through(h) @ W), V),
    "an identity matrix closed over": (lambda h, x: jnp.tanh(h @ jnp.eye(8) + x), V),
    "an identity matrix, as a value": (lambda h, x, eye=EYE: jnp.tanh(h @ eye + x), V),
    "batch statistics": (lambda h, x: jnp.tanh(h - h.mean(0)) @ W, BATCH),
    "roll along the batch and product along the width": (lambda h, x: jnp.roll(jnp.tanh(h @ W), 1, axis=0), BATCH),
    "sort along the batch": (lambda h, x: jnp.sort(h @ W, axis=0), BATCH),
    "running sum over rows": (lambda h, x: lax.scan(lambda c, r: (c + r, jnp.tanh(c @ W)), jnp.zeros(8), h)[1], BATCH),
    "the row before": (lambda h, x: lax.scan(lambda c, r: (r, jnp.tanh(c @ W)), jnp.zeros(8), h)[1], BATCH),
    "map over rows, each with the mean of all": (lambda h, x: over_rows(lambda r: jnp.tanh(W @ r) * h.mean(), h), BATCH),
    "map over rows, written as columns": (lambda h, x: over_rows(lambda r: jnp.tanh(W @ r), h).T, W),
    "outer and inner row at once": (lambda h, x: over_rows(lambda a: over_rows(lambda b: jnp.tanh(a @ W) @ b, h), h), W),
    "Fourier transform along both axes": (lambda h, x: jnp.fft.fft2(h).real, BATCH),
    "max pooling along the batch": (lambda h, x: pooled((h @ W).T).T, BATCH),
    "merged batch, taken apart elsewhere": (lambda h, x: jnp.tanh((h @ W).reshape(8, 32).T), BATCH),
}


def as_f(step):
    return lambda state, x: (step(state, x), None)


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    step, state, blocks = FOUND[name]
    plan = parscan.plan(as_f(step), state, jnp.stack([X, X, X]))
    assert plan.blocks == blocks


@pytest.mark.parametrize("name", DENSE)
def test_not_found_where_it_is_not(name):
    step, state = DENSE[name]
    assert parscan.plan(as_f(step), state, jnp.stack([X, X, X])).blocks == {state.size: 1}


def gradients(scan, step, state, **options):
    xs = jnp.stack([X, 0.5 * X, -X, 0.1 * X, X])

    def loss(state, xs):
        final = scan(as_f(step), state, xs, **options)[0]
        return sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(final) if jnp.issubdtype(leaf.dtype, jnp.floating))

    floats, tree = jax.tree.flatten(state)
    inexact = [jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) for leaf in floats]

    def of_floats(some, xs):
        rest = iter(some)
        return loss(jax.tree.unflatten(tree, [next(rest) if is_float else leaf for leaf, is_float in zip(floats, inexact, strict=True)]), xs)

    return jax.grad(of_floats, (0, 1))([leaf for leaf, is_float in zip(floats, inexact, strict=True) if is_float], xs)


@pytest.mark.parametrize("name", FOUND)
def test_gradients_with_what_was_found(name):
    step, state, _ = FOUND[name]
    assert_close(gradients(parscan.scan, step, state, method="walk"), gradients(lax.scan, step, state), 1e-10)


@pytest.mark.parametrize("name", [name for name in DENSE if "merged" not in name])
def test_gradients_with_one_dense_block(name):
    step, state = DENSE[name]
    small = state[:8] if state.shape == (32, 8) else state
    assert_close(gradients(parscan.scan, step, small, method="walk"), gradients(lax.scan, step, small), 1e-10)


# --- claims -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "claim, blocks",
    [
        ("dense", {256: 1}),
        (parscan.Blocks(axis=0), {8: 32}),
        (parscan.Blocks(axis=-2), {8: 32}),
        (parscan.Blocks(size=8), {8: 32}),
        (parscan.Blocks(size=16), {16: 16}),
    ],
)
def test_claims(claim, blocks):
    step, state, _ = FOUND["GRU"]
    xs = jnp.stack([X, X])
    assert parscan.plan(as_f(step), state, xs, structure=claim).blocks == blocks
    if blocks != {256: 1}:
        assert_close(gradients(parscan.scan, step, state, method="tree", structure=claim), gradients(lax.scan, step, state), 1e-10)


def test_a_claim_may_straddle_leaves():
    step = lambda s, x: (jnp.tanh(s[0] + 2 * s[1]), jnp.sin(s[1] - s[0]))
    state = (V[:4], V[4:])
    assert parscan.plan(as_f(step), state, jnp.stack([X]), structure=parscan.Blocks(size=8)).blocks == {8: 1}
    assert_close(gradients(parscan.scan, step, state, method="tree", structure=parscan.Blocks(size=8)), gradients(lax.scan, step, state), 1e-10)


def test_a_wrong_claim_is_taken_at_its_word():
    step, state = FOUND["no batch"][:2]
    got = gradients(parscan.scan, step, state, method=parscan.Tree(guard=False), structure="diagonal")  # with it, it happens to be noticed
    want = gradients(lax.scan, step, state)
    assert not np.allclose(got[1][0], want[1][0], rtol=1e-3)


# --- no missed dependency --------------------------------------------------------------------------------------------------------

UNARY = [
    jnp.tanh,
    jnp.sin,
    lambda a: a * a,
    lambda a: -a,
    lambda a: jax.nn.softmax(a, axis=-1),
    lambda a: jnp.cumsum(a, axis=0),
    lambda a: a[::-1],
    lambda a: jnp.roll(a, 1, axis=1),
    lambda a: a - a.mean(0),
    lambda a: a - a.mean(1, keepdims=True),
    lambda a: a @ W[:4, :4],
    lambda a: W[:3, :3] @ a,
    lambda a: a.at[:, 0].multiply(2.0),
    lambda a: jnp.sort(a, axis=1),
    lambda a: a.reshape(3, 2, 2).sum(2).repeat(2, axis=1),
    lambda a: a.reshape(4, 3).T,
    lambda a: jnp.where(a > 0, a, 0.1 * a),
    lambda a: a[:, ::-1],
    lambda a: a[jnp.array([2, 0, 1])],
    lambda a: jnp.pad(a, ((0, 0), (1, 0)))[:, :-1],
    lambda a: lax.cond(a.sum() > 0, jnp.tanh, lambda b: b[::-1], a),
    lambda a: round_through(a) + a,
    lambda a: lax.scan(lambda c, r: (c + r, c), jnp.zeros(4), a)[1],
    lambda a: jax.vmap(jnp.outer)(a, a).sum(1),
    lambda a: jnp.maximum(a, a.max(1, keepdims=True) * 0.5),
    lambda a: jnp.sqrt((a**2).sum(1, keepdims=True) + 1) * a,
    lambda a: over_rows(lambda r: W[:4, :4] @ r, a),
    lambda a: over_rows(lambda r: r * a[0], a),
    lambda a: over_rows(lambda r: over_rows(lambda e: jnp.sin(e) + r[0], r), a),
    lambda a: lax.scan(lambda c, r: (r, r + c), jnp.zeros(4), a, reverse=True)[1],
    lambda a: lax.scan(lambda c, r: (c + 1, r * c), 1.0, a)[1],
    lambda a: over_rows(lambda r: W[:3, :3] @ r, a.T).T,
    lambda a: jnp.fft.fft(a, axis=1).real,
    lambda a: jnp.fft.fft(a, axis=0).imag,
    lambda a: jax.scipy.linalg.solve_triangular(TRIANGLE[:3, :3], a, lower=True),
    lambda a: lax.dynamic_update_slice(a, a[1:2] * 2, (0, 0)),
    lambda a: lax.dynamic_update_slice(a, jnp.zeros((1, 2)), (1, 1)),
    lambda a: lax.top_k(a, 4)[0],
    pooled,
    lambda a: convolved(a[None], W[:2, None, :4], 4)[0],
    lambda a: convolved(a[:, :, None], W[:2, 0, None, None])[:, :, 0],
]
BINARY = [jnp.add, jnp.multiply, lambda a, b: a * b.mean(0), lambda a, b: jnp.where(b > 0, a, b), lambda a, b: jnp.concatenate([a[:, :2], b[:, 2:]], 1)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(UNARY) - 1), st.integers(0, len(BINARY) - 1), st.integers(0, 5)), min_size=1, max_size=5), st.integers(0, 2**31 - 1)
)
def test_nothing_outside_the_blocks(program, seed):
    """Random programs: every non-zero of the Jacobian lies inside a block of the proved layout."""
    from parscan.jaxprs import Flat, trace
    from parscan.structure import structures_of

    step = composed(program, UNARY, BINARY)
    h = jnp.asarray(np.random.default_rng(seed).standard_normal((3, 4)))
    traced, _, _ = trace(lambda _, h, x: step(h), Flat.of(()), Flat.of(h), Flat.of(()))
    layout = structures_of([(traced, True)], None)[0].before
    order = layout.order()
    jacobian = np.asarray(jax.jacobian(step)(h)).reshape(12, 12)[order][:, order]
    block = labels_of_blocks(layout)
    assert np.all(jacobian[block[:, None] != block[None, :]] == 0)
