"""Factorisations of a derivative: bottlenecks, with what goes around them, and one matrix an axis."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from parscan.jaxprs import cuts, dependence, masks_nothing, separable

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape))


H, STATE = normal(3, 8), normal(3, 4, 5)  # a batch of 3
DOWN, UP, DOWN2, UP2, FULL = normal(8, 2), normal(2, 8), normal(8, 3), normal(3, 8), normal(8, 8)
KEY, BETA = normal(3, 5), normal(3)


def derivative(f, h, *params):
    """(closed jaxpr of the derivative of f in h, the leaves' tangents first; how many they are; all other inputs)."""
    leaves, tree = jax.tree.flatten(h)

    def run(tangents, leaves, params):
        return jax.tree.leaves(jax.jvp(lambda *some: f(jax.tree.unflatten(tree, some), *params), tuple(leaves), tuple(tangents))[1])

    return jax.make_jaxpr(run)(leaves, leaves, params), len(leaves), [*leaves, *jax.tree.leaves(params)]


def recombined(cut, tangents, others):
    inner, outer, rest = map(core.jaxpr_as_fun, (cut.inner, cut.outer, cut.rest))
    through = inner(*tangents, *others)
    assert [v.shape for v in through] == [aval.shape for aval in cut.avals]
    return list(map(jnp.add, outer(*through, *others), rest(*tangents, *others)))


def found(f, h, *params):
    closed, count, _ = derivative(f, h, *params)
    return list(cuts(closed, range(count)))


def norm(h):
    centred = h - h.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def bottleneck(h, down, up, activation=jnp.tanh):
    return activation(h @ down) @ up


def delta_rule(state, key, beta):
    return state - beta[:, None, None] * jnp.einsum("bvk,bk->bv", state, key)[:, :, None] * key[:, None, :]


def delta_rule_by_sums(state, key, beta):
    return state - beta[:, None, None] * (state * key[:, None, :]).sum(-1, keepdims=True) * key[:, None, :]


def gru(h, w):
    z, r = jax.nn.sigmoid(h @ w), jax.nn.sigmoid(h @ w.T)
    return z * h + (1 - z) * jnp.tanh((r * h) @ w)


def low_rank_gru(h, down, up, down2, up2):
    z = jax.nn.sigmoid(h @ down @ up)
    return z * h + (1 - z) * jnp.tanh(h @ down2 @ up2)


@jax.custom_jvp
def clipped(x):
    return jnp.clip(x, -1, 1)


clipped.defjvp(lambda primals, tangents: (clipped(*primals), jnp.where(primals[0] > 0, tangents[0], 0.5 * tangents[0])))

CUTS = {
    # name: (step, state, params, total number of coordinates in the cut)
    "residual bottleneck": (lambda h, a, b: h + bottleneck(h, a, b), H, (DOWN, UP), 6),
    "no residual": (bottleneck, H, (DOWN, UP), 6),
    "post-activation": (lambda h, a, b: jnp.tanh(h + bottleneck(h, a, b)), H, (DOWN, UP), 6),
    "pre-norm": (lambda h, a, b: h + bottleneck(norm(h), a, b), H, (DOWN, UP), 6),
    "post-norm: two moments a row": (lambda h, a, b: norm(h + bottleneck(h, a, b)), H, (DOWN, UP), 12),
    "layer norm": (norm, H, (), 6),
    "relu": (lambda h, a, b: h + bottleneck(h, a, b, jax.nn.relu), H, (DOWN, UP), 6),
    "in a jit, in a checkpoint": (lambda h, a, b: h + jax.checkpoint(jax.jit(bottleneck))(h, a, b), H, (DOWN, UP), 6),
    "a rule of its own": (lambda h, a, b: h + bottleneck(h, a, b, clipped), H, (DOWN, UP), 6),
    "two branches": (lambda h, a, b, c, d: h + bottleneck(h, a, b) * jnp.cos(bottleneck(h, c, d)), H, (DOWN, UP, DOWN2, UP2), 15),
    "low-rank gates": (low_rank_gru, H, (DOWN, UP, DOWN2, UP2), 15),
    "one after the other": (lambda h, a, b, c, d: h + bottleneck(bottleneck(h, a, b), c, d), H, (DOWN2, UP2, DOWN, UP), 6),
    "delta rule": (delta_rule, STATE, (KEY, BETA), 12),
    "delta rule by sums": (delta_rule_by_sums, STATE, (KEY, BETA), 12),
    "mean field": (lambda h: jnp.tanh(h - h.mean()), H, (), 1),
    "a leaf of the state": (lambda s, w: (jnp.tanh(s[0] + s[1] @ w), jnp.sin(s[1])), (H, normal(3, 2)), (UP,), 6),
    "two leaves": (lambda s, a, b: (s[0] + jnp.tanh(s[1] @ a) @ b, s[1] * s[0]), (H, H), (DOWN, UP), 6),
    "single precision inside": (
        lambda h, a, b: h + bottleneck(h.astype("float32"), a, b).astype("float64"),
        H,
        (DOWN.astype("float32"), UP.astype("float32")),
        6,
    ),
    "a narrower layer": (lambda h, a, b: jnp.tanh(h @ a) @ b, H, (DOWN, UP[:, :5]), 6),
}
NOT_CUT = {
    "tanh RNN": (lambda h, w: jnp.tanh(h @ w), H, (FULL,)),
    "GRU": (gru, H, (FULL,)),
    "elementwise": (lambda h: jnp.tanh(h) * h, H, ()),
    "a bottleneck beside a full layer": (lambda h, a, b, w: jnp.tanh(h @ w) + bottleneck(h, a, b), H, (DOWN, UP, FULL)),
    "as wide as the state": (lambda h, a, b: h + bottleneck(h, a, b), H, (FULL, FULL)),
    "control flow around it": (lambda h, a, b: jax.lax.fori_loop(0, 2, lambda _, h: h + bottleneck(h, a, b), h), H, (DOWN, UP)),
    "added to its transpose": (lambda h, a, b: h + h.T + bottleneck(h, a, b), FULL, (DOWN, UP)),
}


@pytest.mark.parametrize("name", CUTS)
def test_parts_add_up_to_the_program(name):
    f, h, params, size = CUTS[name]
    closed, count, others = derivative(f, h, *params)
    tangents = [normal(*leaf.shape) for leaf in jax.tree.leaves(h)]
    some = list(cuts(closed, range(count)))
    assert some
    tolerance = 1e-6 if name == "single precision inside" else 1e-12
    for cut in some:
        assert sum(math.prod(aval.shape) for aval in cut.avals) == size
        got, want = jax.jit(functools.partial(recombined, cut)), jax.jit(core.jaxpr_as_fun(closed))
        for g, w in zip(got(tangents, others), want(*tangents, *others), strict=True):
            np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CUTS)
