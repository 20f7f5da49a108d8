"""Every method × kind × length × dtype × losses, against `jax.grad` of the plain sequential program."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KINDS, METHODS, TOLERANCE, assert_close, gap, loop_activations, make_chain, make_cotangents, reference, scan_activations

import parscan

LOOPED = 7  # up to here the reference is a plain loop


@functools.cache
def wanted(kind, length, dtype, everywhere):
    activations = loop_activations if length <= LOOPED else scan_activations
    return reference(activations, make_chain(kind, length, dtype), *make_cotangents(kind, length, dtype, everywhere))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_by_scan_agrees_with_the_loop(kind, dtype):
    chain, cotangents = make_chain(kind, LOOPED, dtype), make_cotangents(kind, LOOPED, dtype, True)
    assert_close(reference(scan_activations, chain, *cotangents), wanted(kind, LOOPED, dtype, True), TOLERANCE[dtype] * 1e-1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_jacobians_do_not_commute_and_no_gradient_vanishes(kind):
    chain = make_chain(kind, 64, "float64")
    if kind != "Diagonal":
        w = chain.params["w"]
        assert gap(w[0] @ w[1], w[1] @ w[0]) > 0.1
    _, states = wanted(kind, 1000, "float64", False)
    norms = jnp.linalg.norm(states.reshape(1001, -1), axis=-1)
    assert norms.min() > 1e-3 * norms.max()


# The precision has no part in how a length is taken apart.
SIZES = [*(("float64", length) for length in (0, 1, 2, 3, 7, 64, 1000, 1021)), ("float32", 7), ("float32", 1000)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, length", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_parallel_backward(method, kind, dtype, length):
    chain = make_chain(kind, length, dtype)
    y, activations = parscan.forward(chain.layer, chain.params, chain.x, params_axes=chain.params_axes)
    assert activations.shape == (length + 1, *chain.x.shape)
    assert_close(y, activations[-1], 0)
    for everywhere in (False, True) if length in (0, 1, 2, 3, 1000) else (True,):  # losses at the end alone, and at every layer
        end, layers = make_cotangents(kind, length, dtype, everywhere)
        grads = parscan.parallel_backward(
            chain.layer, chain.params, activations, end, layer_cotangents=layers, params_axes=chain.params_axes, method=METHODS[method]
        )
        params, states = wanted(kind, length, dtype, everywhere)
        assert all(g.dtype == dtype for g in jax.tree.leaves(grads))
        assert_close(grads.params, params, TOLERANCE[dtype])
        assert_close(list(np.asarray(grads.activations)), list(np.asarray(states)), TOLERANCE[dtype])  # each activation by itself
        assert_close(grads.input, states[0], TOLERANCE[dtype])
        assert type(grads.plan.method) is type(METHODS[method])
        if method != "lax":
            assert grads.plan.kind == kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_grad_of_forward(method, kind, dtype="float64", length=7):
    """The same gradients through `jax.grad`, which needs no stored activations from the user."""
    chain = make_chain(kind, length, dtype)
    end, layers = make_cotangents(kind, length, dtype, True)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def grads(params, x):
        y, activations = parscan.forward(chain.layer, params, x, params_axes=chain.params_axes, method=METHODS[method])
        return jnp.sum(y * end) + jnp.sum(activations * layers)

    params, states = wanted(kind, length, dtype, True)
    assert_close(grads(chain.params, chain.x), (params, states[0]), TOLERANCE[dtype])


@pytest.mark.parametrize(
    "method",
    [
        parscan.Chunked(1),
        parscan.Chunked(5),
        parscan.Chunked(5, 0),
        parscan.Chunked(5, 2),
        parscan.Chunked(64, guard=False),
        parscan.Chunked(100),
        parscan.Walk(1),
        parscan.Walk(5),
        parscan.Walk(32),
        parscan.Walk(100),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_do_and_do_not_divide_the_length(method, kind):
    chain = make_chain(kind, 64, "float64")
    _, activations = parscan.forward(chain.layer, chain.params, chain.x, params_axes=chain.params_axes)
    end, layers = make_cotangents(kind, 64, "float64", True)
    grads = parscan.parallel_backward(chain.layer, chain.params, activations, end, layer_cotangents=layers, params_axes=chain.params_axes, method=method)
    assert_close((grads.params, grads.activations), wanted(kind, 64, "float64", True), 1e-10)


def value_and_derivatives(f):
    """f, its gradient and its tangent in all arguments, in one compilation."""
    return jax.jit(lambda *a: (f(*a), jax.grad(lambda *a: jnp.sum(f(*a) ** 3), tuple(range(len(a))))(*a), jax.jvp(f, a, a)[1]))


def linear_problem(kind):
    """(matrices, offsets, h_0) of 13 steps."""
    weights, shape = make_chain(kind, 13, "float64").params["w"], {"Dense": (13, 4, 4), "BlockDiagonal": (13, 3, 4, 4), "Diagonal": (13, 5)}[kind]
    weights = jnp.broadcast_to(weights[:, None] if kind == "BlockDiagonal" else weights, shape)
    n = KINDS[kind](weights).size
    return weights, jnp.sin(jnp.arange(13.0 * n)).reshape(13, n), jnp.cos(jnp.arange(float(n)))


@functools.cache
def linear_by_lax(kind, reverse):
    def sequential(weights, b, h0):
        def step(h, one):
            h = KINDS[kind](one[0]).apply(h) + one[1]
            return h, h

        return jax.lax.scan(step, h0, (weights, b), reverse=reverse)[1]

    return value_and_derivatives(sequential)(*linear_problem(kind))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_linear_scan(method, kind, reverse):
    parallel = lambda weights, b, h0: parscan.linear_scan(KINDS[kind](weights), b, h0, reverse=reverse, method=METHODS[method])
    (value, *derivatives), (want, *wanted) = value_and_derivatives(parallel)(*linear_problem(kind)), linear_by_lax(kind, reverse)
    assert_close(value, want, 1e-12)
    assert_close(derivatives, wanted, 1e-11)


@pytest.mark.parametrize("method, length, dtype", [*((method, length, "bfloat16") for method in METHODS for length in (0, 9)), ("tree", 9, "float16")])
def test_linear_scan_of_no_steps_and_in_half_precision(method, length, dtype):
    a, b, h0 = jnp.full((length, 3), 0.5, dtype), jnp.ones((length, 3), dtype), jnp.ones(3, dtype)

    def forth_and_back(A):
        hs, back = jax.vjp(lambda b, h0: parscan.linear_scan(A, b, h0, method=METHODS[method]), b, h0)
        return hs, back(hs)[1]

    every = [parscan.Diagonal(a), parscan.Dense(a[..., None] * jnp.eye(3, dtype=dtype)), parscan.BlockDiagonal(a[..., None, None])]
    for hs, to_start in jax.jit(lambda every: [forth_and_back(A) for A in every])(every):
        assert hs.dtype == dtype and to_start.dtype == dtype
        assert_close(hs.astype("float32"), 2 - 0.5 ** jnp.arange(1.0, length + 1)[:, None] * jnp.ones(3), 1e-2)


@functools.cache
def by_one_map(kind, method):
    """Value and gradient in the one map; by JAX with as many maps as steps."""
    shape = {"Dense": (4, 4), "BlockDiagonal": (3, 4, 4), "Diagonal": (5,)}[kind]
    weights = jnp.broadcast_to(make_chain(kind, 3, "float64").params["w"][0], shape)
    n = KINDS[kind](weights).size
    b, h0 = jnp.sin(jnp.arange(11.0 * n)).reshape(11, n), jnp.ones(n)

    def loss(weights):
        maps = jnp.broadcast_to(weights, (11, *shape)) if method is None else weights
        return jnp.sum(parscan.linear_scan(KINDS[kind](maps), b, h0, method=METHODS.get(method, "lax")) ** 2)

    return jax.jit(jax.value_and_grad(loss))(weights)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_scan_with_one_map_for_all_steps(method, kind):
    assert_close(by_one_map(kind, method), by_one_map(kind, None), 1e-12)


SAME = 0.5 * jnp.eye(3) + 0.1


@functools.cache
def steps_all_alike(scan, **options):
    loss = lambda w, h, x: jnp.sum(scan(lambda h, x: (h @ w + x, h), h, x, **options)[1] ** 2)
    return jax.jit(jax.grad(loss, (0, 1, 2)))(SAME, jnp.ones((2, 3)), jnp.sin(jnp.arange(600.0)).reshape(200, 1, 3))


@pytest.mark.parametrize("method", [*METHODS.values(), "auto", parscan.Walk(16)], ids=str)
def test_steps_that_are_all_the_same_linear_map(method):
    """Nothing tells one Jacobian from another: only their number remains, over several segments."""
    assert_close(steps_all_alike(parscan.scan, method=method), steps_all_alike(jax.lax.scan), 1e-10)
    if method != "auto":
        by = lambda method: jax.jit(lambda w: parscan.linear_scan(parscan.Dense(w), jnp.ones((64, 3)), jnp.zeros(3), method=method))(SAME)
        assert_close(by(method), by("lax"), 1e-12)
