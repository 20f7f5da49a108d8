"""Every cell of the table: its structure is what its numerical Jacobians show and what `plan` says, its gradients are those of `lax.scan`."""

from __future__ import annotations

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.csgraph
from cells import CELLS
from jax import lax
from jax.flatten_util import ravel_pytree
from support import assert_close

import parscan

each_cell = pytest.mark.parametrize("name", CELLS)


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def taken_apart(tree):
    """The floating-point leaves, and a function that puts others in their place."""
    leaves, structure = jax.tree.flatten(tree)

    def put_back(some):
        some = iter(some)
        return jax.tree.unflatten(structure, [next(some) if is_float(leaf) else leaf for leaf in leaves])

    return [leaf for leaf in leaves if is_float(leaf)], put_back


def one_member(cell):
    """State and inputs as the step sees them."""
    return (jax.tree.map(lambda a: a[0], cell.state), jax.tree.map(lambda a: a[:, 0], cell.xs)) if cell.vmapped else (cell.state, cell.xs)


# --- the table against numbers ---------------------------------------------------------------------------------------------------


@functools.cache
def jacobians(name):
    """Of every step at several random states, the state's leaves raveled one after another: (points, n, n)."""
    cell = CELLS[name]
    state, xs = one_member(cell)
    floats, put_back = taken_apart(state)
    random = np.random.default_rng(0)
    flat, unravel = ravel_pytree(floats)
    states = jnp.asarray(random.standard_normal((16, flat.size)))

    def raveled(vector, x):
        return jnp.concatenate([leaf.ravel() for leaf in taken_apart(cell.step(put_back(unravel(vector)), x))[0]])

    one = jax.jacfwd(raveled)
    found = jax.jit(lambda states, xs: jax.vmap(lambda x: jax.vmap(lambda v: one(v, x))(states))(xs))(states, xs)
    return np.asarray(found).reshape(-1, flat.size, flat.size)


def components(pattern):
    """Sets of coordinates that mix, directly or not."""
    count, label = scipy.sparse.csgraph.connected_components(pattern, directed=False)
    return [np.flatnonzero(label == c) for c in range(count)]


def rank(matrices):
    return max(np.linalg.matrix_rank(matrices, rtol=1e-9), default=0)


def rank_beside_the_diagonal(blocks):
    """The rank of what stands beside any diagonal: of submatrices without diagonal entries, over several halvings of the coordinates."""
    n, random, found = blocks.shape[-1], np.random.default_rng(0), 0
    for _ in range(6):
        order = random.permutation(n)
        found = max(found, rank(blocks[:, order[: n // 2]][:, :, order[n // 2 :]]))
    return found


def is_kronecker(blocks):
    """Whether each is A ⊗ B: rank 1 once the entries of A index the rows, those of B the columns."""
    n = blocks.shape[-1]
    pairs = [(p, n // p) for p in range(2, n) if n % p == 0]
    return any(rank(blocks.reshape(-1, p, q, p, q).transpose(0, 1, 3, 2, 4).reshape(-1, p * p, q * q)) == 1 for p, q in pairs)


def kind_shown(jacobians, blocks):
    """The kind that these numbers have."""
    n, pattern = jacobians.shape[-1], (jacobians != 0).any(0)
    if np.all(jacobians == np.eye(n)):
        return "Identity"
    if max(map(len, blocks)) == 1:
        return "Diagonal"
    if pattern.sum(0).max() <= 1 and pattern.sum(1).max() <= 1:
        return "Permutation"
    widest = max(blocks, key=len)
    n, inside = len(widest), jacobians[:, widest][:, :, widest]
    rows, columns = np.nonzero((inside != 0).any(0))
    if 2 * (2 * abs(rows - columns).max() + 1) < n:
        return "Banded"
    if 2 * len(rows) < n * n:
        return "Sparse"
    if is_kronecker(inside):
        return "Kronecker"
    if rank_beside_the_diagonal(inside) < n // 2:
        return "LowRank"
    return "Dense" if len(blocks) == 1 else "BlockDiagonal"


@each_cell
def test_the_table_is_what_the_numbers_show(name):
    found = jacobians(name)
    assert np.isfinite(found).all()
    blocks = components((found != 0).any(0))
    assert dict(collections.Counter(map(len, blocks))) == CELLS[name].blocks
    assert kind_shown(found, blocks) == CELLS[name].kind


# --- the package -----------------------------------------------------------------------------------------------------------------


@each_cell
def test_structure(name):
    cell = CELLS[name]
    plan = parscan.plan(lambda state, x: (cell.step(state, x), None), *one_member(cell))
    assert (plan.kind, plan.blocks) == (cell.kind, cell.blocks)


WALKED = {cell.kind: name for name, cell in CELLS.items()}  # its products with vectors are those of a tree, too: one cell a kind


@each_cell
def test_gradients(name):
    """In the state, the inputs and the weights, of a loss that reads every state."""
    cell = CELLS[name]
    (states, state_of), (inputs, xs_of), (weights, weights_of) = map(taken_apart, (cell.state, cell.xs, cell.weights))

    def loss(scan, weights, states, inputs):
        def f(state, x):
            state = cell.step(state, x, weights_of(weights))
            return state, taken_apart(state)[0]

        run = lambda state, xs: scan(f, state, xs)[1]
        run = jax.vmap(run, in_axes=(0, 1)) if cell.vmapped else run
        return sum(jnp.sum(jnp.cos(leaf)) for leaf in run(state_of(states), xs_of(inputs)))

    methods = ["tree", "walk"] if name in WALKED.values() else ["tree"]
    scans = [lax.scan, *(functools.partial(parscan.scan, method=method) for method in methods)]
    gradients = jax.jit(lambda *arguments: [jax.grad(functools.partial(loss, scan), (0, 1, 2))(*arguments) for scan in scans])
    want, *got = gradients(weights, states, inputs)
    assert all(jnp.linalg.norm(leaf) > 1e-6 for leaf in jax.tree.leaves(want))
    for some in got:
        assert_close(some, want, 1e-10)
