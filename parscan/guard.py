"""Whether what a parallel pass found is what one map after another gives, asked on the device.

Where a product of maps took a vector a long way (*told*), the maps themselves, one after another, take it the last piece of that way, too
(*walked*). The two agree to rounding, or the products have lost what the vector is made of: they overflowed, or met 0 · inf or NaN, or growth
that the vector has no part in drowned it. Then, and wherever anything is not finite, the maps are applied one after another, and the result is theirs.

That reads cotangents, and is yet differentiable: a sweep is the inside of a linear solve (`parscan.system`), of which JAX
differentiates the equation, never the way it is solved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from parscan.layout import Group

FALLBACK = "parscan_one_after_another"  # its name in programs and profiles


class Found(NamedTuple):
    """What leaves the maps of one chain.

    values: (L, p). both_ways: () -> told and walked, (m, p), the same m values; None where no product was taken.
    """

    values: Array
    both_ways: Callable[[], tuple[Array, Array]] | None = None


def is_sound(found: Found, groups: Sequence[Group], epsilon: float, reverse: bool) -> Array:
    """Whether all is finite, and told and walked agree to half the digits of the largest value in their block so far. A bool, one for a whole batch.

    So far on the journey: what a map gets wrong may grow behind it until it drowns itself.

    epsilon: of the precision that the maps are computed in.
    """
    good = jnp.isfinite(found.values).all()
    if found.both_ways is not None:
        (told, walked), info = found.both_ways(), jnp.finfo(found.values.dtype)
        scale = lax.cummax(_by_block(jnp.maximum(jnp.abs(told), jnp.abs(walked)), groups), reverse=reverse)
        gap, nothing = _by_block(jnp.abs(told - walked), groups), info.tiny / info.eps
        good &= (gap <= 8 * math.sqrt(epsilon) * scale + nothing).all()
    return _everywhere(good)


def _by_block(x: Array, groups: Sequence[Group]) -> Array:
    """The largest entry of each block: (m, p) -> (m, blocks). NaN where there is one."""
    found, start = [], 0
    for group in groups:
        if group.size:
            found.append(x[:, start : start + group.size].reshape(-1, group.blocks, group.side).max(-1))
        start += group.size
    return jnp.concatenate(found, axis=1)


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

    def fallback():
        return otherwise()

    fallback.__name__ = fallback.__qualname__ = FALLBACK
    return lax.cond(good, lambda: values, jax.jit(fallback))
