"""Chains of several widths by a tree over the maps of all, in the order of products that takes the least arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from parscan import affine, guard, order, prefix
from parscan.affine import Affine
from parscan.folding import Fold
from parscan.guard import Errors, Found
from parscan.layout import Group
from parscan.maps import Chain, crossed, defects_of, ends_of, formed, largest
from parscan.methods import Chunked, Method


def through_order(journey: list[tuple[Chain, Array]], start: Array, method: Method, reverse: bool) -> list[Found]:
    """Chains of several widths by a tree over all their maps, or over those of their chunks, in the order that takes the least arithmetic."""
    size = method.size or 1 if isinstance(method, Chunked) else 1
    folded = [Folded(chain, offsets, size, reverse) for chain, offsets in journey]
    stacks = [stack for one in folded for stack in one.stacks]
    ends = [one.chain.forms.before for one in folded for _ in one.stacks] + [journey[-1][0].forms.after]
    tree = order_of_products([stack.count for stack in stacks], ends).tree
    assert tree is not None
    made = prefix.Ordered(stacks, affine.apply, affine.then, reverse=reverse, carry=affine.one_after_another)
    left = iter(made.values(tree, start))
    legs, values = [], []
    for one in folded:
        own = one.legs(start, [next(left) for _ in one.stacks])
        legs += own
        values.append(one.together([leg.steps for leg in own]))
        start = prefix.last(values[-1], reverse)

    @functools.cache
    def errors() -> list[Errors]:
        defects = [leg.defects(place in made.formed) for place, leg in enumerate(legs)]

        def travel(defects: list[Array]) -> list[Array]:
            others = [leg.stack_of(made.formed.get(place), some) for place, (leg, some) in enumerate(zip(legs, defects, strict=True))]
            return prefix.Again(made, others, affine.renewed).values(tree, jnp.zeros_like(legs[0].start))

        told, doubts = guard.followed(travel, defects)
        error, left, found = jnp.zeros_like(legs[0].start), iter(zip(legs, told, doubts, strict=True)), []
        for one in folded:
            parts = []
            for bounds in one.bounds:
                leg, at, doubt = next(left)
                sizes = largest(leg.steps, leg.offsets)
                most = sizes.reshape(-1, leg.size, sizes.shape[1]).max(1)
                parts.append((one.followed(bounds, error, at), sizes, doubt, most))
                error = prefix.last(at, reverse)
            at, sizes, doubt, most = (one.together(list(part)) for part in zip(*parts, strict=True))
            found.append(Errors(at, sizes, doubt=(doubt, most)))
        return found

    # those of the chains before are among them
    return [Found(some, lambda _, place=place: errors()[place]) for place, some in enumerate(values)]


def order_of_products(counts: Sequence[int], ends: Sequence[Sequence[Group]]) -> order.Order:
    """The order for stacks of maps between vectors with these groups."""
    return order.ordered(tuple(counts), *sides_and_blocks(ends))


def sides_and_blocks(ends: Sequence[Sequence[Group]]) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Of every vector the sides of its groups' blocks, and of every group how many blocks there are."""
    sides = tuple(tuple(group.side for group in groups) for groups in ends)
    return sides, tuple(max(group.blocks for group in groups) for groups in zip(*ends, strict=True))


