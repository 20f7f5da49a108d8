"""A callback in the step: once for every step, in order, on the forward pass, whatever is made of the scan; progress beside a parallel backward pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from support import assert_close

import parscan

LENGTH = 12
XS = jnp.sin(jnp.arange(LENGTH * 6, dtype="float32")).reshape(LENGTH, 2, 3)
START = jnp.zeros((2, 3), "float32")


def step(h, x):
    h = jnp.tanh(0.5 * h + x)
    return h, h


def watched(report, ordered, h, given):
    i, x = given
    jax.debug.callback(report, i, ordered=ordered)
    return step(h, x)


def loss(scan, report, ordered, h, xs=XS, reverse=False):
    final, states = scan(functools.partial(watched, report, ordered), h, (jnp.arange(LENGTH), xs), reverse=reverse)
    return jnp.sum(final) + jnp.mean(states**2)


def over_a_batch(f):
    return lambda h: jax.vmap(f)(jnp.stack([h, h + 1]))


TRANSFORMED = {
    "as it is": lambda f: f,
    "jit": jax.jit,
    "grad": jax.grad,
    "jit of grad": lambda f: jax.jit(jax.grad(f)),
    "jit of value_and_grad": lambda f: jax.jit(jax.value_and_grad(f)),
    "jvp": lambda f: lambda h: jax.jvp(f, (h,), (h,)),
    "vjp": lambda f: lambda h: jax.vjp(f, h)[1](jnp.float32(1)),
    "jit of vmap of grad": lambda f: jax.jit(over_a_batch(jax.grad(f))),
}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_once_for_every_step_in_order(transformed, reverse):
    def run(scan):
        seen = []
        report = lambda i: seen.append(int(i))
        found = jax.block_until_ready(transformed(lambda h: loss(scan, report, True, h, reverse=reverse))(START))
        jax.effects_barrier()
        return found, seen

    (got, seen), (want, seen_by_lax) = run(parscan.scan), run(jax.lax.scan)
    assert seen == seen_by_lax == [*range(LENGTH)][:: -1 if reverse else 1]
    assert_close(got, want, 1e-6)


def test_unordered_as_often():
    seen = []
    jax.block_until_ready(jax.jit(jax.grad(lambda h: loss(parscan.scan, lambda i: seen.append(int(i)), False, h)))(START))
    jax.effects_barrier()
    assert sorted(seen) == [*range(LENGTH)]


def test_forward_and_backward_passes_of_a_training_step_do_not_mix():
    """Two updates in one compiled program: the second begins when the first has been seen to its end."""
    seen = []

    @jax.jit
    def train(xs):
        for _ in range(2):
            xs = xs - 0.1 * jax.grad(lambda xs: loss(parscan.scan, lambda i: seen.append(int(i)), True, START, xs))(xs)
        return xs

    jax.block_until_ready(train(XS))
    jax.effects_barrier()
    assert seen == [*range(LENGTH)] * 2


@pytest.mark.parametrize("method", ["tree", "chunked", "walk"])
def test_a_parallel_method_refuses_it(method):
    scan = functools.partial(parscan.scan, method=method)
    with pytest.raises(ValueError, match=r"`debug_callback` at .*side effect"):
        loss(scan, print, True, START)


@pytest.mark.parametrize("transformed", [jax.jit, lambda f: jax.jit(jax.grad(f))], ids=["jit", "jit of grad"])
def test_between_stretches_beside_a_parallel_backward_pass(transformed):
    seen = []

    def stretch(h, given):
        i, some = given
        h, states = parscan.scan(step, h, some, method="tree")
        jax.debug.callback(lambda i: seen.append(int(i)), i, ordered=True)
        return h, states

    def in_stretches(h):
        final, states = jax.lax.scan(stretch, h, (jnp.arange(4), XS.reshape(4, 3, 2, 3)))
        return jnp.sum(final) + jnp.mean(states**2)

    got = jax.block_until_ready(transformed(in_stretches)(START))
    jax.effects_barrier()
    assert seen == [0, 1, 2, 3]
    assert_close(got, transformed(lambda h: loss(jax.lax.scan, lambda i: None, True, h))(START), 1e-6)
