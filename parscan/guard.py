"""Whether what a parallel pass found is what one map after another gives, asked on the device.

What a product of maps tells of a vector far along, the maps themselves tell, too, from the vector a piece before it. Where the two differ the product
has rounded, and what follows multiplies the difference: each such *defect* travels the rest of the chain as the vector does, through the very products
that are there, and what arrives is the *error* against one map after another. Locally every product may be right to the last digit and the error still
drown the vector: the chain grows along directions in which the vector has no part. Where the error is beyond half the digits, and wherever anything is not
finite (products overflow, or meet 0 · inf or NaN), the maps are applied one after another, and the result is theirs.

That reads cotangents, and is yet differentiable: a sweep is the inside of a linear solve (`parscan.system`), of which JAX
differentiates the equation, never the way it is solved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from parscan.layout import Group

FALLBACK = "parscan_one_after_another"  # its name in programs and profiles


class Errors(NamedTuple):
    """At some places of a journey, how far the vector is from where one map after another takes it.

    at: (m, p).
    size: (m, p), the largest entries of vectors and offsets since the place before.
    end: (p,), at the end of the journey.
    """

    at: Array
    size: Array
    end: Array


class Found(NamedTuple):
    """What leaves the maps of one chain.

    values: (L, p). errors: what the vector that enters is off by, None for nothing -> Errors; None where there are none.
    """

    values: Array
    errors: Callable[[Array | None], Errors | None] = lambda _: None


class Check(NamedTuple):
    """What is known of a journey so far. again: whether it is taken one map after another. good: whether all was sound. error: what the vector is off by."""

    again: Array
    good: Array
    error: Any


def is_sound(values: Array, errors: Errors | None, groups: Sequence[Group], epsilon: float, reverse: bool) -> Array:
    """Whether all is finite, and every error within half the digits of its block's vector, at most a quarter. A bool, one for a whole batch.

    A block of a single coordinate is compared with the largest that it has been on the journey: sums of a product and an offset cancel by chance now and then.

    epsilon: of the precision that the maps are computed in.
    """
    good = jnp.isfinite(values).all()
    if errors is not None:
        info = jnp.finfo(values.dtype)
        for error, size, group in zip(_by_block(jnp.abs(errors.at), groups), _by_block(errors.size, groups), groups, strict=True):
            size = lax.cummax(size, reverse=reverse) if group.side == 1 else size
            good &= (error <= min(8 * math.sqrt(epsilon), 0.25) * size + info.tiny / info.eps).all()
    return _everywhere(good)


def roundings(values: Array, epsilon: float) -> Array:
    """What some rounding may have done to each of (m, p) values: up to `epsilon` of it either way, as if by chance, so that over many steps little adds up."""
    bits = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32) ^ (lax.broadcasted_iota(jnp.uint32, values.shape, 0) * np.uint32(0x9E3779B9))
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):  # as in MurmurHash3
        bits = (bits ^ (bits >> 15)) * np.uint32(multiplier)
    return values * (epsilon * (bits.astype(values.dtype) * 2.0**-31 - 1))


def _by_block(x: Array, groups: Sequence[Group]) -> list[Array]:
    """Of each group, the largest entry of every block: (m, p) -> (m, blocks). NaN where there is one."""
    found, start = [], 0
    for group in groups:
        part = x[:, start : start + group.size].reshape(x.shape[0], group.blocks, group.side)
        found.append(part.max(-1) if group.size else part[..., 0:0].reshape(x.shape[0], 0))
        start += group.size
    return found


@jax.custom_batching.custom_vmap
def _everywhere(good: Array) -> Array:
    """Under `vmap` one answer for the batch: with one for each entry, a `cond` would compute both branches, always."""
    return good


@_everywhere.def_vmap
def _(axis_size: int, in_batched: Any, good: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return _everywhere(good.all()), False


def guarded(values: Any, good: Array, otherwise: Callable[[], Any]) -> Any:
    """`values` where they are good, else what `otherwise` computes, which costs nothing until then."""
    return lax.cond(good, lambda: values, _named(otherwise))


def repeated(journey: Callable[[Array], tuple[Any, Array]], like: Any) -> Any:
    """What `journey` finds, if that is good; else what it finds when told to go one map after another, in the same place: the two are never held at once.

    journey: (whether to go one map after another) -> (what is found, whether that is good). like: shapes and dtypes of what is found.
    """

    def go(carry):
        again = carry[1]
        found, good = journey(again)
        return good | again, jnp.ones((), bool), found

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return lax.while_loop(lambda carry: ~carry[0], go, (jnp.zeros((), bool), jnp.zeros((), bool), nothing))[2]


def either(again: Array, anew: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """Of a `repeated` journey, one piece."""
    return lax.cond(again, _named(otherwise), anew)


def _named(otherwise: Callable[[], Any]) -> Callable[[], Any]:
    def fallback():
        return otherwise()

    fallback.__name__ = fallback.__qualname__ = FALLBACK
    return jax.jit(fallback)
