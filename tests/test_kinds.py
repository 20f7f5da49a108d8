"""Kinds of Jacobian against dense matrices: written out by their definitions, multiplied, scaled, formed, and where they fill in."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TOLERANCE, assert_close

from parscan import affine
from parscan.affine import Affine
from parscan.jacobians import (
    TABLE,
    Banded,
    BlockDiagonal,
    Dense,
    Diagonal,
    DirectSum,
    Evidence,
    Form,
    Identity,
    Kronecker,
    LowRank,
    Pattern,
    Permutation,
    Sparse,
    matched,
    product,
)

N = 24
GROWING = ("Banded", "Sparse", "LowRank", "Kronecker")
NAMES = TABLE.strip().splitlines()[0].split()[3:]
LEADS = [(), (5,), (1,), (2, 1), (1, 3)]


# --- one of every kind, and its matrix by the definition ---------------------------------------------------------------


def scattered(p=N, n=N, seed=0):
    """Two entries in a row, in columns of three that are closed under products; some columns have none."""
    random = np.random.default_rng(seed)
    columns = [3 * (row * (n // 3) // p) + random.choice(3, 2, replace=False) for row in range(p)]
    return Pattern((p, n), np.repeat(np.arange(p), 2), np.concatenate(columns))


def make(name, lead=(), dtype="float64", seed=0, n=N):
    random = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(random.standard_normal((*lead, *shape)), dtype)
    kinds = {
        "Identity": lambda: Identity(n),
        "Moves": lambda: Permutation(random.permutation(n)),
        "Permutation": lambda: Permutation(random.permutation(n), normal(n)),
        "Diagonal": lambda: Diagonal(normal(n)),
        "Dense": lambda: Dense(normal(n, n)),
        "Banded": lambda: banded(normal(4, n), (1, 2)),
        "Sparse": lambda: Sparse(normal(2 * n), scattered(n, n, seed)),
        "LowRank": lambda: LowRank(normal(n), normal(n, 2), normal(2, n)),
        "Bottleneck": lambda: LowRank(None, normal(n, 2), normal(2, n)),
        "Kronecker": lambda: Kronecker(normal(4, 4), normal(n // 4, n // 4)),
        "Scaled": lambda: Kronecker(normal(4, 4), normal(n // 4, n // 4), normal(n), normal(n)),
        "BlockDiagonal": lambda: BlockDiagonal(banded(normal(1, 3, n // 3), (1, 1)), (3,)),
        "DirectSum": lambda: DirectSum((Diagonal(normal(n - 8)), Kronecker(normal(2, 2), normal(4, 4)))),
    }
    return kinds[name]()


ALL = ("Identity", "Moves", "Permutation", "Diagonal", "Dense", *GROWING, "Bottleneck", "Scaled", "BlockDiagonal", "DirectSum")


def banded(diagonals, bandwidths):
    n = diagonals.shape[-1]
    rows = np.arange(n) + np.arange(-bandwidths[1], bandwidths[0] + 1)[:, None]
    return Banded(jnp.where((rows >= 0) & (rows < n), diagonals, 0), bandwidths)


def matrix_of(one):
    """The matrix, entry by entry as the docstrings define it."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(one)]
    if isinstance(one, Identity):
        return np.eye(one.n)
    if isinstance(one, Dense):
        return leaves[0]
    if isinstance(one, BlockDiagonal):
        inner = matrix_of(one.blocks)
        return placed([np.broadcast_to(inner, (*inner.shape[:-3], *one.counts, *inner.shape[-2:]))[..., i, :, :] for i in range(*one.counts)])
    if isinstance(one, DirectSum):
        return placed([matrix_of(part) for part in one.parts])
    if isinstance(one, Kronecker):
        both = np.vectorize(np.kron, signature="(p,q),(r,s)->(t,u)")(*leaves[:2])
        row, column = (np.ones(1) if s is None else np.asarray(s) for s in (one.row_scale, one.column_scale))
        return row[..., :, None] * both * column[..., None, :]
    if isinstance(one, LowRank):
        through = np.asarray(one.left) @ np.asarray(one.right)
        return through if one.diagonal is None else np.eye(one.size) * np.asarray(one.diagonal)[..., None, :] + through
    values = leaves[0] if leaves else np.ones(one.size)
    matrix = np.zeros((*values.shape[: values.ndim - (2 if isinstance(one, Banded) else 1)], one.rows, one.size), values.dtype)
    if isinstance(one, Banded):
        for k, j in np.ndindex(values.shape[-2:]):
            i = j + k - one.bandwidths[1]
            if 0 <= i < one.size:
                matrix[..., i, j] = values[..., k, j]
    elif isinstance(one, Sparse):
        for k, (i, j) in enumerate(zip(one.pattern.rows, one.pattern.columns, strict=True)):
            matrix[..., i, j] = values[..., k]
    else:
        for i, j in enumerate(one.index.values if isinstance(one, Permutation) else range(one.size)):
            matrix[..., i, j] = values[..., i]
    return matrix


