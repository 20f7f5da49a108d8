"""Dependences element by element: every rule beside Jacobians, what joins what, limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracle import derivative

from parscan.jaxprs import components, pattern
from parscan.jaxprs.elements import _analysed
from parscan.jaxprs.nodes import Graph, labels, reachability

LIMIT = 10**6
RANDOM = np.random.default_rng(0)
A, B = (RANDOM.standard_normal(shape) for shape in ((3, 4), (2, 3, 4)))
V = RANDOM.standard_normal(6)
W4, W6, K = (jnp.asarray(RANDOM.standard_normal(shape)) for shape in ((4, 4), (6, 6), (2, 4, 3)))
UPPER = jnp.eye(3) + jnp.triu(jnp.ones((3, 3)))
ROWS, COLUMNS = np.array([2, 0, 2]), np.array([1, -1, 3])
ONES = jnp.array([1, 1])


def shown(f, state, rest, points=40):
    """Where the Jacobian is non-zero at any of many points; `rest` draws the further arguments."""
    random, found = np.random.default_rng(1), False
    of_state = jax.jit(jax.jacfwd(lambda state, rest: [f(*state, *rest)]))
    for _ in range(points):
        point = [jnp.asarray(random.standard_normal(np.shape(h))) for h in state]
        (row,) = of_state(point, rest(random))
        one = np.concatenate([np.reshape(x, (np.size(x) // h.size if h.size else len(row[-1]), h.size)) for x, h in zip(row, point, strict=True)], 1)
        found = found | (one != 0)
    return found


def proved(f, state, rest=()):
    closed = derivative(lambda state, *rest: [f(*state, *rest)], state, *rest)
    return closed, pattern(closed, range(len(state)), {}, LIMIT).toarray()


def nothing(random):
    return []


def whole(*bounds):
    """Unknown whole numbers: (shape, low, high) of each."""
    return lambda random: [jnp.asarray(random.integers(low, high, shape)) for shape, low, high in bounds]


@jax.custom_jvp
def crossed(x):
    return jnp.sin(x)


crossed.defjvp(lambda primals, tangents: (crossed(*primals), tangents[0][..., ::-1]))


def pool(kind, init, *window):
    return lambda h: lax.reduce_window(h, np.asarray(init, h.dtype), kind, *window)


def conv(x, w, **options):
    return lax.conv_general_dilated(x, w, **{"window_strides": (1,), "padding": "VALID"} | options)


def max_pool_gradient(h, w):
    def pooled(w):
        return lax.reduce_window(w, -jnp.inf, lax.max, (1, 2), (1, 2), ((0, 0), (1, 1)))

    return jax.vjp(pooled, w)[1](h[:, :3])[0]


def triangular(h, **options):
    return lax.linalg.triangular_solve(W4, h, **options)


def newton(h):
    return lax.custom_linear_solve(lambda x: UPPER @ x, h, lambda matvec, b: jnp.linalg.solve(UPPER, b), lambda vecmat, b: jnp.linalg.solve(UPPER.T, b))


def newton_with_residual(h):
    def solved(matvec, b):
        x = jnp.linalg.solve(UPPER, b)
        return x, {"residual": matvec(x)}

    return lax.custom_linear_solve(lambda x: UPPER @ x, h, solved, solved, symmetric=True, has_aux=True)[0]


def write(x, index, update, **options):
    return x.at[index].set(update, **options)


EXACT = {
    # name: (function, states[, further unknown arguments])
    "elementwise": (lambda h: jnp.tanh(h) * h + 2.0 * h, [A]),
    "two states": (lambda h, g: h * g[:3, None] - h, [A, V]),
    "nothing": (lambda h: jnp.zeros(3) + lax.stop_gradient(h[:, 0]), [A]),
    "scalar state": (lambda h: jnp.stack([h, 2.0 * h]) + 1.0, [np.float64(1)]),
    "empty state": (lambda h, g: jnp.concatenate([h.sum(0), g, g]), [np.zeros((0, 3)), V]),
    "broadcast": (lambda h: jnp.broadcast_to(h[:, None], (3, 2, 4)), [A]),
    "reshape": (lambda h: h.reshape(4, 3).T.reshape(2, 6), [A]),
    "reshape in another order": (lambda h: lax.reshape(h, (4, 3), (1, 0)), [A]),
    "transpose, squeeze, expand": (lambda h: jnp.expand_dims(h, 1).transpose(2, 1, 0).squeeze(1), [A]),
    "rev": (lambda h: h[::-1, ::-1] + h, [A]),
    "slice with strides": (lambda h: h[1:, ::2], [A]),
    "concatenate": (lambda h, g: jnp.concatenate([h[0], g, jnp.ones(2), h[1]]), [A, V]),
    "pad": (lambda h: lax.pad(h, 0.0, [(1, -1, 2), (-1, 2, 0)]), [A]),
    "pad with the state": (lambda h: lax.pad(h, h[0, 0], [(1, 0, 0), (0, 0, 1)]), [A]),
    "split": (lambda h: jnp.split(h, [1, 3], axis=1)[1], [A]),
    "stack, unstack, tile": (lambda h: jnp.tile(jnp.stack(jnp.unstack(h, axis=1)[::-1], 0), (2, 1)), [A]),
    "roll": (lambda h: jnp.roll(h, 2, axis=1) + jnp.roll(h, -1, axis=0), [A]),
    "triu": (lambda h: jnp.triu(h, 1), [A]),
    "where, known": (lambda h: jnp.where(np.arange(4) < 2, h, 2.0 * h[::-1]), [A]),
    "where, known number": (lambda h: lax.select_n(np.array([0, 2, 1]), h[:, 0], h[:, 1], h[:, 2]), [A]),
    "where, unknown": (lambda h, p: jnp.where(p > 0, h, h[::-1]), [A], whole(((3, 4), 0, 2))),
    "where, by the state": (lambda h: jnp.where(h > 0, h, 0.0), [A]),
    "maximum": (lambda h: jnp.maximum(h, h[::-1]), [A]),
    "clip": (lambda h: jnp.clip(h, -1, 1), [A]),
    "sum": (lambda h: h.sum(1) + h.sum(), [A]),
    "sum over nothing": (lambda h: lax.reduce_sum(h, ()), [A]),
    "max": (lambda h: h.max(0), [A]),
    "prod": (lambda h: h.prod(1), [A]),
    "softmax": (lambda h: jax.nn.softmax(h, axis=0), [A]),
    "cumsum": (lambda h: jnp.cumsum(h, 1), [A]),
    "cumsum, reversed": (lambda h: lax.cumsum(jnp.where(np.arange(4) == 1, h, 0.0), axis=1, reverse=True), [A]),
    "cumprod": (lambda h: jnp.cumprod(h, 0), [A]),
    "cummax, cumlogsumexp": (lambda h: lax.cummax(h, axis=1) + lax.cumlogsumexp(h, axis=1), [A]),
    "matrix product": (lambda h: h @ W4, [A]),
    "matrix product from the left": (lambda h: W4 @ h.T, [A]),
    "batched product": (lambda h: jnp.einsum("bij,bjk->bik", h, h.transpose(0, 2, 1)), [B]),
    "product of two parts": (lambda h: h[:, :2].T @ h[:, 2:], [A]),
    "gather, known": (lambda h: h[ROWS], [A]),
    "gather, known pairs": (lambda h: h[ROWS, COLUMNS], [A]),
    "gather along": (lambda h: jnp.take_along_axis(h, np.array([[0], [-1], [2]]), 1), [A]),
    "gather, windows": (lambda h: jax.vmap(lambda i: lax.dynamic_slice(h, (i, 1), (2, 2)))(np.array([0, 1, 5])), [A]),
    "gather, filled": (lambda h: jnp.take(h, np.array([0, 7, -2, -9]), axis=1, mode="fill", fill_value=0.0), [A]),
    "gather, clipped": (lambda h: jnp.take(h, np.array([0, 7, -9]), axis=1, mode="clip"), [A]),
    "gather, far outside": (lambda h: jnp.take(h, np.array([0, 2**64 - 1], np.uint64), axis=1, mode="clip"), [A]),
    "gather, wrapped": (lambda h: jnp.take(h, np.array([0, 7, -9]), axis=1, mode="wrap"), [A]),
    "gather, in bounds": (lambda h: h.at[:, np.array([3, 1])].get(mode="promise_in_bounds"), [A]),
    "gather, unknown": (lambda h, i: h[:, i], [A], whole(((2,), 0, 4))),
    "gather, unknown within rows": (lambda h, i: jnp.take_along_axis(h, i, 1), [A], whole(((3, 2), 0, 4))),
    "gather, unknown column of each row": (lambda h, i: h[jnp.arange(3), i], [A], whole(((3,), 0, 4))),
    "gather, unknown row, known column": (lambda h, i: h[i, COLUMNS], [A], whole(((3,), 0, 3))),
    "gather under vmap": (lambda h, i: jax.vmap(lambda row, k: row[k])(h, i), [A], whole(((3,), 0, 4))),
    "computed indices": (lambda h: h[:, (jnp.arange(4) * 3 + 1) % 4 // 2], [A]),
    "sorted indices": (lambda h: h[:, jnp.argsort(np.array([3, 1, 0, 2]))], [A]),
    "scatter, set": (lambda h: write(h, np.array([2, 0]), 3.0 * h[1]), [A]),
    "scatter, set twice": (lambda h: write(h[0], np.array([1, 1]), h[:2, 3]), [A]),
    "scatter, pairs": (lambda h: write(h, (np.array([0, 1]), np.array([-1, 2])), h[2, :2]), [A]),
    "scatter, dropped": (lambda h: write(h, (slice(None), np.array([1, 9])), h[:, 2:]), [A]),
    "scatter, clipped": (lambda h: write(h, (slice(None), np.array([1, 9])), h[:, :2], mode="clip"), [A]),
    "scatter, add": (lambda h: h.at[np.array([0, 0, 2])].add(h[::-1]), [A]),
    "scatter, subtract": (lambda h: h.at[:, np.array([0, 2])].subtract(h[:, 2:]), [A]),
    "scatter, multiply": (lambda h: h.at[np.array([0, 2])].multiply(h[1:], unique_indices=True), [A]),
    "scatter, unknown": (lambda h, i: h.at[:, i].set(h[:, 0]), [A], whole(((), 0, 4))),
    "scatter, unknown column of each row": (lambda h, i: h.at[jnp.arange(3), i].add(h[:, 0]), [A], whole(((3,), 0, 4))),
    "segment sum": (lambda h: jax.ops.segment_sum(h, np.array([1, 0, 1]), 2), [A]),
    "dynamic slice, known": (lambda h: lax.dynamic_slice(h, (1, 9), (2, 3)), [A]),
    "dynamic slice, one start unknown": (lambda h, i: lax.dynamic_slice(h, (1, i), (2, 1)), [A], whole(((), 0, 4))),
    "dynamic update, known": (lambda h: lax.dynamic_update_slice(h, h[:2, 2:], (-1, 9)), [A]),
    "dynamic update, one start unknown": (lambda h, i: lax.dynamic_update_slice(h, h[:2, :1], (1, i)), [A], whole(((), 0, 4))),
    "sort": (lambda h: jnp.sort(h, 0), [A]),
    "sort by a key": (lambda h, k: lax.sort((k, h), num_keys=1)[1], [A], whole(((3, 4), 0, 99))),
    "top_k": (lambda h: lax.top_k(h, 2)[0], [A]),
    "maximal entry": (lambda h: jnp.take_along_axis(h, h.argmax(1, keepdims=True), 1), [A]),
    "sum of windows": (pool(lax.add, 0, (1, 2), (1, 2), ((0, 0), (1, 2)), (1, 2), (1, 3)), [A]),
    "max of windows": (pool(lax.max, -np.inf, (2, 2), (1, 2), "SAME"), [A]),
    "min of windows": (pool(lax.min, np.inf, (1, 3), (1, 1), ((1, 0), (0, 0))), [A]),
    "transposed max of windows": (max_pool_gradient, [A], lambda random: [jnp.asarray(random.standard_normal((3, 4)))]),
    "convolution": (lambda h: conv(h[None], K), [A.T]),
    "convolution, strides": (lambda h: conv(h, K, window_strides=(2,), padding=[(2, 1)], lhs_dilation=(2,), rhs_dilation=(2,)), [np.ones((2, 4, 5))]),
    "convolution, cut": (lambda h: conv(h[None], K, padding=[(-1, 1)]), [np.ones((4, 6))]),
    "convolution, feature groups": (lambda h: conv(h[None], jnp.ones((8, 2, 3)), feature_group_count=2), [np.ones((4, 5))]),
    "convolution, depthwise": (lambda h: conv(h, jnp.ones((3, 1, 2)), feature_group_count=3), [np.ones((2, 3, 4))]),
    "convolution, batch groups": (lambda h: conv(h, jnp.ones((6, 2, 2)), batch_group_count=2), [np.ones((4, 2, 3))]),
    "convolution, other order": (lambda h: conv(h, jnp.ones((2, 3, 2)), dimension_numbers=("NHC", "HIO", "HNC")), [np.ones((2, 4, 3))]),
    "convolution in 2-D": (lambda h: conv(h[None, None], jnp.ones((1, 1, 2, 3)), window_strides=(1, 2), padding="SAME"), [A]),
    "convolution, kernel": (lambda h: conv(jnp.ones((2, 2, 3)), h[:, None][:, [0, 0]], window_strides=(2,), padding=[(3, 2)]), [A]),
    "convolution, grouped kernel": (lambda h: conv(jnp.ones((1, 4, 5)), h.reshape(6, 2, 1), feature_group_count=2), [A]),
    "convolution, both": (lambda h: conv(h[None], h[None, :, :2]), [A]),
    "triangular solves, matrix left": (lambda h: triangular(triangular(h.T, left_side=True), left_side=True, lower=True), [A]),
    "triangular solves, matrix right": (lambda h: triangular(triangular(h), lower=True), [A]),
    "solve": (lambda h: jnp.linalg.solve(W4, h.T), [A]),
    "solve, batched": (lambda h: jax.vmap(lambda row: jnp.linalg.solve(W4, row))(h), [A]),
    "cholesky, batched": (
        lambda h: jnp.tril(jnp.ones((4, 4))) + jnp.linalg.cholesky(jnp.eye(4) * (h[:, :, None] ** 2 + 1) + h.mean(1)[:, None, None] ** 2),
        [A],
    ),
    "fft": (lambda h: jnp.abs(jnp.fft.fft(h) + 3), [A]),
    "complex": (lambda h: (h.astype(complex) * (1 + 2j)).imag, [A]),
    "reduced precision": (lambda h: lax.reduce_precision(h, 8, 10).astype("float32").astype(float), [A]),
    "optimization barrier": (lambda h, g: lax.optimization_barrier((h, g))[1], [A, V]),
    "cond": (lambda h, i: lax.cond(i > 0, lambda h: h[::-1], lambda h: jnp.sin(h), h), [A], whole(((), 0, 2))),
    "cond by the state": (lambda h: lax.cond(h[0, 0] > 0, lambda h: h.T.reshape(3, 4), jnp.sin, h), [A]),
    "switch, known": (lambda h: lax.switch(jnp.int32(7), [lambda h: h @ W4, jnp.sin], h), [A]),
    "scan, trip by trip": (lambda h: lax.scan(lambda c, x: (c + x, c * x), jnp.ones(4), h)[1], [A]),
    "scan, reversed": (lambda h: lax.scan(lambda c, x: (c + x, c * x), jnp.ones(4), h, reverse=True)[1], [A]),
    "scan over nothing": (lambda h: lax.scan(lambda c, _: (c @ W4, c), h, None, length=0)[0], [A]),
    "fori, counted": (lambda h: lax.fori_loop(0, 2, lambda i, h: h.at[:, i].set(h[:, i + 1] * h[:, 3]), h), [A]),
    "map": (lambda h: lax.map(lambda x: x[::-1], h), [A]),
    "map, long": (lambda h: lax.map(lambda x: jnp.cumsum(jnp.sin(x) * h[0]), jnp.broadcast_to(h[:, None], (3, 900, 4)).reshape(-1, 4)), [A]),
    "while": (lambda h, n: lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, jnp.roll(s[1], 1, 1)), (0, h))[1], [A], whole(((), 0, 4))),
    "while, a constant index": (
        lambda h, n: lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1], s[2].at[s[1]].set(s[2][2])), (0, 1, h))[2],
        [A],
        whole(((), 0, 2)),
    ),
    "custom_jvp": (lambda h: crossed(h), [A]),
    "checkpoint in jit": (lambda h: jax.jit(jax.checkpoint(lambda h: jnp.sin(h[:, ::-1])))(h), [A]),
    "vmap": (lambda h: jax.vmap(lambda row: row[np.array([1, 0])])(h), [A]),
    "a gradient inside": (lambda h: jax.grad(lambda g: (g[:, 0] * g[:, 1] ** 2).sum())(h), [A]),
}

COVERED = {  # where more is allowed for than ever shows
    "triangular solve": (lambda h: lax.linalg.triangular_solve(W4, h.T, left_side=True), [A]),
    "triangular solve from the right": (lambda h: lax.linalg.triangular_solve(W4, h), [A]),
    "random mask of an old key": (lambda h: jnp.where(jax.random.bits(jax.random.PRNGKey(1), (3, 4)) > 0, h, h[::-1]), [A]),
    "scatter, a window anywhere": (lambda h, i: jax.vmap(lambda r, k: lax.dynamic_update_slice(r, r[2:], (k,)))(h, i), [A], whole(((3,), 0, 3))),
    "dynamic slice, unknown": (lambda h, i: lax.dynamic_slice(h, (0, i), (3, 2)), [A], whole(((), 0, 4))),
    "dynamic slice, by the state": (lambda h: lax.dynamic_slice(h, (0, jnp.argmax(h[0])), (3, 2)), [A]),
    "gather by the state": (lambda h: h[jnp.argmax(h[:, 0])], [A]),
    "scatter by the state": (lambda h: h.at[jnp.argmax(h[:, 0])].set(h[0]), [A]),
    "window where the state says": (lambda h: lax.dynamic_update_slice(h, h[:2, :2], (jnp.argmax(h[:, 0]), 0)), [A]),
    "scan, all trips as one": (lambda h: lax.scan(lambda c, x: (jnp.sin(c) + x, c * x), jnp.zeros(4), jnp.tile(h, (900, 1)))[1][:5], [A]),
    "while by the state": (lambda h: lax.while_loop(lambda s: s[0, 0] < 0, lambda s: jnp.abs(s).at[0].set(s[1] + 1), h), [A]),
    "linear solve": (newton, [A[:, 0]]),
    "linear solve with more to say": (newton_with_residual, [A[0, :3]]),
    "eigenvalues": (lambda h: jnp.linalg.eigvalsh(h @ h.transpose(0, 2, 1)), [B]),
    "associative scan": (lambda h: lax.associative_scan(jnp.add, h, axis=1), [A]),
    "product with zeros": (lambda h: h @ jnp.eye(4), [A]),
    "general reduction": (lambda h: lax.reduce(h, 0.0, lambda a, b: a + b + a * b, (1,)), [A]),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    f, state, *rest = EXACT[name]
    draw = rest[0] if rest else nothing
    closed, found = proved(f, state, draw(np.random.default_rng(0)))
    np.testing.assert_array_equal(found, shown(f, state, draw))
    agree(closed, len(state), found)


@pytest.mark.parametrize("name", COVERED)
def test_covered(name):
    f, state, *rest = COVERED[name]
    draw = rest[0] if rest else nothing
    closed, found = proved(f, state, draw(np.random.default_rng(0)))
    assert not (shown(f, state, draw) & ~found).any()
    agree(closed, len(state), found)


def agree(closed, leaves, found):
    """Labels are the components of the pattern, its entries being joined one by one."""
    tangents, outputs = components(closed, range(leaves), {}, LIMIT)
    parent = list(range(len(tangents) + len(outputs)))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for new, old in zip(*np.nonzero(found), strict=True):
        parent[root(len(tangents) + new)] = root(old)
    pairs = set(zip([*tangents, *outputs], map(root, range(len(parent))), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_known_inputs_are_followed_by_value():
    closed = derivative(lambda state, i: [state[0][i]], [A[0]], jnp.array([2, 0]))
    assert pattern(closed, [0], {}, LIMIT).sum() == 8
    np.testing.assert_array_equal(pattern(closed, [0], {2: np.array([2, 0])}, LIMIT).toarray(), np.eye(4)[[2, 0]])
    assert len(set(components(closed, [0], {2: np.array([2, 0])}, LIMIT)[0])) == 4


def test_indices_known_in_part_go_through_a_scan():
    def f(h, i):
        pairs = jnp.stack([jnp.broadcast_to(jnp.arange(3), (2, 3)), i], -1)
        return lax.scan(lambda c, pair: (c, h[pair[:, 0], pair[:, 1]]), None, pairs)[1]

    draw = whole(((2, 3), 0, 4))
    found = proved(f, [A], draw(np.random.default_rng(0)))[1]
    assert not (shown(f, [A], draw) & ~found).any()


def test_while_something_else_is_traced():
    found = []

    @jax.jit
    def outer(i):
        for indices in (np.argsort([2, 0, 1]), ONES, i):
            closed = derivative(lambda state, indices=indices: [state[0][jnp.sort(jnp.asarray(indices)) // 2 * 2]], [A[0]])
            found.append(pattern(closed, [0], {}, LIMIT).toarray())
        return i

    jax.vmap(outer)(jnp.zeros((3, 2), int))
    np.testing.assert_array_equal(found[0], np.eye(4)[[0, 0, 2]])
    np.testing.assert_array_equal(found[1], np.eye(4)[[0, 0]])
    assert found[2].all()  # a tracer


def test_float_constants_are_unknown():
    assert proved(lambda h: h @ jnp.eye(4), [A[0]])[1].all()
    assert proved(lambda h, w: h @ w, [A[0]], [jnp.eye(4)])[1].all()


def test_what_nobody_reads_joins_nothing():
    closed, found = proved(lambda h: jnp.stack([h.sum(), h[0, 0], h[1, 0]])[1:], [A])
    tangents, outputs = components(closed, [0], {}, LIMIT)
    assert found.sum() == 2 and len(set(tangents)) == 12
    np.testing.assert_array_equal(outputs, tangents[[0, 4]])


@jax.custom_jvp
def called_back(x):
    return x


called_back.defjvp(lambda primals, tangents: (primals[0], jax.pure_callback(np.flip, tangents[0], tangents[0])))


def test_an_unknown_primitive_mixes_everything():
    found = proved(lambda h, g: called_back(h) + g[:3], [A[0, :3], V])[1]
    assert found[:, :3].all()
    np.testing.assert_array_equal(found[:, 3:], np.eye(6)[:3])


def test_nothing_depends_on_nothing():
    closed = derivative(lambda state: [state[0], jnp.ones(2)], [np.zeros((0, 3))])
    assert pattern(closed, [0], {}, LIMIT).shape == (2, 0)
    tangents, outputs = components(closed, [0], {}, LIMIT)
    assert tangents.shape == (0,) and len(set(outputs)) == 2


def test_limits():
    closed, _ = proved(lambda h: (2.0 * h).sum(1) @ jnp.ones((3, 3)), [A])
    elements = 12 + 12 + 3 + 3  # the tangents, their doubles, the sums, the product
    assert components(closed, [0], {}, elements) is not None
    assert components(closed, [0], {}, elements - 1) is None
    assert pattern(closed, [0], {}, 36) is not None
    assert pattern(closed, [0], {}, 35) is None  # 3 outputs on 12 tangents
    assert pattern(closed, [0], {}, elements - 1) is None


def test_windows_count_as_dependences():
    closed, _ = proved(pool(lax.add, 0, (40,), (1,), "VALID"), [np.ones(100)])
    assert components(closed, [0], {}, 200) is None
    assert components(closed, [0], {}, 400) is not None


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="before mutable references")
def test_mutable_references_are_given_up():
    def f(h):
        ref = jax.new_ref(h)
        ref[0] = h[1]
        return ref[...]

    closed = derivative(lambda state: [f(*state)], [A])
    assert components(closed, [0], {}, LIMIT) is None and pattern(closed, [0], {}, LIMIT) is None


def test_the_graph_of_a_gru_is_linear_in_its_elements():
    def gru(h):
        zr, c = jnp.split(h @ jnp.ones((128, 384)), [256], axis=-1)
        z, r = jnp.split(jax.nn.sigmoid(zr), 2, axis=-1)
        c = jnp.tanh(r * c)
        return z * h + (1 - z) * c

    closed = derivative(lambda state: [gru(*state)], [np.ones((32, 128))])
    graph, tangents, outputs = _analysed(closed, [0], {}, LIMIT)
    assert tangents == outputs.size == 4096
    assert graph.count < 4 * 4096 and len(graph.edges()[0]) < 6 * 4096  # not the 524,288 entries of the Jacobian
    assert sorted(np.unique(labels(graph, tangents, outputs)[1], return_counts=True)[1]) == [128] * 32
    assert reachability(graph, tangents, outputs, LIMIT).nnz == 32 * 128 * 128


def test_a_cycle_depends_on_what_leads_into_it():
    graph = Graph(100)
    tangents, ring, after = graph.fresh((3,)), graph.fresh((4,)), graph.fresh((2,))
    graph.connect(np.array([tangents[0], tangents[1]]), np.array([ring[0], ring[2]]))
    graph.connect(ring, np.roll(ring, 1))
    graph.connect(np.array([ring[3], tangents[2]]), after)
    outputs = np.array([ring[1], after[0], after[1], 0, after[0]])
    np.testing.assert_array_equal(reachability(graph, 3, outputs, 100).toarray(), np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0]]))
    old, new = labels(graph, 3, outputs)
    assert old[0] == old[1] == new[0] == new[1] == new[4] and old[2] == new[2] and len({*old, *new}) == 3


# --- beside another analysis ---------------------------------------------------------------------------------------------------

# Functions whose derivative has the pattern that `asdex` finds in the function itself.
ALIKE = {
    "elementwise": (lambda h: jnp.tanh(h) * 2.0, A),
    "neighbours": (lambda h: h[1:] * h[:-1] - jnp.sin(h[1:]), V),
    "roll": (lambda h: h * jnp.roll(h, 1, axis=1), A),
    "rows": (lambda h: h - jnp.exp(h).sum(1, keepdims=True), A),
    "product": (lambda h: jnp.tanh(h @ W4), A),
    "convolution": (lambda h: conv(h[None], K, padding=[(1, 0)]), A.T),
    "permutation": (lambda h: jnp.concatenate([h[:, 2:], h[:, :2] ** 2], axis=1), A),
    "gather": (lambda h: jnp.cos(h[ROWS, COLUMNS]), A),
    "scatter": (lambda h: h.at[np.array([2, 0])].set(3.0 * h[1]), A),
    "cumulative": (lambda h: jnp.cumsum(h**2, axis=1), A),
    "padded": (lambda h: lax.pad(h, 0.0, [(1, 0, 1), (0, 1, 0)]), A),
    "transposed": (lambda h: jnp.sin(h.reshape(4, 3).T), A),
}


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="asdex 0.5 does not import under JAX 0.12")
@pytest.mark.parametrize("name", ALIKE)
def test_asdex_agrees(name):
    import asdex

    f, h = ALIKE[name]
    np.testing.assert_array_equal(proved(f, [h])[1], asdex.jacobian_sparsity(f, jnp.asarray(h)).todense() != 0)