def test_what_is_left_is_elementwise(name):
    f, h, params, _ = CUTS[name]
    leaves = jax.tree.leaves(h)
    for cut in found(f, h, *params):
        for depends in dependence(cut.rest, range(len(leaves))):
            assert all(dims == tuple(range(leaves[leaf].ndim)) for leaf, dims in depends.items())


@pytest.mark.parametrize("name", NOT_CUT)
def test_nothing_narrower_than_the_state(name):
    f, h, params = NOT_CUT[name]
    assert found(f, h, *params) == []


def test_the_shape_of_a_bottleneck():
    f, h, params, _ = CUTS["residual bottleneck"]
    cut = found(f, h, *params)[0]
    assert [aval.shape for aval in cut.avals] == [(3, 2)]
    assert dependence(cut.rest, [0]) == [{0: (0, 1)}]
    assert dependence(cut.inner, [0]) == dependence(cut.outer, [0]) == [{0: (0, None)}], "the batch axis is kept"


@pytest.mark.parametrize("rule", [delta_rule, delta_rule_by_sums])
def test_the_shape_of_a_delta_rule(rule):
    cut = found(rule, STATE, KEY, BETA)[0]
    assert [aval.shape for aval in cut.avals] == [(3, 4)]
    assert dependence(cut.rest, [0]) == [{0: (0, 1, 2)}]
    assert dependence(cut.inner, [0]) == [{0: (0, 1, None)}]