def placed(blocks):
    """Along the diagonal."""
    p, n = (sum(block.shape[axis] for block in blocks) for axis in (-2, -1))
    full = np.zeros((*np.broadcast_shapes(*(block.shape[:-2] for block in blocks)), p, n))
    i = j = 0
    for block in blocks:
        full[..., i : i + block.shape[-2], j : j + block.shape[-1]] = block
        i, j = i + block.shape[-2], j + block.shape[-1]
    return full


@jax.jit
def by_itself(one, v):
    return one.to_dense(), one.transpose().to_dense(), one.transpose().transpose().to_dense(), one.apply(v)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ALL)
def test_a_kind_is_its_matrix(name, dtype):
    for lead in LEADS if dtype == "float64" else LEADS[:2]:
        one, v = make(name, lead, dtype), jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, N) if len(lead) == 2 else (5, N)), dtype)
        want, tolerance = matrix_of(one), TOLERANCE[dtype] * 1e-2
        assert (one.rows, one.size) == want.shape[-2:] == (N, N)
        dense, transposed, again, image = by_itself(one, v)
        assert_close(dense, want, tolerance)
        assert_close(transposed, want.swapaxes(-1, -2), tolerance)
        assert_close(again, dense, 0)
        assert_close(image, np.einsum("...ij,...j->...i", want, v), tolerance)
        assert image.dtype == dtype and (dense.dtype == dtype or not jax.tree.leaves(one))


# --- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, lead, other", [("float32", (), ()), ("float64", (5,), (1,)), ("float64", (2, 1), (1, 3))])
@pytest.mark.parametrize("second", ALL)
def test_products_agree_with_dense_matrices(second, dtype, lead, other):
    a, firsts = make(second, lead, dtype, 1), {first: make(first, other, dtype, 2) for first in ALL}
    products = jax.jit(lambda a, firsts: {first: product(a, b).to_dense() for first, b in firsts.items()})(a, firsts)
    for first, b in firsts.items():
        got, want = products[first], matrix_of(a) @ matrix_of(b)
        assert_close(got, np.broadcast_to(want, (*got.shape[:-2], N, N)), TOLERANCE[dtype] * 1e-1)
        assert got.ndim == want.ndim and (got.dtype == dtype or not jax.tree.leaves((a, b)))


@pytest.mark.parametrize("row", TABLE.strip().splitlines()[1:], ids=lambda row: row.split()[0])
def test_products_are_of_the_kinds_in_the_table(row):
    second, *results = row.split()
    for first, result in zip(NAMES, results, strict=True):
        a, b = make(second, (3,), "float32", 1), make(first, (3,), "float32", 2)
        assert type(jax.eval_shape(product, a, b)).__name__ == result, (second, first)


def test_products_of_stacks_are_stacks_of_products():
    for second, first in itertools.product(GROWING, GROWING):
        a, b = make(second, (3,), seed=1), make(first, (3,), seed=2)
        (mapped, one_by_one), (plain, at_once) = (jax.jit(how(lambda a, b: (product(a, b), product(a, b).to_dense())))(a, b) for how in (jax.vmap, lambda f: f))
        assert type(mapped) is type(plain)
        assert_close(one_by_one, at_once, 1e-13)


