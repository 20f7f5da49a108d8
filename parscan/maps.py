"""Chains of linear maps: known through their action on a vector, written down where a method asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from parscan import prefix
from parscan.affine import Affine
from parscan.guard import Rounding
from parscan.jacobians import Jacobian
from parscan.structure import Forms


class Chain(NamedTuple):
    """L linear maps of one program.

    crossing: () -> (data with leading axis L, map of (one entry of data, vector (n,)) to vector (p,)).
    stepping: the same as crossing, with nothing computed for all steps beforehand: slower, and holds nothing.
    forming: () -> (data with leading axis L, map of stacked entries of data to their Jacobians, stacked).
    forms: of the Jacobians, in the direction of travel; the vectors before and after a map have different lengths only if L is 1.
    same: all maps are one.
    rounding: of the maps, and of the vectors that leave them.
    """

    crossing: Callable[[], tuple[Any, Callable[[Any, Array], Array]]]
    stepping: Callable[[], tuple[Any, Callable[[Any, Array], Array]]]
    forming: Callable[[], tuple[Any, Callable[[Any], Jacobian]]]
    forms: Forms
    same: bool
    rounding: Rounding


def crossed(chain: Chain, start: Array, offsets: Array, reverse: bool) -> Array:
    """One map after another, none of them formed."""
    data, cross = chain.crossing()
    if offsets.shape[0] == 1:
        return (cross(prefix.take(data, 0), start) + offsets[0])[None]
    return prefix.walk((data, offsets), start, lambda step, v: cross(step[0], v) + step[1], reverse=reverse)


def formed(chain: Chain, offsets: Array) -> Affine:
    data, form = chain.forming()
    return Affine(form(prefix.take(data, slice(0, 1)) if chain.same else data), None, offsets)


def stepped(one: Callable[[Any, Array], Array], step: tuple[Any, Array], vector: Array) -> Array:
    """A step with its offset, or stacked ones."""
    data, offset = step
    return (jax.vmap(one) if offset.ndim == 2 else one)(data, vector) + offset


def defects_of(chain: Chain, start: Array, offsets: Array, values: Array, reverse: bool) -> Array:
    """How far each value is from what its own step makes of the one before. A single map may change the width."""
    before = start[None] if values.shape[0] == 1 else prefix.entering(prefix.boundaries(start, values, reverse), reverse)
    data, cross = chain.stepping()
    return chain.rounding.stored(values) - chain.rounding.stored(jax.vmap(cross)(data, before) + offsets)


def largest(values: Array, offsets: Array) -> Array:
    """What errors are compared with: a vector that is small because its offset cancels it may be off by as much as the offset."""
    return jnp.maximum(jnp.abs(values), jnp.abs(offsets))


def ends_of(values: Array, size: int, reverse: bool) -> Array:
    """Of the values inside chunks, the one that leaves each chunk."""
    return values[0 if reverse else size - 1 :: size]
