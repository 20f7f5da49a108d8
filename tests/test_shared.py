"""Blocks that are proved equal, along a batch, along the columns of a matrix state or over all steps: kept once, and multiplied once, at every level."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import TOLERANCE, assert_close

import parscan
from parscan import affine

T, BATCH, D, COLUMNS = 12, 3, 5, 7
RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((D, D)) / D**0.5
KEYS, GATES = RANDOM.standard_normal((T, D)) / D**0.5, RANDOM.uniform(0.5, 1, (T, BATCH))


def memory(h, x):
    """h ← g (I − k kᵀ) h, one k and g for all columns."""
    k, gates = x
    return gates[0] * (h - jnp.outer(k, k @ h))


# From a name: the step, the shape of the state, how many numbers one product of two steps' Jacobians takes, for one pair, and the kinds of blocks.
CASES = {
    "columns": (memory, (D, COLUMNS), D * D),
    "batch": (lambda h, x: x[1][0] * (h @ W), (BATCH, D), D * D),
    "batch and columns": (lambda h, x: jax.vmap(memory, (0, None))(h, x), (BATCH, D, COLUMNS), D * D),
    "columns alone": (lambda h, x: x[1][:, None, None] * jnp.einsum("ij,bjc->bic", W, h), (BATCH, D, COLUMNS), BATCH * D * D),
    "batch alone": (lambda h, x: jnp.einsum("cij,bcj->bci", jnp.stack([W, W.T]), h) * x[1][0], (BATCH, 2, D), 2 * D * D),
    "a batch in two leaves": (lambda h, x: (jnp.tanh(x[1][0]) * h[0] @ W + h[1], h[1] @ W * x[1][1]), ((BATCH, D), (BATCH, D)), 4 * D * D),
    "two groups": (lambda h, x: (x[1][0] * h[0] @ W, jnp.tanh(h[1] @ W)), ((BATCH, D), (BATCH, D)), D * D + BATCH * D * D),
    "nothing": (lambda h, x: jnp.tanh(h @ W + x[1][0]), (BATCH, D), BATCH * D * D),
}


def state_of(shapes, dtype):
    leaf = lambda shape, seed: jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)
    return tuple(leaf(shape, i) for i, shape in enumerate(shapes)) if isinstance(shapes[0], tuple) else leaf(shapes, 0)


@pytest.fixture
def products(monkeypatch):
    """(how many products, entries of all) for each round that a tree makes."""
    jax.clear_caches()
    seen, then = [], affine.then

    def recorded(second, first):
        made = then(second, first)
        seen.append((made.offset.shape[0], sum(leaf.size for leaf in jax.tree.leaves(made.matrix))))
        return made

    monkeypatch.setattr(affine, "then", recorded)
    return seen


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_shared_is_multiplied_once_at_every_level(name, dtype, products):
    step, shapes, entries = CASES[name]
    state, xs = state_of(shapes, dtype), (jnp.asarray(KEYS, dtype), jnp.asarray(GATES, dtype))

    def gradients(scan):
        def f(h, x):
            h = jax.tree.map(lambda new: new.astype(dtype), step(h, x))
            return h, h

        loss = lambda h, xs: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(scan(f, h, xs)))
        return jax.grad(loss, (0, 1))(state, xs)

    got = gradients(lambda f, h, xs: parscan.scan(f, h, xs, method="tree"))
    assert [count for count, _ in products[-3:]] == [5, 2, 1]  # of 12 steps the last needs no map
    assert all(made <= count * entries for count, made in products)  # the first ones may be less than full matrices
    assert all(made == count * entries for count, made in products if count < 5)
    assert_close(got, gradients(lax.scan), TOLERANCE[dtype])


def test_what_is_shared_over_all_steps_is_squared(products):
    step = lambda h, x: (h @ W + x[0], None)
    gradient = lambda scan: jax.grad(lambda h: jnp.sum(scan(step, h, jnp.asarray(KEYS))[0] ** 2))(jnp.ones((BATCH, D)))
    got = gradient(lambda f, h, xs: parscan.scan(f, h, xs, method="tree"))
    assert {entries for _, entries in products} == {D * D}
    assert_close(got, gradient(lax.scan), TOLERANCE["float64"])


def test_layers_that_share_and_layers_that_do_not(products):
    """A product with blocks that differ has blocks that differ."""
    layers = [lambda w, h: h @ w, lambda w, h: jnp.tanh(h @ w), lambda w, h: h @ w] * 6
    params = [W + 0.01 * i for i in range(18)]
    grads = parscan.parallel_backward(layers, params, parscan.forward(layers, params, jnp.ones((BATCH, D)))[1], jnp.ones((BATCH, D)), method="tree")

    def loss(params):
        h = jnp.ones((BATCH, D))
        for layer, w in zip(layers, params, strict=True):
            h = layer(w, h)
        return h.sum()

    assert products
    assert_close(grads.params, jax.grad(loss)(params), TOLERANCE["float64"])