def test_rectangular_maps():
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape))
    pairs = [
        (Sparse(normal(16), scattered(8, 12)), Sparse(normal(24), scattered(12, 15))),
        (LowRank(None, normal(8, 2), normal(2, 12)), LowRank(None, normal(12, 1), normal(1, 15))),
        (LowRank(None, normal(8, 1), normal(1, 12)), LowRank(None, normal(12, 2), normal(2, 15))),
        (LowRank(None, normal(8, 1), normal(1, 12)), LowRank(normal(12), normal(12, 2), normal(2, 12))),
        (LowRank(normal(12), normal(12, 2), normal(2, 12)), LowRank(None, normal(12, 1), normal(1, 8))),
        (Kronecker(normal(2, 3), normal(5, 4), normal(10)), Kronecker(normal(3, 1), normal(4, 2), None, normal(2))),
    ]
    for second, first in pairs:
        for one in (second, first):
            image, back = jax.jit(lambda one, v: (one.apply(v), one.transpose().to_dense()))(one, jnp.arange(1.0, one.size + 1))
            assert_close(image, matrix_of(one) @ np.arange(1, one.size + 1), 1e-13)
            assert_close(back, matrix_of(one).T, 1e-15)
            (_, exponent, dense), _ = jax.device_get(scaled_twice(one, jnp.zeros(one.rows, jnp.int32)))
            assert_close(np.asarray(dense * power(exponent), np.float64), matrix_of(one), 1e-15)
        got, dense = jax.jit(lambda a, b: (product(a, b), product(a, b).to_dense()))(second, first)
        assert type(got) is type(second) and (got.rows, got.size) == (second.rows, first.size)
        assert_close(dense, matrix_of(second) @ matrix_of(first), 1e-14)


def test_a_bottleneck_that_nothing_passes_by_stays_one():
    wide, narrow = make("Bottleneck"), LowRank(None, jnp.ones((N, 1)), jnp.ones((1, N)))
    assert {product(wide, narrow).rank, product(narrow, wide).rank, product(narrow, make("LowRank")).rank, product(make("LowRank"), narrow).rank} == {1}


def test_wide_bands_are_multiplied_group_by_group():
    a, b = (banded(jnp.asarray(np.random.default_rng(seed).standard_normal((sum(w) + 1, 120))), w) for seed, w in enumerate([(9, 4), (20, 19)]))
    for second, first in ((a, b), (b, a), (b, b)):
        got = product(second, first)
        assert isinstance(got, Banded) and got.bandwidths == tuple(map(sum, zip(second.bandwidths, first.bandwidths, strict=True)))
        assert_close(got.to_dense(), matrix_of(second) @ matrix_of(first), 1e-14)


def test_banded_products_never_hold_the_full_matrix():
    a = banded(jnp.ones((3, 64)), (1, 1))
    jaxpr = jax.make_jaxpr(lambda a: a.after(a).apply(jnp.ones(64)))(a)
    assert max(np.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars) < 64 * 64 // 4


def test_kronecker_products_with_a_scale_in_between_are_dense():
    plain, row, column = (make("Kronecker", seed=i) for i in range(3))
    row, column = Kronecker(row.left, row.right, row_scale=jnp.arange(1.0, N + 1)), Kronecker(column.left, column.right, column_scale=jnp.arange(1.0, N + 1))
    kept = [(row, column), (row, plain), (plain, column), (plain, plain)]
    filled = [(plain, row), (column, plain), (column, row), (plain, Kronecker(jnp.ones((6, 6)), jnp.ones((4, 4))))]
    for pairs, kind in ((kept, Kronecker), (filled, Dense)):
        for second, first in pairs:
            assert type(product(second, first)) is type(second.after(first)) is kind
            (mantissa, exponent), (one_by_one, at_once) = jax.device_get(joined(second, first))
            want = matrix_of(second) @ matrix_of(first)
            assert_close(second.after(first).to_dense(), want, 1e-14)
            assert_close(np.asarray(mantissa * power(exponent), np.float64), want, 1e-14)
            assert_close(at_once, one_by_one, 1e-13)


# --- where they fill in --------------------------------------------------------------------------------------------------


def grid(side, reach):
    """The pattern of points at most so far apart: a 5-point stencil for reach 1."""
    i, j = np.divmod(np.arange(side * side), side)
    return Pattern.of((np.abs(i[:, None] - i) + np.abs(j[:, None] - j) <= reach).astype(int))


