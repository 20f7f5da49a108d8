"""The prefix tree of `parscan.prefix` in a program whose length does not depend on the chain's: neighbours are joined 64 at a time, by a loop.

A tree of pairs is written out once for each of log2(L) rounds, and compiling that takes most of a first call. Here a round is a loop that joins the maps of
all groups at once, one of each after another, and, on the way down, a loop that applies them. The first round is written out; those above it, which have
L / 64 maps and fewer, are one loop more, over arrays as long as the longest of them: that multiplies a few maps of zeros, and nothing else.

For L maps: at most L (1 + log64(L) / 64) products, and depth 128 ceil(log64 L), where pairs take 2 ceil(log2 L) + 2; what is made takes a few hundredths
of the memory of the maps, where that of pairs takes as much as they. It is for machines on which a step of a loop costs no more than its arithmetic: CPUs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from parscan import affine, prefix
from parscan.affine import Affine

SIDE = 64  # maps in a group


class Groups(NamedTuple):
    """The maps of every round, each made of a group of the round before; the journey's last group is joined to none, since no value needs its product.

    first: the maps themselves, by index. above: those of all rounds above, (rounds, maps of the first of them, ...), in the order of travel, each round
    filled up with zeros at the end; None if there are none.
    """

    first: Affine
    above: Affine | None
    reverse: bool

    def values(self, start: Array) -> Array:
        """What leaves each map."""
        values = start[None][:0]
        if self.above is not None:
            count = self.above.offset.shape[1]

            def cross(values: Array, maps: Affine) -> tuple[Array, None]:
                return _crossed(maps, jnp.concatenate([start[None], values[: _groups(count) - 1]])), None

            values, _ = lax.scan(cross, jnp.zeros((count, *start.shape), start.dtype), self.above, reverse=True)
        values = _crossed(self.first, jnp.concatenate([start[None], values]), self.reverse)
        return values[::-1] if self.reverse else values

    def again(self, offsets: Array) -> Groups:
        """The same over maps with other offsets: that of a product is what leaves it when nothing enters."""
        first = self.first._replace(offset=offsets)
        if self.above is None:
            return self._replace(first=first)

        def leave(offsets: Array, maps: Affine) -> tuple[Array, Array]:
            return _filled(_leaving(maps._replace(offset=offsets)), offsets), offsets

        last, others = lax.scan(leave, _leaving(first, self.reverse), jax.tree.map(lambda x: x[:-1], self.above))
        return self._replace(first=first, above=self.above._replace(offset=_followed(others, last)))


def upsweep(maps: Affine, reverse: bool) -> Groups:
    """Of maps whose products are of their own kind and shapes."""
    if prefix.length(maps) <= SIDE:
        return Groups(maps, None, reverse)
    joined = _joined(maps, reverse)
    count, rounds = prefix.length(joined), 0
    while count > SIDE:
        count, rounds = _groups(count) - 1, rounds + 1
    top, below = lax.scan(lambda some, _: (_filled(_joined(some), some), some), joined, None, rounds)
    return Groups(maps, _followed(below, top), reverse)


def _groups(count: int) -> int:
    return -(-count // SIDE)


def _placed(maps: Affine, groups: int, backwards: bool) -> Any:
    """Place in a group -> the maps there of the first so many groups; past the last map it, again. backwards: maps stand against the order of travel."""
    count = prefix.length(maps)

    def at(place: Any) -> Affine:
        index = jnp.minimum(place + SIDE * jnp.arange(groups), count - 1)
        index = count - 1 - index if backwards else index
        return jax.tree.map(lambda x: x if x.shape[0] != count else x.at[index].get(mode="promise_in_bounds"), maps)

    return at


def _joined(maps: Affine, backwards: bool = False) -> Affine:
    """One map of each group but the last."""
    at = _placed(maps, _groups(prefix.length(maps)) - 1, backwards)
    return lax.scan(lambda joined, place: (affine.then(at(place), joined), None), affine.scaled(at(0)), jnp.arange(1, SIDE))[0]


def _crossed(maps: Affine, entering: Array, backwards: bool = False) -> Array:
    """What leaves each map, from what enters each group, or each of the first of them."""
    count = prefix.length(maps)
    at = _placed(maps, entering.shape[0], backwards)

    def cross(value: Array, place: Array) -> tuple[Array, Array]:
        value = affine.apply(at(place), value)
        return value, value

    inside = lax.scan(cross, entering, jnp.arange(min(SIDE, count)))[1]
    return inside.swapaxes(0, 1).reshape(-1, *entering.shape[1:])[:count]


def _leaving(maps: Affine, backwards: bool = False) -> Array:
    """What leaves each group but the last when nothing enters."""
    nothing = jnp.zeros_like(maps.offset[: _groups(prefix.length(maps)) - 1])
    return _crossed(maps, nothing, backwards)[SIDE - 1 :: SIDE]


def _filled(some: Any, like: Any) -> Any:
    """With zeros behind, as many as these."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x, jnp.zeros_like(y[x.shape[0] :])]), some, like)


def _followed(some: Any, last: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), some, last)