class Folded:
    """A chain of equal maps as stacks for a tree: its maps, or those of its chunks, the chunk that is shorter apart.

    The shorter chunk stands at the end of the chain by index, whichever way the journey goes.
    """

    def __init__(self, chain: Chain, offsets: Array, size: int, reverse: bool):
        self.chain, self.reverse, count = chain, reverse, offsets.shape[0]
        self.size = min(size, count)
        whole = count // self.size * self.size
        self.bounds = [bounds for bounds in ((0, whole), (whole, count)) if bounds[0] < bounds[1]][:: -1 if reverse else 1]
        self.offsets = offsets
        self.stacks = [self._stack(lo, hi) for lo, hi in self.bounds]

    @functools.cached_property
    def fold(self) -> Fold:
        """What chunks are folded and unfolded by: the steps are linearised once for both."""
        return Fold(self.chain, self.offsets.dtype)

    def _steps(self, lo: int, hi: int) -> tuple[Any, Array]:
        return prefix.take((self.fold.data, self.offsets), slice(lo, hi))

    def _part(self, lo: int, hi: int) -> tuple[Chain, Array]:
        """Steps lo … hi - 1, as a chain of its own."""
        chain = self.chain
        if (lo, hi) == (0, self.offsets.shape[0]):
            return chain, self.offsets

        def cut(some):
            data, f = some
            return prefix.take(data, slice(lo, hi)), f

        return chain._replace(
            crossing=lambda: cut(chain.crossing()), stepping=lambda: cut(chain.stepping()), forming=lambda: cut(chain.forming())
        ), self.offsets[lo:hi]

    def _stack(self, lo: int, hi: int) -> prefix.Stack:
        size = min(self.size, hi - lo)
        if size == 1:
            chain, offsets = self._part(lo, hi)
            cross = (lambda start: crossed(chain, start, offsets, self.reverse)) if hi - lo == 1 else None
            return prefix.Stack(hi - lo, lambda: affine.scaled(formed(chain, offsets)), cross)

        def chunks():
            return self.fold.explicit(prefix.fold(self._steps(lo, hi), size=size, identity=self.fold.identity, extend=self.fold.extend, reverse=self.reverse))

        return prefix.Stack((hi - lo) // size, chunks)

    def legs(self, start: Array, left: list[Array]) -> list[Leg]:
        """What leaves every step, from the vectors leaving every map of the stacks."""
        found = []
        for (lo, hi), stack, told in zip(self.bounds, self.stacks, left, strict=True):
            size, steps = min(self.size, hi - lo), told
            if size > 1:
                before = prefix.entering(prefix.boundaries(start, told, self.reverse), self.reverse)
                steps = prefix.unfold(self._steps(lo, hi), before, size=size, cross=self.fold.cross, reverse=self.reverse)
            found.append(Leg(*self._part(lo, hi), stack, size, start, told, steps, self.reverse))
            start = prefix.last(steps, self.reverse)
        return found

    def followed(self, bounds: tuple[int, int], error: Array, told: Array) -> Array:
        """The errors of all steps of a stack, from the one that enters and those of its maps."""
        size = min(self.size, bounds[1] - bounds[0])
        if size == 1:
            return told
        before = prefix.entering(prefix.boundaries(error, told, self.reverse), self.reverse)
        return self.fold.follow(self._steps(*bounds), before, size, self.reverse)

    def together(self, parts: list[Array]) -> Array:
        """Of the chain, from what there is of each stack."""
        return jnp.concatenate(parts[:: -1 if self.reverse else 1])


class Leg(NamedTuple):
    """The journey along one stack of a `Folded` chain.

    size: steps a map. start: what enters. told: what leaves each map. steps: what leaves each step.
    """

    chain: Chain
    offsets: Array
    stack: prefix.Stack
    size: int
    start: Array
    told: Array
    steps: Array
    reverse: bool

    def defects(self, formed: bool) -> Array:
        """How far what leaves each map is from what its steps make of what enters."""
        if self.size > 1:
            stored = self.chain.rounding.stored
            return stored(self.told) - stored(ends_of(self.steps, self.size, self.reverse))
        return defects_of(self.chain, self.start, self.offsets, self.told, self.reverse) if formed else jnp.zeros_like(self.told)

    def stack_of(self, maps: Affine | None, defects: Array) -> prefix.Stack:
        """The same maps, with defects for offsets."""
        assert maps is not None or self.stack.cross is not None
        cross = None if self.stack.cross is None else lambda error: crossed(self.chain, error, defects, self.reverse)
        return prefix.Stack(self.stack.count, lambda: maps._replace(offset=defects) if maps else None, cross)