@pytest.mark.parametrize("name", ["residual bottleneck", "relu", "pre-norm", "post-activation", "in a jit, in a checkpoint", "two branches"])
def test_slopes_and_masks_may_lie_on_either_side(name):
    f, h, params, _ = CUTS[name]
    if name != "pre-norm":  # where the norm is inside
        assert any(masks_nothing(cut.inner) for cut in found(f, h, *params))
    if name not in ("post-activation", "two branches"):  # where slopes are outside
        assert any(masks_nothing(cut.outer) for cut in found(f, h, *params))


def test_an_operation_on_zeros_is_left_out():
    f, h, params, _ = CUTS["residual bottleneck"]
    for cut in found(f, h, *params):
        assert not any("dot_general" in str(eqn.primitive) for eqn in cut.rest.jaxpr.eqns)


def test_what_is_affine_is_not_split():
    """The derivative of this rule is linear, its equations are not: run on zeros they would add what belongs to neither part."""

    @jax.custom_jvp
    def layer(h):
        return h @ DOWN @ UP

    layer.defjvp(lambda primals, tangents: (layer(*primals), (primals[0] + tangents[0]) @ DOWN @ UP - primals[0] @ DOWN @ UP))
    assert found(lambda h: h + layer(h), H) == []
    closed, _, _ = derivative(lambda h: jnp.tanh(layer(h)), H)
    assert separable(closed, [0]) is None


# --- one matrix an axis ----------------------------------------------------------------------------------------------

LEFT, RIGHT, M, TENSOR = normal(4, 4), normal(5, 5), normal(4, 5), normal(3, 4, 5)
ROWS, COLUMNS = normal(4), normal(5)
SEPARABLE = {
    # name: (step, state, params, axes, which axes have a matrix, whether there is a scale)
    "A H B": (lambda h, a, b: a @ h @ b, M, (LEFT, RIGHT), (0, 1), (True, True), False),
    "tanh(A H B)": (lambda h, a, b: jnp.tanh(a @ h @ b), M, (LEFT, RIGHT), (0, 1), (True, True), True),
    "relu(A H B)": (lambda h, a, b: jax.nn.relu(a @ h @ b), M, (LEFT, RIGHT), (0, 1), (True, True), True),
    "A H": (lambda h, a: a @ h, M, (LEFT,), (0, 1), (True, False), False),
    "A H, with a batch": (lambda h, a: jnp.einsum("ij,bjk->bik", a, h), TENSOR, (LEFT,), (0, 1, 2), (False, True, False), False),
    "A H B under vmap": (lambda h, a, b: jax.vmap(lambda h: jnp.tanh(a @ h @ b))(h), TENSOR, (LEFT, RIGHT), (0, 1, 2), (False, True, True), True),
    "B' H' A'": (lambda h, a, b: b.T @ h.T @ a.T, M, (LEFT, RIGHT), (1, 0), (True, True), False),
    "tanh(A H B)'": (lambda h, a, b: jnp.tanh(a @ h @ b).T, M, (LEFT, RIGHT), (1, 0), (True, True), True),
    "A A' H B B'": (lambda h, a, b: a @ (a.T @ h @ b) @ b.T, M, (LEFT, RIGHT), (0, 1), (True, True), False),
    "widths change": (lambda h, a, b: jnp.tanh(a[:2] @ h @ b[:, :3]), M, (LEFT, RIGHT), (0, 1), (True, True), True),
    "three axes": (lambda h, a, b, c: jnp.einsum("ai,bj,ck,ijk->cab", a, b, c, h), TENSOR, (normal(3, 3), LEFT, RIGHT), (1, 2, 0), (True, True, True), False),
    "rows scaled": (lambda h, a, b, s: 3.0 * -(s[:, None] * (a @ (s[:, None] * h) @ b)), M, (LEFT, RIGHT, ROWS), (0, 1), (True, True), False),
    "columns divided": (lambda h, a, s: a @ h / jnp.exp(s), M, (LEFT, COLUMNS), (0, 1), (True, True), False),
    "scaled throughout": (lambda h, a, b, s: s * jnp.tanh(2.0 * (a @ h) @ b), M, (LEFT, RIGHT, M + 1), (0, 1), (True, True), True),
    "a number alone": (lambda h: -0.5 * h.T, M, (), (1, 0), (False, False), True),
    "a scalar parameter": (lambda h, a, s: s * (a @ h), M, (LEFT, jnp.array(0.7)), (0, 1), (True, False), False),
    "leaky": (lambda h, a, s: (lambda g: g * s[:, None] + 0.5 * g)(a @ h), M, (LEFT, ROWS), (0, 1), (True, False), False),
    "multiples added": (lambda h, a: (lambda g: jnp.sin(g) - 2 * g**2 + g)(a @ h), M, (LEFT,), (0, 1), (True, False), True),
    "in a jit": (lambda h, a, b: jax.jit(lambda h: jnp.tanh(a @ h @ b))(h), M, (LEFT, RIGHT), (0, 1), (True, True), True),
    "a vector": (lambda h, a: jnp.tanh(a @ h), ROWS, (LEFT,), (0,), (True,), False),
    "a constant": (lambda h: jnp.tanh(LEFT @ h @ RIGHT), M, (), (0, 1), (True, True), True),
    "an axis of one": (lambda h, a: jnp.tanh(a @ h), M[:, :1], (LEFT,), (0, 1), (True, False), False),
}
NOT_SEPARABLE = {
    "H + A H B": (lambda h, a, b: h + a @ h @ b, M, (LEFT, RIGHT)),
    "gates": (lambda h, a, b: jax.nn.sigmoid(a @ h) * h, M, (LEFT, RIGHT)),
    "layer norm": (norm, M, ()),
    "scaled, then multiplied": (lambda h, a, b: a @ jnp.tanh(h @ b), M, (LEFT, RIGHT)),
    "one matrix for each of the batch": (lambda h, a: jnp.einsum("bij,bjk->bik", a, h), TENSOR, (normal(3, 4, 4),)),
    "two axes at once": (lambda h, a: jnp.einsum("ijkl,kl->ij", a, h), M, (normal(4, 5, 4, 5),)),
    "an axis that is summed away": (lambda h, s: h @ s, M, (COLUMNS,)),
    "a fixed output": (lambda h: jnp.ones((4, 5)), M, ()),
    "reshaped": (lambda h, a: (a @ h).reshape(5, 4), M, (LEFT,)),
    "two leaves": (lambda s, a: a @ s[0], (M, M), (LEFT,)),
    "rotated": (lambda h, a: jnp.roll(a @ h, 1, 0), M, (LEFT,)),
    "added to itself": (lambda h, a: a @ h + a @ h, M, (LEFT,)),
}


