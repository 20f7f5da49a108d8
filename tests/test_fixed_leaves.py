"""Leaves of the carry that every step hands on as they are: constants of the loop, part of no Jacobian."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import assert_close

import parscan

W = jnp.sin(jnp.arange(16.0)).reshape(4, 4)
XS = jnp.cos(jnp.arange(72.0)).reshape(6, 3, 4)
CARRY = {"h": jnp.ones((3, 4)), "w": W, "key": jax.random.key(0), "scale": 0.5, "ids": np.array([2, 0, 1, 3]), "nothing": ()}


def step(carry, x):
    """As a framework keeps a layer's weights in the carry; only `h` is the state."""
    noise = jax.random.normal(carry["key"], (4,))
    h = jnp.tanh(carry["h"][:, carry["ids"]] @ carry["w"] + carry["scale"] * x + noise)
    return carry | {"h": h}, (h, carry["w"][0])


def loss(scan, h, w, scale, xs, **options):
    final, (states, rows) = scan(step, CARRY | {"h": h, "w": w, "scale": scale}, xs, **options)
    return jnp.sum(final["h"] ** 2) + jnp.sum(final["w"] ** 3) * final["scale"] + jnp.sum(states**3) + jnp.sum(rows**2)


ARGS = (CARRY["h"], W, 0.5, XS)
TRANSFORMED = {
    "grad": lambda f: jax.grad(f, (0, 1, 2, 3))(*ARGS),
    "jvp": lambda f: jax.jvp(f, ARGS, ARGS),
    "hvp": lambda f: jax.jvp(jax.grad(f, (0, 1)), ARGS, ARGS),
    "vmap of the weights": lambda f: jax.vmap(jax.grad(f, (0, 1)), (None, 0, None, None))(CARRY["h"], jnp.stack([W, 2 * W]), *ARGS[2:]),
    "jit": lambda f: jax.jit(jax.grad(f, (0, 1, 2)))(*ARGS),
}


@pytest.mark.parametrize("name, options", [*((name, {}) for name in TRANSFORMED), ("grad", {"reverse": True})])
def test_derivatives(name, options):
    ours = functools.partial(parscan.scan, method=parscan.Chunked(2))
    got, want = (TRANSFORMED[name](lambda *args, scan=scan: loss(scan, *args, **options)) for scan in (ours, lax.scan))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert_close(got, want, 1e-10)


def types(tree):
    return jax.tree.map(jax.typeof, tree)


@pytest.mark.parametrize("length", [0, 1, 6])
def test_values_and_types(length):
    got, want = (scan(step, CARRY, XS[:length]) for scan in (functools.partial(parscan.scan, method="tree"), lax.scan))
    assert types(got) == types(want)
    numbers = lambda out: [
        jax.random.key_data(leaf) if jax.dtypes.issubdtype(jax.typeof(leaf).dtype, jax.dtypes.prng_key) else leaf for leaf in jax.tree.leaves(out)
    ]
    assert_close(numbers(got), numbers(want), 1e-14)


def test_they_are_no_part_of_the_state():
    plan = parscan.plan(step, CARRY, XS, method="tree")
    assert plan.blocks == {4: 3}
    assert "`carry['h']`" in str(plan)


def test_two_leaves_that_become_one():
    """Only the one that stays what it is is fixed."""

    def f(carry, x):
        a, b, h = carry
        return (a, a, jnp.tanh(b * h + x)), None

    given = (W[0], W[1], W[2])
    total = lambda scan: lambda *carry: sum(leaf.sum() for leaf in scan(f, carry, XS[:, 0])[0])
    got, want = (jax.grad(total(scan), (0, 1, 2))(*given) for scan in (functools.partial(parscan.scan, method="tree"), lax.scan))
    assert_close(got, want, 1e-12)


def test_nothing_else_in_the_carry():
    f = lambda w, x: (w, jnp.tanh(x @ w))
    assert parscan.plan(f, W, XS, method="tree").blocks == {1: W.size}
    got, want = (jax.grad(lambda w, scan=scan: jnp.sum(scan(f, w, XS)[1] ** 2) + w.sum())(W) for scan in (parscan.scan, lax.scan))
    assert_close(got, want, 0)


def test_a_claim_speaks_of_the_whole_carry():
    f = lambda carry, x: ((carry[0], jnp.tanh(carry[0] * carry[1] + x)), None)
    assert parscan.plan(f, (W[0], W[1]), XS[:, 0], structure="dense", method="tree").blocks == {8: 1}
    assert parscan.plan(f, (W[0], W[1]), XS[:, 0], method="tree").blocks == {1: 4}


def test_checked_at_run_time():
    got = jax.jit(jax.grad(lambda w: loss(functools.partial(parscan.scan, method="tree", debug=True), CARRY["h"], w, 0.5, XS)))(W)
    assert_close(got, jax.grad(lambda w: loss(lax.scan, CARRY["h"], w, 0.5, XS))(W), 1e-10)
