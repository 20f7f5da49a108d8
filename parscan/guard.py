"""Whether what a parallel pass found is what one map after another gives, asked on the device.

What a product of maps tells of a vector far along, the maps themselves tell, too, from the vector a piece before it. Where the two differ the product
has rounded, and what follows multiplies the difference: each such *defect* travels the rest of the chain as the vector does, through the very products
that are there, and what arrives is the *error* against one map after another. Locally every product may be right to the last digit and the error still
drown the vector: the chain grows along directions in which the vector has no part. Where the error is beyond half the digits, and wherever anything is not
finite (products overflow, or meet 0 · inf or NaN), the maps are applied one after another, and the result is theirs.

Defects are themselves rounded, and errors grow in few directions: now and then they cancel by chance in what they tell, and not in the vector. So they are
followed twice, the second time with other signs, which tells about as much, and hardly ever cancels, too.

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

from parscan import prefix
from parscan.layout import Group

FALLBACK = "parscan_one_after_another"  # its name in programs and profiles


class Rounding(NamedTuple):
    """How vectors are rounded on a journey.

    epsilon: distance from 1 to the next number in the coarsest precision that a map computes in, which may be less than its vectors have.
    least: what the vectors' own precision hardly tells from zero.
    stored: vectors -> the same as their own precision holds them.
    """

    epsilon: float
    least: float
    stored: Callable[[Array], Array] = lambda vectors: vectors

    @property
    def share(self) -> float:
        """How much of a vector an error may be: half the digits, at most a quarter."""
        return min(8 * math.sqrt(self.epsilon), 0.25)


class Inside(NamedTuple):
    """Of the errors between places, what is known without following them.

    most: (m, p), after the place before, the most that each entry of its error may have made of any.
    sizes: (m, s, p), of every step.
    follow: () -> all errors (m·s, p).
    """

    most: Array
    sizes: Array
    follow: Callable[[], Array]


class Errors(NamedTuple):
    """At some places of a journey, how far the vector is from where one map after another takes it.

    at: (m, p), the last of them at the end of the journey.
    size: (m, p), the largest entries of vectors and offsets since the place before.
    inside: between the places, if not all of the journey is among them.
    doubt: the same as at and size, at as many places or fewer, had the defects other signs; None where there is none.
    """

    at: Array
    size: Array
    inside: Inside | None = None
    doubt: tuple[Array, Array] | None = None

    def leaving(self, reverse: bool) -> Array:
        """What the vector is off by at the end of the journey, or may be."""
        error = prefix.last(self.at, reverse)
        if self.doubt is None:
            return error
        other = prefix.last(self.doubt[0], reverse)
        return jnp.where(jnp.abs(other) > jnp.abs(error), other, error)


class Found(NamedTuple):
    """What leaves the maps of one chain.

    values: (L, p). errors: what the vector that enters is off by, None for nothing -> Errors; None where there are none.
    """

    values: Array
    errors: Callable[[Array | None], Errors | None]


class Check(NamedTuple):
    """What is known of a journey so far. again: whether it is taken one map after another. good: whether all was sound. error: what the vector is off by."""

    again: Array
    good: Array
    error: Any


def followed(travel: Callable[[Any], Any], defects: Any) -> tuple[Any, Any]:
    """What defects amount to further along, and what they would with other signs. travel: defects -> errors, linear; any pytrees of arrays."""
    found = jax.vmap(travel)(jax.tree.map(lambda some: jnp.stack([some, _otherwise(some)]), defects))
    return jax.tree.map(lambda some: some[0], found), jax.tree.map(lambda some: some[1], found)


def _otherwise(defects: Array) -> Array:
    """With signs as if at random, the same at every call: the top bit of each place's number, multiplied and mixed."""
    place = lax.iota(jnp.uint32, defects.size).reshape(defects.shape) * jnp.uint32(0x9E3779B1)
    mixed = (place ^ (place >> 15)) * jnp.uint32(0x2C1B3C6D)
    return jnp.where(mixed >> 31 == 0, defects, -defects)


def is_sound(values: Array, errors: Errors | None, groups: Sequence[Group], rounding: Rounding, reverse: bool) -> Array:
    """Whether all is finite, and every error within half the digits of its block's vector, at most a quarter. A bool, one for a whole batch.

    A block of a single coordinate is compared with the largest that it has been on the journey: sums of a product and an offset cancel by chance now and then.
    """
    good, groups = jnp.isfinite(values).all(), [group for group in groups if group.size]
    if errors is not None:
        good &= _within(errors.at, errors.size, groups, rounding, reverse)
        if errors.doubt is not None:
            good &= _within(*errors.doubt, groups, rounding, reverse)
        if errors.inside is not None:
            good &= _within_inside(errors.inside, groups, rounding, reverse)
    return _everywhere(good)


def _within(at: Array, size: Array, groups: Sequence[Group], rounding: Rounding, reverse: bool) -> Array:
    good = jnp.ones((), bool)
    for error, some in zip(_by_block(jnp.abs(at), groups), _sizes(size, groups, reverse), strict=True):
        good &= (error <= rounding.share * some + rounding.least).all()
    return good


def _within_inside(inside: Inside, groups: Sequence[Group], rounding: Rounding, reverse: bool) -> Array:
    """Errors are followed only where they might be too large for the smallest vector, zeros apart, of those inside."""
    (m, s, p), calm = inside.sizes.shape, jnp.ones((), bool)
    sizes = inside.sizes.reshape(m * s, p)
    for most, some, group in zip(_by_block(inside.most, groups), _sizes(sizes, groups, reverse), groups, strict=True):
        least = jnp.where(some == 0, jnp.inf, some).reshape(m, s, -1).min(1)
        calm &= (group.side * most <= rounding.share * least + rounding.least).all()
    return lax.cond(_everywhere(calm), lambda: jnp.ones((), bool), lambda: _within(inside.follow(), sizes, groups, rounding, reverse))


def _sizes(size: Array, groups: Sequence[Group], reverse: bool) -> list[Array]:
    """What errors in each block are compared with: (m, p) -> of each group (m, blocks)."""
    return [lax.cummax(some, reverse=reverse) if group.side == 1 else some for some, group in zip(_by_block(size, groups), groups, strict=True)]


def _by_block(x: Array, groups: Sequence[Group]) -> list[Array]:
    """Of each group, the largest entry of every block: (m, p) -> (m, blocks). NaN where there is one."""
    found, start = [], 0
    for group in groups:
        found.append(x[:, start : start + group.size].reshape(x.shape[0], group.blocks, group.side).max(-1))
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
