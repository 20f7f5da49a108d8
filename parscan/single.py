"""One chain of maps by any method, and how far what it finds is from one map after another."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from parscan import affine, exponents, guard, prefix
from parscan.affine import Affine
from parscan.folding import Fold
from parscan.guard import Errors, Found
from parscan.jacobians import closed
from parscan.maps import Chain, crossed, defects_of, ends_of, formed, largest, stepped
from parscan.methods import Associative, Chunked, Method, Tree, Walk

ROUND = 3  # of a tree whose maps tell errors: eight steps each, which are taken one after another beside


def through_one(chain: Chain, start: Array, offsets: Array, method: Method, reverse: bool) -> Found:
    if offsets.shape[0] == 1:
        values = crossed(chain, start, offsets, reverse)
        return Found(values, partial(_errors_of_steps, chain, values, offsets, reverse))
    if isinstance(method, Chunked):
        return _chunked(chain, start, offsets, method.size or 1, method.levels, method.guard, reverse)
    maps, upswept = formed(chain, offsets), partial(prefix.upsweep, then=affine.then, reverse=reverse)
    if isinstance(method, Walk):
        values = prefix.walk(maps, start, affine.apply, reverse=reverse)
        return Found(values, partial(_errors_of_walk, chain, start, values, maps, reverse))
    if isinstance(method, Tree):
        made = upswept(maps)
        values = prefix.downsweep(made, start, affine.apply, reverse=reverse)
        return Found(values, partial(_errors_of_tree, chain, start, values, maps, made, reverse))
    if isinstance(method, Associative):
        values = prefix.associative(affine.scaled(_closed(maps)), start, affine.apply, affine.then, reverse=reverse)
        return Found(values, lambda error: _errors_of_tree(chain, start, values, maps, upswept(maps), reverse, error))
    raise TypeError(f"no journey by {method!r}")


def _errors_of_steps(chain: Chain, values: Array, offsets: Array, reverse: bool, error: Array | None) -> Errors | None:
    """Of maps that were taken one after another: what the vector was off by travels with it."""
    if error is None:
        return None
    at = crossed(chain, error, jnp.zeros_like(offsets), reverse)
    return Errors(at, largest(values, offsets), prefix.last(at, reverse))


def _errors_of_walk(chain: Chain, start: Array, values: Array, maps: Affine, reverse: bool, error: Array | None) -> Errors:
    """Of maps that were written down and taken one after another: their entries are rounded, where a step itself may cancel exactly."""
    defects = maps._replace(offset=defects_of(chain, start, maps.offset, values, reverse))
    at = prefix.walk(defects, jnp.zeros_like(start) if error is None else error, affine.apply, reverse=reverse)
    return Errors(at, largest(values, maps.offset), prefix.last(at, reverse))


def _errors_of_tree(chain: Chain, start: Array, values: Array, maps: Affine, made: prefix.Upsweep, reverse: bool, error: Array | None) -> Errors:
    """The maps of a later round carry the defects on; the steps inside each are taken one after another, from where it starts."""
    level = min(ROUND, len(made.rounds) - 1)
    rounds, size, error = made.rounds[level:], 2**level, jnp.zeros_like(start) if error is None else error
    rest = values.shape[0] - size * prefix.length(rounds[0])  # at the end of the journey
    data, one = chain.stepping()
    (steps, others), (told, left) = (_apart(some, rest, reverse) for some in ((data, maps.offset), values))
    ends = ends_of(told, size, reverse)

    def unfolded(offsets, start, ends):
        before = prefix.entering(prefix.boundaries(start, ends, reverse), reverse)
        return prefix.unfold((steps[0], offsets), before, size=size, cross=partial(stepped, one), reverse=reverse)

    stored = chain.rounding.stored
    at = stored(told) - stored(unfolded(steps[1], start, ends))
    made = prefix.again(prefix.Upsweep(rounds, None), rounds[0]._replace(offset=ends_of(at, size, reverse)), affine.renewed, reverse=reverse)
    errors = prefix.downsweep(made, error, affine.apply, reverse=reverse)
    at += unfolded(jnp.zeros_like(told), error, errors)
    if rest:
        behind = prefix.walk(others, prefix.last(ends, reverse) - prefix.last(errors, reverse), partial(stepped, one), reverse=reverse)
        off = stored(left) - stored(behind)
        at = jnp.concatenate([off, at] if reverse else [at, off])
    return Errors(at, largest(values, maps.offset), prefix.last(at, reverse))


def _apart(some: Any, rest: int, reverse: bool) -> tuple[Any, Any]:
    """All but the journey's last `rest` steps, and these."""
    count = prefix.length(some)
    whole, others = (slice(rest, count), slice(0, rest)) if reverse else (slice(0, count - rest), slice(count - rest, count))
    return prefix.take(some, whole), prefix.take(some, others)


def _closed(maps: Affine) -> Affine:
    """Written as kinds whose products are of that kind, whatever the level: what `lax.associative_scan` needs."""
    return maps._replace(matrix=closed(maps.matrix))


def _chunked(chain: Chain, start: Array, offsets: Array, size: int, levels: int | None, checked: bool, reverse: bool) -> Found:
    """fold -> scan -> unfold."""
    fold, steps = Fold(chain, offsets.dtype), offsets.shape[0] // size * size
    maps: Any = None
    made: Any = None
    told: Any = None
    highest: Any = None

    def through(chunks, start):
        nonlocal maps, made, told, highest
        maps, highest = fold.explicit(chunks), chunks[1]
        made = prefix.upsweep(maps, affine.then, reverse=reverse, levels=levels)
        told = prefix.downsweep(made, start, affine.apply, reverse=reverse)
        return told

    given = {"size": size, "identity": fold.identity, "extend": fold.extend, "cross": fold.cross, "reverse": reverse}
    values = prefix.chunked((fold.data, offsets), start, through=through, every=checked, **given)

    def of_rest(error):
        some, none = prefix.take(fold.data, slice(steps, None)), jnp.zeros_like(offsets[steps:])
        return prefix.walk((some, none), error, fold.cross, reverse=reverse)

    def errors(error):
        if steps == 0:
            return _errors_of_steps(chain, values, offsets, reverse, error)
        stored, rest = chain.rounding.stored, None
        if reverse and steps < offsets.shape[0] and error is not None:  # the rest comes first
            rest = of_rest(error)
            error = prefix.last(rest, reverse)
        error = jnp.zeros_like(start) if error is None else error
        defects = stored(told) - stored(ends_of(values[:steps], size, reverse))
        some = prefix.again(made, maps._replace(offset=defects), affine.renewed, reverse=reverse)
        at = prefix.downsweep(some, error, affine.apply, reverse=reverse)
        before = prefix.entering(prefix.boundaries(error, at, reverse), reverse)
        most, each = exponents.scaled(jnp.abs(before), highest), largest(values, offsets)

        def follow():
            still = fold.data if steps == offsets.shape[0] else prefix.take(fold.data, slice(None, steps))
            return prefix.unfold((still, jnp.zeros_like(offsets[:steps])), before, size=size, cross=fold.cross, reverse=reverse)

        sizes = each[:steps].reshape(-1, size, each.shape[1])
        inside, sizes = guard.Inside(most, sizes, follow), sizes.max(1)
        if not reverse and steps < offsets.shape[0]:
            rest = of_rest(at[-1])
        if rest is not None:
            at, sizes = jnp.concatenate([at, rest]), jnp.concatenate([sizes, each[steps:]])
        return Errors(at, sizes, prefix.last(at, reverse), inside)

    return Found(values, errors)
