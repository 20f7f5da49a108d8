"""One chain of maps by any method, and how far what it finds is from one map after another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from parscan import affine, exponents, grouped, guard, jacobians, prefix
from parscan.affine import Affine
from parscan.folding import Fold
from parscan.guard import Errors, Found, Inside
from parscan.jacobians import closed
from parscan.maps import Chain, crossed, defects_of, ends_of, formed, largest, stepped
from parscan.methods import Associative, Chunked, Method, Tree, Walk

ROUND = 3  # of a tree whose maps tell errors: eight steps each, which are taken one after another beside


def through_one(chain: Chain, start: Array, offsets: Array, method: Method, reverse: bool) -> Found:
    if offsets.shape[0] == 1:
        values = crossed(chain, start, offsets, reverse)
        return Found(values, partial(_errors_of_steps, chain, values, offsets, reverse))
    if isinstance(method, Chunked):
        return _Chunked(chain, offsets, method, reverse).found(start)
    maps = formed(chain, offsets)
    if isinstance(method, Walk):
        values = prefix.walk(maps, start, affine.apply, reverse=reverse)
        return Found(values, partial(_errors_of_maps, chain, start, values, offsets, partial(_walked, maps, reverse), reverse, False))
    if isinstance(method, Tree):
        made = _upswept(maps, reverse)
        values = made.values(start)
        return Found(values, partial(_errors_of_tree, chain, start, values, offsets, made, reverse))
    if isinstance(method, Associative):
        values = prefix.associative(affine.scaled(_closed(maps)), start, affine.apply, affine.then, reverse=reverse)
        return Found(values, lambda error: _errors_of_tree(chain, start, values, offsets, _upswept(maps, reverse), reverse, error))
    raise TypeError(f"no journey by {method!r}")


class Pairs(NamedTuple):
    """The maps of a chain and all that their pairs were joined to: `parscan.prefix`, as `parscan.grouped` has it."""

    maps: Affine
    made: prefix.Upsweep
    reverse: bool

    def values(self, start: Array) -> Array:
        return prefix.downsweep(self.made, start, affine.apply, reverse=self.reverse)

    def again(self, offsets: Array) -> Pairs:
        maps = self.maps._replace(offset=offsets)
        return self._replace(maps=maps, made=prefix.again(self.made, maps, affine.renewed, reverse=self.reverse))


def _upswept(maps: Affine, reverse: bool, levels: int | None = None) -> Pairs | grouped.Groups:
    if levels is None and joins_by_loops(maps):
        return grouped.upsweep(maps, reverse)
    return Pairs(maps, prefix.upsweep(maps, affine.then, reverse=reverse, levels=levels), reverse)


def joins_by_loops(maps: Affine) -> bool:
    """On a CPU, of more maps than a group has, unless products take other shapes than their factors. Elsewhere each step of a loop costs as much as starting
    a kernel, and depth counts."""
    return jax.default_backend() == "cpu" and prefix.length(maps) > grouped.SIDE and not jacobians.grows(maps.matrix)


def _walked(maps: Affine, reverse: bool, offsets: Array, start: Array) -> Array:
    return prefix.walk(maps._replace(offset=offsets), start, affine.apply, reverse=reverse)


def _errors_of_steps(chain: Chain, values: Array, offsets: Array, reverse: bool, error: Array | None) -> Errors | None:
    """Of maps that were taken one after another: what the vector was off by travels with it."""
    if error is None:
        return None
    at = crossed(chain, error, jnp.zeros_like(offsets), reverse)
    return Errors(at, largest(values, offsets))


def _errors_of_maps(
    chain: Chain, start: Array, values: Array, offsets: Array, travelled: Callable[[Array, Array], Array], reverse: bool, multiplied: bool, error: Array | None
) -> Errors:
    """Of maps that were written down: their entries are rounded, where a step itself may cancel exactly.

    travelled: (offsets, start) -> what leaves the maps. multiplied: with one another, too, so that what defects amount to is in doubt.
    """
    defects, size = defects_of(chain, start, offsets, values, reverse), largest(values, offsets)
    error = jnp.zeros_like(start) if error is None else error
    if not multiplied:
        return Errors(travelled(defects, error), size)
    at, doubt = guard.followed(lambda defects: travelled(defects, error), defects)
    return Errors(at, size, doubt=(doubt, size))


def _errors_of_tree(chain: Chain, start: Array, values: Array, offsets: Array, made: Pairs | grouped.Groups, reverse: bool, error: Array | None) -> Errors:
    if isinstance(made, Pairs):
        return _errors_of_pairs(chain, start, values, made, error)
    return _errors_of_maps(chain, start, values, offsets, lambda defects, error: made.again(defects).values(error), reverse, True, error)


def _errors_of_pairs(chain: Chain, start: Array, values: Array, pairs: Pairs, error: Array | None) -> Errors:
    """The maps of a later round carry the defects on; the steps inside each are taken one after another, from where it starts."""
    maps, made, reverse = pairs
    level = min(ROUND, len(made.rounds) - 1)
    rounds, size, error = made.rounds[level:], 2**level, jnp.zeros_like(start) if error is None else error
    rest = values.shape[0] - size * prefix.length(rounds[0])  # at the end of the journey
    data, one = chain.stepping()
    (steps, others), (told, left) = (prefix.apart(some, rest, reverse) for some in ((data, maps.offset), values))
    ends = ends_of(told, size, reverse)

    def unfolded(offsets, start, ends):
        before = prefix.entering(prefix.boundaries(start, ends, reverse), reverse)
        return prefix.unfold((steps[0], offsets), before, size=size, cross=partial(stepped, one), reverse=reverse)

    stored = chain.rounding.stored
    at = stored(told) - stored(unfolded(steps[1], start, ends))

    def carried(defects):
        again = prefix.again(prefix.Upsweep(rounds, None), rounds[0]._replace(offset=defects), affine.renewed, reverse=reverse)
        return prefix.downsweep(again, error, affine.apply, reverse=reverse)

    errors, doubt = guard.followed(carried, ends_of(at, size, reverse))
    at += unfolded(jnp.zeros_like(told), error, errors)
    sizes = largest(values, maps.offset)
    most, beside = prefix.apart(sizes, rest, reverse)
    most = most.reshape(-1, size, sizes.shape[1]).max(1)
    if rest:
        walked = partial(prefix.walk, apply=partial(stepped, one), reverse=reverse)
        off = stored(left) - stored(walked(others, prefix.last(ends, reverse) - prefix.last(errors, reverse)))
        doubts = walked((others[0], jnp.zeros_like(off)), prefix.last(doubt, reverse))
        at, doubt, most = (jnp.concatenate(some[:: -1 if reverse else 1]) for some in ((at, off), (doubt, doubts), (most, beside)))
    return Errors(at, sizes, doubt=(doubt, most))


def _closed(maps: Affine) -> Affine:
    """Written as kinds whose products are of that kind, whatever the level: what `lax.associative_scan` needs."""
    return maps._replace(matrix=closed(maps.matrix))


class _Chunked:
    """fold -> scan -> unfold, and the errors of that."""

    def __init__(self, chain: Chain, offsets: Array, method: Chunked, reverse: bool):
        self.chain, self.offsets, self.reverse = chain, offsets, reverse
        self.size, self.levels, self.checked = method.size or 1, method.levels, method.guard
        self.fold, self.steps = Fold(chain, offsets.dtype), offsets.shape[0] // self.size * self.size  # in whole chunks
        self.has_rest = self.steps < offsets.shape[0]
        self.highest: Any = None
        self.made: Any = None
        self.told: Any = None

    def found(self, start: Array) -> Found:
        fold, steps = self.fold, (self.fold.data, self.offsets)
        options = {"size": self.size, "cross": fold.cross, "through": self._through, "reverse": self.reverse, "every": self.checked}
        values = prefix.chunked(steps, start, identity=fold.identity, extend=fold.extend, **options)
        return Found(values, partial(self._errors, start, values))

    def _through(self, chunks: Any, start: Array) -> Array:
        self.highest = chunks.highest
        self.made = _upswept(self.fold.explicit(chunks), self.reverse, self.levels)
        self.told = self.made.values(start)
        return self.told

    def _errors(self, start: Array, values: Array, error: Array | None) -> Errors | None:
        if self.steps == 0:
            return _errors_of_steps(self.chain, values, self.offsets, self.reverse, error)
        rests = None
        if self.reverse and self.has_rest and error is not None:  # the rest comes first
            rests = (self._of_rest(error),) * 2
            error = prefix.last(rests[0], self.reverse)
        error, stored = jnp.zeros_like(start) if error is None else error, self.chain.rounding.stored
        defects = stored(self.told) - stored(ends_of(values[: self.steps], self.size, self.reverse))
        at, doubt = guard.followed(lambda defects: self.made.again(defects).values(error), defects)
        before, each = prefix.entering(prefix.boundaries(error, at, self.reverse), self.reverse), largest(values, self.offsets)
        most, sizes = exponents.scaled(jnp.abs(before), self.highest), each[: self.steps].reshape(-1, self.size, each.shape[1])
        inside, sizes = Inside(most, sizes, partial(self._follow, before)), sizes.max(1)
        if not self.reverse and self.has_rest:
            rests = self._of_rest(at[-1]), self._of_rest(doubt[-1])
        if rests is not None:
            at, doubt, sizes = (jnp.concatenate(some) for some in zip((at, doubt, sizes), (*rests, each[self.steps :]), strict=True))
        return Errors(at, sizes, inside, (doubt, sizes))

    def _part(self, part: slice) -> tuple[Any, Array]:
        return prefix.take((self.fold.data, self.offsets), part)

    def _of_rest(self, error: Array) -> Array:
        data, offsets = self._part(slice(self.steps, None))
        return prefix.walk((data, jnp.zeros_like(offsets)), error, self.fold.cross, reverse=self.reverse)

    def _follow(self, before: Array) -> Array:
        """The errors of all steps, from the one that enters each chunk."""
        return self.fold.follow(self._part(slice(None, self.steps)), before, self.size, self.reverse)
