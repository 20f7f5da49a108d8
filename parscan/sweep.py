"""One journey along a chain of affine maps, by any method: the driver of every backward pass, and of every tangent.

    v_i = M_i v_{i-1} + b_i,   i = 1 … L in the order of travel

M_i is a Jacobian (tangents travel with the chain) or its transpose (cotangents travel against it). It is known through its
action on a vector; whether it is ever written down, and for how many steps at once, is the method's affair.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from parscan import affine, exponents, guard, order, prefix
from parscan.affine import Affine
from parscan.guard import Found
from parscan.jacobians import Jacobian, closed, split
from parscan.layout import Group
from parscan.methods import Associative, Chunked, Method, Parallel, Sequential, Tree, Walk
from parscan.structure import Forms


class Chain(NamedTuple):
    """L linear maps of one program.

    crossing: () -> (data with leading axis L, map of (one entry of data, vector (n,)) to vector (p,)).
    stepping: the same as crossing, with nothing computed for all steps beforehand: slower, and holds nothing.
    forming: () -> (data with leading axis L, map of stacked entries of data to their Jacobians, stacked).
    forms: of the Jacobians, in the direction of travel; the vectors before and after a map have different lengths only if L is 1.
    same: all maps are one.
    epsilon: of the precision in which a map is computed, which may be less than its vectors have.
    """

    crossing: Callable[[], tuple[Any, Callable[[Any, Array], Array]]]
    stepping: Callable[[], tuple[Any, Callable[[Any, Array], Array]]]
    forming: Callable[[], tuple[Any, Callable[[Any], Jacobian]]]
    forms: Forms
    same: bool
    epsilon: float


def sweep(chains: Sequence[Chain], start: Array, offsets: Sequence[Array], method: Method, *, reverse: bool) -> list[Array]:
    """The vector that leaves each map of every chain, one chain being entered with what leaves the one before.

    Args:
        chains: the maps, in the order of their index.
        start: vector entering the first map of the journey, (n,).
        offsets: b_i of every chain, (L, p).
        method: any but `Lax`, which has no journey of its own; sizes chosen.
        reverse: travel from the last chain's last map down to the first chain's first.

    Returns:
        (L, p) for every chain, entry i being what leaves map i.
    """
    journey = list(zip(chains, offsets, strict=True))[:: -1 if reverse else 1]
    values: list[Array] = []
    while journey:
        if _is_constant(*journey[0]):  # nothing travels through: what leaves it is its offset
            values.append(journey.pop(0)[1])
        else:
            count = next((i for i, some in enumerate(journey) if _is_constant(*some)), len(journey))
            values.extend(_swept(journey[:count], start, method, reverse))
            journey = journey[count:]
        start = prefix.last(values[-1], reverse) if values[-1].shape[0] else start
    return values[:: -1 if reverse else 1]


def _is_constant(chain: Chain, offsets: Array) -> bool:
    return 0 in (offsets.shape[0], *chain.forms.sizes)


def _swept(journey: list[tuple[Chain, Array]], start: Array, method: Method, reverse: bool) -> list[Array]:
    """Chains in the order of travel, each of which has maps and coordinates."""
    if isinstance(method, Sequential) or (len(journey) == 1 and journey[0][1].shape[0] == 1):
        return _one_after_another(journey, start, reverse)
    if len(journey) > 1 and not isinstance(method, Walk):
        found = _through_order(journey, start, method, reverse)
    else:
        found, entering = [], start
        for chain, offsets in journey:
            found.append(_through_one(chain, entering, offsets, method, reverse))
            entering = prefix.last(found[-1].values, reverse)
    values = [one.values for one in found]
    if not (isinstance(method, Parallel) and method.guard):
        return values
    good = [guard.is_sound(one, chain.forms.after, chain.epsilon, reverse) for one, (chain, _) in zip(found, journey, strict=True)]
    bare = [(chain._replace(crossing=chain.stepping), offsets) for chain, offsets in journey]  # what is not expected to run holds no memory
    return guard.guarded(values, jnp.stack(good).all(), lambda: _one_after_another(bare, start, reverse))


def _one_after_another(journey: list[tuple[Chain, Array]], start: Array, reverse: bool) -> list[Array]:
    values = []
    for chain, offsets in journey:
        values.append(_crossed(chain, start, offsets, reverse))
        start = prefix.last(values[-1], reverse)
    return values


def _through_one(chain: Chain, start: Array, offsets: Array, method: Method, reverse: bool) -> Found:
    if offsets.shape[0] == 1:
        return Found(_crossed(chain, start, offsets, reverse))
    match method:
        case Walk():
            return Found(prefix.walk(_formed(chain, offsets), start, affine.apply, reverse=reverse))
        case Tree():
            maps = _formed(chain, offsets)
            values = prefix.tree(maps, start, affine.apply, affine.then, reverse=reverse)
            whole = values.shape[0] % 2 == 1
            odd = slice(1 if whole else 2, None, 2) if reverse else slice(1, None if whole else -1, 2)
            return Found(values, partial(_both_ways, chain, start, offsets, values, odd, reverse))
        case Associative():
            maps = _formed(chain, offsets)
            values = prefix.associative(affine.scaled(_closed(maps)), start, affine.apply, affine.then, reverse=reverse)
            return Found(values, partial(_both_ways, chain, start, offsets, values, slice(None), reverse))
        case Chunked(size=size, levels=levels):
            return _chunked(chain, start, offsets, size or 1, levels, reverse)
    raise TypeError(f"no journey by {method!r}")


def _both_ways(chain: Chain, start: Array, offsets: Array, values: Array, places: slice, reverse: bool) -> tuple[Array, Array]:
    """Some of the values, and what their own steps make of those before them. A single map may change the width."""
    before = start[None] if values.shape[0] == 1 else prefix.entering(prefix.boundaries(start, values, reverse), reverse)
    data, cross = chain.stepping()
    return values[places], jax.vmap(cross)(prefix.take(data, places), before[places]) + offsets[places]


def _through_order(journey: list[tuple[Chain, Array]], start: Array, method: Method, reverse: bool) -> list[Found]:
    """Chains of several widths by a tree over all their maps, or over those of their chunks, in the order that takes the least arithmetic."""
    size = method.size or 1 if isinstance(method, Chunked) else 1
    folded = [Folded(chain, offsets, size, reverse) for chain, offsets in journey]
    stacks = [stack for one in folded for stack in one.stacks]
    ends = [one.chain.forms.before for one in folded for _ in one.stacks] + [journey[-1][0].forms.after]
    found = order_of_products([stack.count for stack in stacks], ends)
    assert found.tree is not None
    left = iter(prefix.ordered(stacks, found.tree, start, affine.apply, affine.then, reverse=reverse, carry=affine.one_after_another))
    found = []
    for one in folded:
        found.append(one.unfolded(start, [next(left) for _ in one.stacks]))
        start = prefix.last(found[-1].values, reverse)
    return found


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
        self.formed: set[int] = set()  # the first steps of stacks whose maps somebody asked for
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
            cross = (lambda start: _crossed(chain, start, offsets, self.reverse)) if hi - lo == 1 else None

            def maps():
                self.formed.add(lo)
                return affine.scaled(_formed(chain, offsets))

            return prefix.Stack(hi - lo, maps, cross)

        def chunks():
            return self.fold.explicit(prefix.fold(self._steps(lo, hi), size=size, identity=self.fold.identity, extend=self.fold.extend, reverse=self.reverse))

        return prefix.Stack((hi - lo) // size, chunks)

    def _both_ways(self, lo: int, hi: int, start: Array, values: Array) -> tuple[Array, Array]:
        chain, offsets = self._part(lo, hi)
        return _both_ways(chain, start, offsets, values, slice(None), self.reverse)

    def unfolded(self, start: Array, left: list[Array]) -> Found:
        """What leaves every step, from the vectors leaving every map of the stacks."""
        found, checks = [], []
        for (lo, hi), values in zip(self.bounds, left, strict=True):
            size = min(self.size, hi - lo)
            if size > 1:
                before = prefix.entering(prefix.boundaries(start, values, self.reverse), self.reverse)
                found.append(prefix.unfold(self._steps(lo, hi), before, size=size, cross=self.fold.cross, reverse=self.reverse))
                checks.append(lambda told=values, steps=found[-1], size=size: (told, _ends(steps, size, self.reverse)))
            else:
                found.append(values)
                if lo in self.formed:
                    checks.append(partial(self._both_ways, lo, hi, start, values))
            start = prefix.last(found[-1], self.reverse)
        both_ways = (lambda: jax.tree.map(lambda *some: jnp.concatenate(some), *(check() for check in checks))) if checks else None
        return Found(jnp.concatenate(found[:: -1 if self.reverse else 1]), both_ways)


def _crossed(chain: Chain, start: Array, offsets: Array, reverse: bool) -> Array:
    """One map after another, none of them formed."""
    data, cross = chain.crossing()
    if offsets.shape[0] == 1:
        return (cross(prefix.take(data, 0), start) + offsets[0])[None]
    return prefix.walk((data, offsets), start, lambda step, v: cross(step[0], v) + step[1], reverse=reverse)


def _formed(chain: Chain, offsets: Array) -> Affine:
    data, form = chain.forming()
    return Affine(form(prefix.take(data, slice(0, 1)) if chain.same else data), None, offsets)


def _closed(maps: Affine) -> Affine:
    """Written as kinds whose products are of that kind, whatever the level: what `lax.associative_scan` needs."""
    return maps._replace(matrix=closed(maps.matrix))


def _chunked(chain: Chain, start: Array, offsets: Array, size: int, levels: int | None, reverse: bool) -> Found:
    """fold -> scan -> unfold."""
    fold, told = Fold(chain, offsets.dtype), []

    def through(maps, start):
        told.append(prefix.tree(fold.explicit(maps), start, affine.apply, affine.then, reverse=reverse, levels=levels))
        return told[0]

    steps = (fold.data, offsets)
    values = prefix.chunked(steps, start, size=size, identity=fold.identity, extend=fold.extend, cross=fold.cross, through=through, reverse=reverse)

    def both_ways():
        ends, count = _ends(values[: values.shape[0] // size * size], size, reverse), told[0].shape[0]
        return told[0], ends[ends.shape[0] - count :] if reverse else ends[:count]

    return Found(values, both_ways if told and told[0].shape[0] else None)


def _ends(values: Array, size: int, reverse: bool) -> Array:
    """Of the values inside chunks, the one that leaves each chunk."""
    return values[0 if reverse else size - 1 :: size]


class Fold:
    """How a chunk's map grows: its columns are pushed through the next step, and rescaled every time. The chain's maps are square."""

    def __init__(self, chain: Chain, dtype: Any):
        self.data, self.one = chain.crossing()
        self.forms, self.dtype = chain.forms.closed(), dtype
        self.blocks = tuple((group.blocks, group.side) for group in chain.forms.before)

    def identity(self, chunks: int) -> Affine:
        seeds = self.forms.seeds(self.dtype)
        columns = jnp.broadcast_to(seeds, (chunks, *seeds.shape))
        n = seeds.shape[1]
        return Affine(_Columns(columns, self.blocks), jnp.zeros((chunks, n), jnp.int32), jnp.zeros((chunks, n), self.dtype))

    def extend(self, step: tuple[Any, Array], maps: Affine) -> Affine:
        data, offset = step
        columns = jax.vmap(jax.vmap(self.one, (None, 0)))(data, maps.matrix.columns)
        assert maps.exponent is not None  # `identity` gave it
        matrix, exponent = affine.renormalised(_Columns(columns, self.blocks), maps.exponent)
        return Affine(matrix, exponent, jax.vmap(self.one)(data, maps.offset) + offset)

    def cross(self, step: tuple[Any, Array], vector: Array) -> Array:
        data, offset = step
        return (jax.vmap(self.one) if offset.ndim == 2 else self.one)(data, vector) + offset

    def explicit(self, maps: Affine) -> Affine:
        return Affine(self.forms.jacobian(maps.matrix.columns), maps.exponent, maps.offset)


@partial(jax.tree_util.register_dataclass, data_fields=["columns"], meta_fields=["blocks"])
@dataclass(frozen=True)
class _Columns:
    """A matrix in the making: the images (..., pushes, n) of the vectors that are e_k in every block at once.

    blocks: of each group, how many blocks and of what side.
    """

    columns: Array
    blocks: tuple[tuple[int, int], ...]

    def balanced(self) -> tuple[_Columns, Array]:
        pushes, mantissas, tops = self.columns.shape[-2], [], []
        for own, (count, side) in zip(split(self.columns, [count * side for count, side in self.blocks]), self.blocks, strict=True):
            blocks = own.reshape(*own.shape[:-1], count, side)
            largest = jnp.abs(blocks).max(-1, initial=0)
            top = jnp.where(largest == 0, 0, exponents.exponent(largest))
            mantissas.append(exponents.scaled(blocks, -top[..., None]).reshape(own.shape))
            columns = top[..., : min(side, pushes), :].swapaxes(-1, -2)
            tops.append(columns.reshape(*columns.shape[:-2], count * side))
        return _Columns(jnp.concatenate(mantissas, axis=-1), self.blocks), jnp.concatenate(tops, axis=-1)