def matrix_of(kind, matrices, scale, shape):
    """The Jacobian (*out, *in) that the factors stand for."""
    full = [jnp.eye(n) if m is None else m for m, n in zip(matrices, shape, strict=True)]
    outer = functools.reduce(lambda a, b: jnp.tensordot(a, b, 0), full)  # out, in, out, in, …
    rank = len(shape)
    outs = sorted(range(rank), key=kind.axes.__getitem__)
    outer = outer.transpose(*(2 * a for a in outs), *(2 * a + 1 for a in range(rank)))
    return outer if scale is None else scale.reshape(*scale.shape, *(1,) * rank) * outer


@pytest.mark.parametrize("name", SEPARABLE)
def test_factors_are_those_of_the_jacobian(name):
    f, h, params, axes, has_matrix, has_scale = SEPARABLE[name]
    closed, _, others = derivative(f, h, *params)
    kind = separable(closed, [0])
    assert kind is not None
    assert kind.axes == axes
    matrices, scale = jax.jit(kind.factors)(*others)
    assert tuple(m is not None for m in matrices) == has_matrix
    assert (scale is not None) == has_scale
    want = jax.jit(jax.jacobian(f))(h, *params)
    np.testing.assert_allclose(matrix_of(kind, matrices, scale, h.shape), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NOT_SEPARABLE)
def test_what_has_no_factors(name):
    f, h, params = NOT_SEPARABLE[name]
    closed, count, _ = derivative(f, h, *params)
    assert separable(closed, range(count)) is None