SQUARED = """
Banded   float32  Banded 768  Banded 1280  Banded 2304  Banded 4352  Banded 8448  Dense 16384  Dense 16384
Banded   float64  Banded 1536  Banded 2560  Banded 4608  Banded 8704  Banded 16896  Dense 32768
Sparse   float32  Sparse 2304  Sparse 5408  Sparse 13792  Dense 16384  Dense 16384
Sparse   float64  Sparse 3456  Sparse 8112  Sparse 20688  Dense 32768
LowRank  float32  LowRank 320  LowRank 576  Dense 1024
Bottleneck float32  LowRank 256  LowRank 256  LowRank 256
Kronecker float32 Kronecker 128 Kronecker 128
"""


@pytest.mark.parametrize("row", SQUARED.strip().splitlines())
def test_a_square_is_dense_exactly_where_the_bytes_cross(row):
    name, dtype, *want = row.split()
    ones = lambda *shape: jnp.ones(shape, dtype)
    starts = {
        "Banded": lambda: banded(ones(3, 64), (1, 1)),
        "Sparse": lambda: Sparse(ones(grid(8, 1).count), grid(8, 1)),
        "LowRank": lambda: LowRank(ones(16), ones(16, 2), ones(2, 16)),
        "Bottleneck": lambda: LowRank(None, ones(16, 2), ones(2, 16)),
        "Kronecker": lambda: Kronecker(ones(4, 4), ones(4, 4)),
    }
    one = starts[name]()
    for level, (kind, size) in enumerate(zip(want[::2], map(int, want[1::2]), strict=True)):
        assert (type(one).__name__, one.nbytes) == (kind, size), level
        known = jax.eval_shape(lambda one: one.after(one), one)  # from sizes alone
        one = one.after(one)
        assert type(known) is type(one) and known.nbytes == one.nbytes


def test_as_many_bytes_as_the_full_matrix_are_too_many():
    squared = lambda one: type(jax.eval_shape(lambda one: one.after(one), one)).__name__
    ones = lambda *shape: jnp.ones(shape, "float32")
    assert [squared(banded(ones(5, n), (2, 2))) for n in (8, 9, 10)] == ["Dense", "Dense", "Banded"]  # 9 diagonals
    assert [squared(LowRank(ones(n), ones(n, 2), ones(2, n))) for n in (8, 9, 10)] == ["Dense", "Dense", "LowRank"]  # 9 numbers a coordinate
    pairs, less = Pattern.of(np.kron(np.eye(2), np.ones((2, 2)))), Pattern.of(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]))
    assert [squared(Sparse(ones(p.count), p)) for p in (pairs, less)] == ["Dense", "Sparse"]  # 8 or 7 of 16 entries, two words for each


def test_costs():
    assert make("Banded", (5,)).product_flops == 2 * 5 * 4 * 4 * N
    assert make("Banded", (5,)).apply_flops == 2 * 5 * 4 * N
    sparse = make("Sparse", (5,))
    assert sparse.product_flops == 2 * 5 * int((np.abs(np.sign(matrix_of(sparse)[0])) @ np.abs(np.sign(matrix_of(sparse)[0]))).sum())
    assert sparse.apply_flops == 2 * 5 * 2 * N
    assert make("LowRank", (5,)).apply_flops == 2 * 5 * (N + 2 * 2 * N)
    assert make("LowRank", (5,)).product_flops == 5 * (2 * 2 * (N + 2 * 2 * N) + 3 * N)
    assert make("Kronecker", (5,)).product_flops == 5 * 2 * (4**3 + 6**3)
    assert make("Kronecker", (5,)).apply_flops == 5 * 2 * N * (4 + 6)
    assert make("Scaled", (5,)).product_flops == 5 * 2 * N**3  # as full matrices
    assert make("BlockDiagonal", (5,)).apply_flops == 3 * 2 * 5 * 3 * N // 3  # one block for three


# --- scaling -------------------------------------------------------------------------------------------------------------


def power(e):
    return np.exp2(np.asarray(e).astype(np.longdouble))


def rebuilt(mantissa, exponent):
    return np.asarray(mantissa.to_dense(), np.longdouble) * power(exponent)[..., None, :]


def separable(random, shape):
    """Rows as another Kronecker product's exponents."""
    return jnp.asarray((random.integers(-150, 150, (*shape, 4, 1)) + random.integers(-150, 150, (*shape, 1, 6))).reshape(*shape, N), jnp.int32)


