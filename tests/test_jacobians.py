"""Every kind against dense matrices, and the scaled affine element against exact arithmetic."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KINDS, TOLERANCE, assert_close
from test_order import every_tree

import parscan
from parscan import affine, exponents, prefix
from parscan.affine import Affine
from parscan.structure import forms_of

SHAPES = {"Dense": (5, 6, 6), "BlockDiagonal": (5, 3, 2, 2), "Diagonal": (5, 6)}


def make(kind, dtype, seed, shape=None):
    return KINDS[kind](jnp.asarray(np.random.default_rng(seed).standard_normal(shape or SHAPES[kind]), dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_operations_agree_with_dense_matrices(kind, dtype):
    a, b = make(kind, dtype, 0), make(kind, dtype, 1)
    v = jnp.asarray(np.random.default_rng(2).standard_normal((5, 6)), dtype)
    tolerance = TOLERANCE[dtype] * 1e-2
    assert_close(a.apply(v), np.einsum("lij,lj->li", a.to_dense(), v), tolerance)
    assert_close(a.transpose().to_dense(), np.swapaxes(a.to_dense(), -1, -2), 0)
    assert_close(a.after(b).to_dense(), np.asarray(a.to_dense()) @ np.asarray(b.to_dense()), tolerance)
    assert a.size == 6


@pytest.mark.parametrize("kind", KINDS)
def test_wide_blocks_take_the_other_product(kind):
    shape = {"Dense": (2, 20, 20), "BlockDiagonal": (2, 2, 10, 10), "Diagonal": (2, 20)}[kind]
    a = make(kind, "float64", 0, shape)
    v = jnp.asarray(np.random.default_rng(2).standard_normal((2, 20)))
    assert_close(a.apply(v), np.einsum("lij,lj->li", a.to_dense(), v), 1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_rows", [False, True])
def test_balanced_is_exact(kind, with_rows):
    a = make(kind, "float64", 0)
    rows = jnp.asarray(np.random.default_rng(3).integers(-300, 300, (5, 6)), jnp.int32) if with_rows else None
    mantissa, exponent = a.balanced()
    if rows is not None:
        a, (mantissa, exponent) = mantissa, mantissa.shifted(rows)
    largest = np.abs(mantissa.to_dense()).max(-2)
    assert np.all((largest >= 0.5) & (largest < 1))
    scale = np.zeros((5, 6), int) if rows is None else np.asarray(rows)
    want = np.asarray(a.to_dense(), np.longdouble) * np.exp2(scale.astype(np.longdouble))[..., :, None]
    got = np.asarray(mantissa.to_dense(), np.longdouble) * np.exp2(np.asarray(exponent).astype(np.longdouble))[..., None, :]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_forming_inverts_pushing_the_basis(kind):
    a = make(kind, "float64", 0)
    forms = forms_of(a)
    assert forms.pushes == {"Dense": 6, "BlockDiagonal": 2, "Diagonal": 1}[kind]
    images = jnp.stack([a.apply(jnp.broadcast_to(e, (5, 6))) for e in forms.seeds("float64")], axis=1)
    assert_close(forms.jacobian(images).to_dense(), a.to_dense(), 0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_then_is_application_one_after_the_other(kind, dtype):
    random = np.random.default_rng(4)
    one, two, three = (Affine(make(kind, dtype, seed), None, jnp.asarray(random.standard_normal((5, 6)), dtype)) for seed in (5, 6, 7))
    v = jnp.asarray(random.standard_normal((5, 6)), dtype)
    want = affine.apply(three, affine.apply(two, affine.apply(one, v)))
    for joined in (affine.then(three, affine.then(two, one)), affine.then(affine.then(three, two), one)):
        assert_close(affine.apply(joined, v), want, TOLERANCE[dtype] * 1e-1)


def test_powers_of_two_are_exact_where_the_compiler_knows_them():
    """Two constant factors may be folded into one that is infinite or zero."""
    scaled = lambda e: jax.jit(lambda x: exponents.scaled(x, jnp.full((2,), e, jnp.int32)))
    x = jnp.asarray([0.0, 1.5], jnp.float32)
    np.testing.assert_array_equal(scaled(250)(x * jnp.float32(2.0**-125)), [0.0, np.float32(1.5 * 2.0**125)])
    np.testing.assert_array_equal(scaled(-200)(x * jnp.float32(2.0**100)), [0.0, np.float32(1.5 * 2.0**-100)])
    np.testing.assert_array_equal(scaled(-400)(x), [0.0, 0.0])


def power(matrix, times):
    """The matrix to the 2^times, by joining."""
    kind = parscan.Dense(jnp.asarray(matrix, jnp.float32)[None])
    total = Affine(kind, None, jnp.zeros((1, kind.size), jnp.float32))
    for _ in range(times):
        total = affine.then(total, total)
    return lambda v: affine.apply(total, jnp.asarray([v], jnp.float32))[0]


def test_growth_aligned_with_an_axis_leaves_the_others_alone():
    np.testing.assert_array_equal(power(np.diag([16.0, 1.0]), 7)([0.0, 1.0]), [0.0, 1.0])


def test_growth_into_an_axis_leaves_the_contracted_side_alone():
    np.testing.assert_array_equal(power([[16.0, 0.0], [1.0, 1.0]], 7)([0.0, 1.0]), [0.0, 1.0])


def test_what_underflows_is_zero_and_what_overflows_is_infinite():
    both = power(np.diag([2.0**-20, 2.0**20]), 5)
    np.testing.assert_array_equal(both([1.0, 0.0]), [0.0, 0.0])
    assert both([0.0, 1.0])[1] == np.inf


def test_alternating_extreme_steps_cancel():
    up, down = np.diag([1e20, 1e-20]), np.diag([1e-20, 1e20])
    offset = jnp.zeros((1, 2), jnp.float32)
    steps = [Affine(parscan.Dense(jnp.asarray(m, jnp.float32)[None]), None, offset) for m in (up, up, up, down, down, down)]
    total = steps[0]
    for step in steps[1:]:
        total = affine.then(step, total)
    np.testing.assert_allclose(affine.apply(total, jnp.ones((1, 2), jnp.float32))[0], [1.0, 1.0], rtol=1e-6)


# --- layers that change the width -----------------------------------------------------------------------------------------------


def rectangular(kind, widths, scale=1.0):
    """Maps between vectors of these widths, in two blocks if there are blocks."""
    random = np.random.default_rng(5)
    shapes = [(b, a) if kind == "Dense" else (2, b, a) for a, b in itertools.pairwise(widths)]
    return [KINDS[kind](jnp.asarray(scale * random.standard_normal(shape))) for shape in shapes]


@pytest.mark.parametrize("kind", ["Dense", "BlockDiagonal"])
def test_rectangular_maps(kind):
    first, second = rectangular(kind, (5, 3, 4))
    v = jnp.arange(1.0, first.size + 1)
    assert_close(first.apply(v), first.to_dense() @ v, 1e-14)
    assert_close(first.transpose().to_dense(), first.to_dense().T, 0)
    assert_close(second.after(first).to_dense(), second.to_dense() @ first.to_dense(), 1e-14)
    rows = jnp.arange(first.to_dense().shape[0], dtype=jnp.int32) - 2
    mantissa, exponent = first.balanced()
    moved, more = mantissa.shifted(rows)
    rebuilt = np.asarray(moved.to_dense()) * np.exp2(exponent + more)
    assert_close(rebuilt, np.exp2(rows)[:, None] * np.asarray(first.to_dense()), 1e-15)


@pytest.mark.parametrize("kind, scale", [("Dense", 1e140), ("Dense", 1e-140), ("BlockDiagonal", 1e140)])
def test_every_tree_over_rectangular_maps(kind, scale):
    """All shapes of tree over five maps of several widths; products that leave the range meet vectors that do not."""
    widths = (3, 5, 1, 4, 4, 2)
    maps = rectangular(kind, widths)
    maps = [type(m)(jax.tree.leaves(m)[0] * (scale if i % 2 == 0 else 1 / scale)) for i, m in enumerate(maps)]
    random = np.random.default_rng(6)
    chain = [Affine(m, None, jnp.asarray(random.standard_normal(m.to_dense().shape[0]) * (scale if i % 2 == 0 else 1))) for i, m in enumerate(maps)]
    start = jnp.asarray(random.standard_normal(maps[0].size))
    want, vector = [], start
    for one in chain:
        vector = one.matrix.to_dense() @ vector + one.offset
        want.append(vector)
    for tree in every_tree(0, 5)[:: 1 if kind == "Dense" else 4]:
        assert_close(in_the_order_of(tree)(chain, start), want, 1e-13)


@functools.cache
def in_the_order_of(tree):
    @jax.jit
    def run(chain, start):
        stacks = [prefix.Stack(1, lambda one=one: affine.scaled(jax.tree.map(lambda x: x[None], one))) for one in chain]
        return [g[0] for g in prefix.ordered(stacks, tree, start, affine.apply, affine.then)]

    return run