def test_factors_under_transformations():
    f, h, params, *_ = SEPARABLE["tanh(A H B)"]
    closed, _, _ = derivative(f, h, *params)
    kind = separable(closed, [0])
    states = jnp.stack([h, h + 1, -2 * h])

    def jacobian(h, *params):
        return matrix_of(kind, *kind.factors(h, *params), h.shape)

    batched = jax.jit(jax.vmap(jacobian, (0, None, None)))(states, *params)
    np.testing.assert_allclose(batched, jax.jit(jax.vmap(jax.jacobian(f), (0, None, None)))(states, *params), rtol=1e-12, atol=1e-12)
    weights = normal(*batched.shape[1:])
    got = jax.jit(jax.grad(lambda *args: jnp.sum(weights * jacobian(*args)), (0, 1, 2)))(h, *params)
    want = jax.jit(jax.grad(lambda *args: jnp.sum(weights * jax.jacobian(f)(*args)), (0, 1, 2)))(h, *params)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-10)


def test_a_rule_that_is_not_its_functions_derivative_stays():
    """What no tangent reaches is not looked into: the second derivative is that of the rule."""

    @jax.custom_jvp
    def wave(x):
        return jnp.sin(x)

    wave.defjvp(lambda primals, tangents: (wave(*primals), 2 * wave(primals[0]) * tangents[0]))

    def f(h):
        return wave(LEFT @ h)

    closed, _, _ = derivative(f, M)
    kind = separable(closed, [0])
    weights = normal(4, 5, 4, 5)
    got = jax.jit(jax.grad(lambda h: jnp.sum(weights * matrix_of(kind, *kind.factors(h), h.shape))))(M)
    want = jax.jit(jax.grad(lambda h: jnp.sum(weights * jax.jacobian(f)(h))))(M)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_single_precision_stays():
    f, h, params, *_ = SEPARABLE["tanh(A H B)"]
    h, *params = (x.astype("float32") for x in (h, *params))
    closed, _, others = derivative(f, h, *params)
    matrices, scale = separable(closed, [0]).factors(*others)
    assert {x.dtype for x in (*matrices, scale)} == {jnp.dtype("float32")}


# --- random programs -------------------------------------------------------------------------------------------------

A, B, COLUMN, ROW = normal(4, 4), normal(4, 4), normal(4, 1), normal(1, 4)
OPERATIONS = (
    lambda x, y: jnp.tanh(x),
    lambda x, y: jax.nn.relu(-x),
    lambda x, y: A @ x,
    lambda x, y: x @ B,
    lambda x, y: jnp.tanh(x @ COLUMN) @ ROW,
    lambda x, y: x + COLUMN @ (ROW @ y),
    lambda x, y: x - x.mean(-1, keepdims=True),
    lambda x, y: x.T,
    lambda x, y: x + y,
    lambda x, y: x * y,
    lambda x, y: x / jnp.exp(ROW),
    lambda x, y: jnp.cos(COLUMN) * x,
    lambda x, y: x @ COLUMN * y,
    lambda x, y: jnp.concatenate([x[:2], y[2:]]),
)


def random_program(seed):
    random = np.random.default_rng(seed)
    chosen = [(OPERATIONS[random.integers(len(OPERATIONS))], *random.integers(0, 3, 2)) for _ in range(random.integers(2, 7))]

    def f(h):
        values = [h]
        for operation, i, j in chosen:
            values.append(operation(values[-1 - i % len(values)], values[-1 - j % len(values)]))
        return values[-1]

    return f


def test_random_programs():
    h, tangent = normal(4, 4), normal(4, 4)
    cut_ones = separable_ones = 0
    for seed in range(40):
        f = random_program(seed)
        closed, _, _ = derivative(f, h)
        some, kind = list(cuts(closed, [0])), separable(closed, [0])

        def results(h, some=some, kind=kind, f=f):
            jacobian = jax.jacobian(f)(h)
            found = [(recombined(cut, [tangent], [h])[0], jnp.tensordot(jacobian, tangent, 2)) for cut in some]
            return found if kind is None else [*found, (matrix_of(kind, *kind.factors(h), h.shape), jacobian)]

        for got, want in jax.jit(results)(h) if some or kind else ():
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())
        cut_ones += bool(some)
        separable_ones += kind is not None
    assert min(cut_ones, separable_ones) >= 6, f"too few to test anything: {cut_ones}, {separable_ones}"