@jax.jit
def scaled_twice(one, rows):
    mantissa, exponent = one.balanced()
    moved, more = mantissa.shifted(rows)
    return (mantissa, exponent, mantissa.to_dense()), (moved, more, moved.to_dense())


@pytest.mark.parametrize("lead", [(5,), (1, 3)])
@pytest.mark.parametrize("name", ALL)
def test_scaling_is_exact(name, lead):
    one, random, stack = make(name, lead), np.random.default_rng(3), (5,) if len(lead) < 2 else (2, 3)
    rows = separable(random, stack) if name in ("Kronecker", "Scaled") else jnp.asarray(random.integers(-300, 300, (*stack, N)), jnp.int32)
    rows = rows.at[..., -8:].set(7) if name == "DirectSum" else rows
    (mantissa, exponent, dense), (moved, more, dense_moved) = jax.device_get(scaled_twice(one, rows))
    assert jax.tree.structure(mantissa) == jax.tree.structure(moved) == jax.tree.structure(one)
    assert exponent.dtype == more.dtype == jnp.int32
    want = power(rows)[..., :, None] * np.asarray(dense, np.longdouble)
    if name in ("LowRank", "Bottleneck"):  # the parts are exact, their sums in `to_dense` round
        assert max(np.abs(dense).max(), np.abs(dense_moved).max()) <= 3
        assert_close(dense * power(exponent)[..., None, :], matrix_of(one), 1e-15)
        assert np.abs(dense_moved - want / power(more)[..., None, :]).max() < 1e-15
        return
    np.testing.assert_array_equal(dense * power(exponent)[..., None, :], matrix_of(one))
    np.testing.assert_array_equal(dense_moved * power(more)[..., None, :], want)
    columns = np.abs(np.concatenate([np.asarray(m).max(-2, initial=0).ravel() for m in (np.abs(dense), np.abs(dense_moved))]))
    exact = name not in ("Identity", "Moves", "Kronecker", "Scaled", "DirectSum")
    assert columns.max() <= 1 and (not exact or np.all(((columns >= 0.5) & (columns < 1)) | (columns == 0)))


