"""Products over several axes are taken over one, and are the same products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from support import assert_close, equations

from parscan.jaxprs import contracted

A, B, C = (jnp.sin(jnp.arange(float(n))).reshape(shape) for n, shape in ((120, (4, 5, 6)), (140, (4, 5, 7)), (60, (2, 5, 6))))
CASES = {
    "two leading axes": (lambda a, b: jnp.einsum("tbi,tbj->ij", a, b), (A, B)),
    "an axis kept in front": (lambda a, c: jnp.einsum("tbi,sbi->ts", a, c), (A, C)),
    "beside a batch axis": (lambda a, b: jnp.einsum("xtbi,xtbj->xij", a, b), (jnp.stack([A, 2 * A]), jnp.stack([B, -B]))),
    "inside a jit": (lambda a, b: jax.jit(lambda a, b: 2 * jnp.einsum("tbi,tbj->ij", a, b))(a, b + 1) + 1, (A, B)),
    "out of order": (lambda a, b: jnp.einsum("tbi,btj->ij", a, b.swapaxes(0, 1)), (A, B)),
    "apart": (lambda a, c: jnp.einsum("tib,tjb->ij", a, c), (C, -C)),
    "none": (lambda a, b: jnp.sin(a).sum() * b, (A, B)),
    "an output that is an input, and one that is a number": (lambda a, b: (a, 3.0, a.sum()), (A, B)),
    "a product of products": (lambda a, b: jnp.einsum("ij,tbi,tbj->", jnp.einsum("tbi,tbj->ij", a, b), a, b), (A, B)),
    "the pull-back of a batched layer": (lambda a, b: jax.vjp(lambda w: jax.vmap(lambda h: jnp.tanh(h @ w))(a), jnp.ones((6, 7)))[1](b)[0], (A, B)),
}


def several(f, *args):
    """How many products sum over more than one axis."""
    products = [eqn for eqn in equations(jax.make_jaxpr(f)(*args)) if eqn.primitive.name == "dot_general"]
    return sum(len(eqn.params["dimension_numbers"][0][0]) > 1 for eqn in products)


@pytest.mark.parametrize("name", CASES)
def test_the_same_values(name):
    f, args = CASES[name]
    got, want = contracted(f, *args), f(*args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert_close(got, want, 1e-13)
    assert_close(jax.jit(lambda *a: contracted(f, *a))(*args), want, 1e-13)
    assert_close(jax.vmap(lambda *a: contracted(f, *a))(*(jnp.stack([a, 2 * a]) for a in args)), jax.vmap(f)(*(jnp.stack([a, 2 * a]) for a in args)), 1e-13)


@pytest.mark.parametrize("name", ["two leading axes", "an axis kept in front", "beside a batch axis", "inside a jit", "the pull-back of a batched layer"])
def test_one_axis_is_left(name):
    f, args = CASES[name]
    assert several(f, *args) > 0, "nothing to merge: the case tests nothing"
    assert several(lambda *a: contracted(f, *a), *args) == 0