def steps_of(name, dtype, lead=(1,)):
    """Five steps S_k M_k S_{k-1}⁻¹ times 1e±20: (steps, all M, all S, the factors). No entry of a step leaves float32, their products do."""
    random = np.random.default_rng(7)
    ends = [random.uniform(-6, 6, (4, 1)) + random.uniform(-2, 2, (1, N // 4)) for _ in range(6)]
    steps, inner = [], []
    for k, (before, after) in enumerate(itertools.pairwise(ends)):
        one = make(name, lead, "float64", 10 + k, N)
        inner.append(matrix_of(one))
        rows, columns, scale = 10.0 ** after.ravel(), 10.0 ** -before.ravel(), [1e20, 1e20, 1e-20, 1e-20, 1e20][k]
        match one:
            case Banded():
                held = [rows[np.clip(np.arange(N) + d, 0, N - 1)] for d in range(-2, 2)]
                one = Banded(scale * one.diagonals * np.array(held) * columns, one.bandwidths)
            case Sparse():
                one = Sparse(scale * one.values * rows[one.pattern.rows] * columns[one.pattern.columns], one.pattern)
            case LowRank():
                diagonal = None if one.diagonal is None else scale * one.diagonal * rows * columns
                one = LowRank(diagonal, scale * one.left * rows[:, None], one.right * columns)
            case Kronecker():
                up, down = after - after[0, 0], before - before[0, 0]
                left = 10.0 ** (after[:, :1] - before[:, 0]) * one.left
                one = Kronecker(scale * left, 10.0 ** (up[0][:, None] - down[0]) * one.right)
        steps.append(Affine(jax.tree.map(lambda x: x.astype(dtype), one), None, jnp.zeros((*lead, N), dtype)))
    return steps, inner, [10.0 ** end.ravel() for end in ends]


@pytest.mark.parametrize("name", (*GROWING, "Bottleneck"))
def test_joined_steps_stay_finite_where_their_products_do_not(name):
    steps, inner, ends = steps_of(name, "float32")
    assert all(np.isfinite(leaf).all() for step in steps for leaf in jax.tree.leaves(step.matrix))
    v = jnp.asarray(1e-30 * ends[0], jnp.float32)[None]

    @jax.jit
    def every_order(a, b, c, d, e, v):
        then = affine.then
        orders = then(e, then(d, then(c, then(b, a)))), then(then(then(then(e, d), c), b), a), then(then(e, d), then(c, then(b, a)))
        return [(total, total.matrix.to_dense(), affine.apply(total, v)) for total in orders]

    for total, dense, image in every_order(*steps, v):
        assert type(total.matrix) is type(steps[0].matrix)
        entries = np.asarray(dense, np.longdouble)[0] * power(total.exponent) / ends[-1][:, None] * ends[0] / np.longdouble(1e20)
        assert_close(np.asarray(entries, np.float64), functools.reduce(lambda total, m: m @ total, inner)[0], 1e-4)
        assert_close(image[0] / ends[-1] * 1e10, functools.reduce(lambda v, m: m[0] @ v, inner, np.ones(N)), 1e-3)


@pytest.mark.parametrize("name", ("Diagonal", "Permutation", *GROWING, "BlockDiagonal", "DirectSum"))
def test_zeros_meet_no_infinity(name):
    """A coordinate that the first step drops, while all the others, and what follows, grow beyond the largest number."""
    grown, dropping = make(name, (1,), "float32", 1), make(name, (1,), "float32", 0)
    dropping = jax.tree.map(lambda x: x.at[..., 0].set(0), dropping)
    grown = jax.tree.map(lambda x: 1e18 * jnp.sign(x), grown)

    @jax.jit
    def crossed(dropping, grown, v):
        offset = jnp.zeros((1, N), jnp.float32)
        total = Affine(dropping, None, offset)
        for _ in range(4):
            total = affine.then(Affine(grown, None, offset), total)
        return affine.apply(total, v)

    dropped = np.flatnonzero((matrix_of(dropping) == 0).all((0, 1)))
    assert len(dropped)
    image = crossed(dropping, grown, jnp.zeros((1, N), jnp.float32).at[:, dropped].set(1e10))
    np.testing.assert_array_equal(image, np.zeros((1, N)))


def test_factors_that_meet_zeros_alone_have_no_say():
    one = LowRank(jnp.full(3, 1e-20, jnp.float32), jnp.zeros((3, 1), jnp.float32), jnp.full((1, 3), 1e30, jnp.float32))
    mantissa, exponent = one.balanced()
    np.testing.assert_array_equal(rebuilt(mantissa, exponent), np.eye(3) * np.float32(1e-20))


# --- blocks and sums of them ---------------------------------------------------------------------------------------------


@jax.jit
def joined(second, first):
    """second · first as `affine.then` joins them, and the vector that either makes of ones."""
    second, first = matched(second, first)
    outer, inner = second.balanced(), first.balanced()
    mantissa, carried = inner[0].shifted(outer[1])
    whole, grown = product(outer[0], mantissa).balanced()
    ones = jnp.ones(first.size)
    return (whole.to_dense(), inner[1] + carried + grown), (second.apply(first.apply(ones)), product(second, first).apply(ones))


@pytest.mark.parametrize("second, first", list(itertools.product(("Dense", "Scaled", *GROWING), repeat=2)))
def test_blocks_of_every_kind_join(second, first):
    """Blocks that do not shift freely, or are of two kinds, are matched before anything is scaled."""
    ones = Diagonal(jnp.ones(2))
    left, right = (DirectSum((BlockDiagonal(make(name, (5, count), seed=count), (3,)), ones)) for name, count in ((second, 3), (first, 1)))
    (mantissa, exponent), (one_by_one, at_once) = jax.device_get(joined(left, right))
    want = matrix_of(left) @ matrix_of(right)
    assert_close(np.asarray(mantissa * power(exponent)[..., None, :], np.float64), want, 1e-13)
    assert_close(at_once, one_by_one, 1e-13)


def test_banded_blocks_are_promoted_in_place():
    one = BlockDiagonal(banded(jnp.asarray(np.random.default_rng(0).standard_normal((5, 1, 3, 8))), (1, 1)), (4,))
    square = one.after(one)
    fourth = square.after(square)
    assert isinstance(square.inner, Banded) and isinstance(fourth.inner, Dense) and fourth.size == 32
    assert_close(fourth.to_dense(), np.linalg.matrix_power(np.asarray(one.to_dense()), 4), 1e-13)
    mantissa, exponent = fourth.balanced()
    np.testing.assert_array_equal(rebuilt(mantissa, exponent), np.asarray(fourth.to_dense()))


# --- recognised and formed -----------------------------------------------------------------------------------------------


def formed(kind, pattern, **evidence):
    form = kind.recognised(Evidence(pattern.shape, pattern, **evidence))
    assert isinstance(form, Form)
    matrix = np.zeros((3, *pattern.shape))
    matrix[:, pattern.rows, pattern.columns] = np.random.default_rng(0).standard_normal((3, pattern.count))
    one = kind.from_images(jnp.asarray(np.einsum("lij,kj->lki", matrix, form.seeds())), form)
    np.testing.assert_array_equal(one.to_dense(), matrix)
    known = form.abstract(jnp.float64)
    assert jax.tree.map(lambda x: x.shape[1:], one) == jax.tree.map(lambda x: x.shape, known)
    return form.pushes


@pytest.mark.parametrize("lower, upper", [(0, 0), (1, 1), (2, 0), (0, 3), (3, 2)])
def test_a_band_takes_as_many_pushes_as_it_has_diagonals(lower, upper):
    i, j = np.indices((12, 12))
    assert formed(Banded, Pattern.of((i - j <= lower) & (j - i <= upper))) == lower + upper + 1


def test_a_stencil_takes_as_many_pushes_as_it_has_points():
    i, j = np.divmod(np.arange(81), 9)
    square = Pattern.of((np.abs(i[:, None] - i) <= 1) & (np.abs(j[:, None] - j) <= 1))
    assert formed(Sparse, square) == 9
    ring = np.eye(12, dtype=int) + np.roll(np.eye(12, dtype=int), 1, axis=0)
    assert formed(Sparse, Pattern.of(ring)) == 2
    pooling = Pattern((6, 12), np.arange(12) // 2, np.arange(12))
    assert formed(Sparse, pooling) == 2


def test_what_would_be_no_smaller_is_not_recognised():
    full = Pattern.of(np.ones((4, 4)))
    assert Banded.recognised(Evidence((4, 4), full)) is None
    assert Banded.recognised(Evidence((2, 4), Pattern((2, 4), [0, 1], [0, 1]))) is None
    assert Banded.recognised(Evidence((4, 4))) is None
    half = Pattern((4, 4), np.arange(8) // 2, np.arange(8) % 4)
    assert Sparse.recognised(Evidence((4, 4), half)) is None and Sparse.recognised(Evidence((4, 4))) is None
    assert LowRank.recognised(Evidence((9, 9))) is None and LowRank.recognised(Evidence((9, 9), rank=4)) is None
    assert Kronecker.recognised(Evidence((9, 9))) is None


def test_a_bottleneck_is_formed_from_its_factors():
    evidence = Evidence((9, 9), rank=3)
    form = LowRank.recognised(evidence)
    assert form is not None and form.pushes == 0 and LowRank.recognised(evidence.transpose()) is not None
    down, up = (jnp.asarray(np.random.default_rng(seed).standard_normal(shape)) for seed, shape in enumerate([(9, 3), (3, 9)]))
    layer = lambda h, z: jnp.sin(h) + jnp.tanh(z @ up)
    h = jnp.linspace(-1, 1, 9)
    z = jnp.tanh(h @ down)
    left = jax.vmap(lambda e: jax.jvp(lambda z: layer(h, z), (z,), (e,))[1])(jnp.eye(3))
    right = jax.vmap(jax.vjp(lambda h: jnp.tanh(h @ down), h)[1])(jnp.eye(3))[0]
    one = LowRank.from_factors(jax.jvp(lambda h: layer(h, z), (h,), (jnp.ones(9),))[1], left, right)
    assert_close(one.to_dense(), jax.jacobian(lambda h: layer(h, jnp.tanh(h @ down)))(h), 1e-14)
    assert jax.tree.map(lambda x: x.shape, one) == jax.tree.map(lambda x: x.shape, form.abstract(jnp.float64))
