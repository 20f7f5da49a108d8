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
from parscan.guard import Check, Errors, Found
from parscan.jacobians import Jacobian, closed, split
from parscan.layout import Group
from parscan.methods import Associative, Chunked, Method, Parallel, Sequential, Tree, Walk
from parscan.structure import Forms

ROUND = 3  # of a tree whose maps tell errors: eight steps each, which are taken one after another beside


class Chain(NamedTuple):
    """L linear maps of one program.

    crossing: () -> (data with leading axis L, map of (one entry of data, vector (n,)) to vector (p,)).
    stepping: the same as crossing, with nothing computed for all steps beforehand: slower, and holds nothing.
    forming: () -> (data with leading axis L, map of stacked entries of data to their Jacobians, stacked).
    forms: of the Jacobians, in the direction of travel; the vectors before and after a map have different lengths only if L is 1.
    same: all maps are one.
    epsilon: distance from 1 to the next number in the precision in which a map is computed, which may be less than its vectors have.
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


def is_guarded(method: Method) -> bool:
    return isinstance(method, Parallel) and method.guard


def judged(method: Method, start: Any, like: Any, journey: Callable[[Check | None], tuple[Any, Check | None]]) -> Any:
    """What is found on a journey in segments, of which all is judged at its end: an error grows from segment to segment.

    start: what enters, in leaves. like: shapes and dtypes of what is found.
    """
    if not is_guarded(method):
        return journey(None)[0]

    def once(again: Array) -> tuple[Any, Array]:
        found, check = journey(Check(again, jnp.ones((), bool), jax.tree.map(jnp.zeros_like, start)))
        assert check is not None
        return found, check.good

    return guard.repeated(once, like)


def sweep_on(chain: Chain, start: Array, offsets: Array, method: Method, check: Check, *, reverse: bool) -> tuple[Array, Check]:
    """`sweep` over one chain that goes on with a journey, of which all is judged at its end; nothing is mended here."""
    if _is_constant(chain, offsets):
        return offsets, check._replace(error=jnp.zeros_like(offsets[0]) if offsets.shape[0] else check.error)
    found = _through_one(chain, start, offsets, method, reverse)
    errors = found.errors(check.error)
    good = guard.is_sound(found.values, errors, chain.forms.after, chain.epsilon, reverse)
    return found.values, check._replace(good=check.good & good, error=errors.end if errors else check.error)


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
    if not is_guarded(method):
        return values
    good, error = [], None
    for one, (chain, _) in zip(found, journey, strict=True):
        errors = one.errors(error)
        good.append(guard.is_sound(one.values, errors, chain.forms.after, chain.epsilon, reverse))
        error = errors.end if errors else error
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
        values = _crossed(chain, start, offsets, reverse)
        return Found(values, partial(_errors_of_steps, chain, values, offsets, reverse))
    if isinstance(method, Chunked):
        return _chunked(chain, start, offsets, method.size or 1, method.levels, is_guarded(method), reverse)
    maps, upswept = _formed(chain, offsets), partial(prefix.upsweep, then=affine.then, reverse=reverse)
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
    at = _crossed(chain, error, jnp.zeros_like(offsets), reverse)
    return Errors(at, _largest(values, offsets), prefix.last(at, reverse))


def _errors_of_walk(chain: Chain, start: Array, values: Array, maps: Affine, reverse: bool, error: Array | None) -> Errors:
    """Of maps that were written down and taken one after another: their entries are rounded, where a step itself may cancel exactly."""
    defects = maps._replace(offset=_defects(chain, start, maps.offset, values, reverse))
    at = prefix.walk(defects, jnp.zeros_like(start) if error is None else error, affine.apply, reverse=reverse)
    return Errors(at, _largest(values, maps.offset), prefix.last(at, reverse))


def _errors_of_tree(chain: Chain, start: Array, values: Array, maps: Affine, made: prefix.Upsweep, reverse: bool, error: Array | None) -> Errors:
    """The maps of a later round carry the defects on; the steps inside each are taken one after another, from where it starts."""
    level = min(ROUND, len(made.rounds) - 1)
    rounds, size, error = made.rounds[level:], 2**level, jnp.zeros_like(start) if error is None else error
    rest = values.shape[0] - size * prefix.length(rounds[0])  # at the end of the journey
    data, one = chain.stepping()
    (steps, others), (told, left) = (_apart(some, rest, reverse) for some in ((data, maps.offset), values))
    ends = _ends(told, size, reverse)

    def unfolded(offsets, start, ends):
        before = prefix.entering(prefix.boundaries(start, ends, reverse), reverse)
        return prefix.unfold((steps[0], offsets), before, size=size, cross=partial(_affine, one), reverse=reverse)

    at = told - unfolded(steps[1], start, ends)
    made = prefix.again(prefix.Upsweep(rounds, None), rounds[0]._replace(offset=_ends(at, size, reverse)), affine.renewed, reverse=reverse)
    errors = prefix.downsweep(made, error, affine.apply, reverse=reverse)
    at += unfolded(jnp.zeros_like(told), error, errors)
    if rest:
        behind = prefix.walk(others, prefix.last(ends, reverse) - prefix.last(errors, reverse), partial(_affine, one), reverse=reverse)
        at = jnp.concatenate([left - behind, at] if reverse else [at, left - behind])
    return Errors(at, _largest(values, maps.offset), prefix.last(at, reverse))


def _affine(one: Callable[[Any, Array], Array], step: tuple[Any, Array], vector: Array) -> Array:
    """A step with its offset, or stacked ones."""
    data, offset = step
    return (jax.vmap(one) if offset.ndim == 2 else one)(data, vector) + offset


def _apart(some: Any, rest: int, reverse: bool) -> tuple[Any, Any]:
    """All but the journey's last `rest` steps, and these."""
    count = prefix.length(some)
    whole, others = (slice(rest, count), slice(0, rest)) if reverse else (slice(0, count - rest), slice(count - rest, count))
    return prefix.take(some, whole), prefix.take(some, others)


def _defects(chain: Chain, start: Array, offsets: Array, values: Array, reverse: bool) -> Array:
    """How far each value is from what its own step makes of the one before. A single map may change the width."""
    before = start[None] if values.shape[0] == 1 else prefix.entering(prefix.boundaries(start, values, reverse), reverse)
    data, cross = chain.stepping()
    return values - (jax.vmap(cross)(data, before) + offsets)


def _largest(values: Array, offsets: Array) -> Array:
    """What errors are compared with: a vector that is small because its offset cancels it may be off by as much as the offset."""
    return jnp.maximum(jnp.abs(values), jnp.abs(offsets))


def _through_order(journey: list[tuple[Chain, Array]], start: Array, method: Method, reverse: bool) -> list[Found]:
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
        others = [leg.stack_of(made.formed.get(place), some) for place, (leg, some) in enumerate(zip(legs, defects, strict=True))]
        at = iter(prefix.Again(made, others, affine.renewed).values(tree, jnp.zeros_like(legs[0].start)))
        error, left, found = jnp.zeros_like(legs[0].start), iter(legs), []
        for one in folded:
            parts = []
            for leg, told in zip([next(left) for _ in one.stacks], at, strict=False):
                parts.append((leg.followed(one, error, told), _largest(leg.steps, leg.offsets)))
                error = prefix.last(told, reverse)
            at_steps, sizes = (one.together(list(part)) for part in zip(*parts, strict=True))
            found.append(Errors(at_steps, sizes, error))
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
            cross = (lambda start: _crossed(chain, start, offsets, self.reverse)) if hi - lo == 1 else None
            return prefix.Stack(hi - lo, lambda: affine.scaled(_formed(chain, offsets)), cross)

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
            return self.told - _ends(self.steps, self.size, self.reverse)
        return _defects(self.chain, self.start, self.offsets, self.told, self.reverse) if formed else jnp.zeros_like(self.told)

    def stack_of(self, maps: Affine | None, defects: Array) -> prefix.Stack:
        """The same maps, with defects for offsets."""
        assert maps is not None or self.stack.cross is not None
        cross = None if self.stack.cross is None else lambda error: _crossed(self.chain, error, defects, self.reverse)
        return prefix.Stack(self.stack.count, lambda: maps._replace(offset=defects) if maps else None, cross)

    def followed(self, folded: Folded, error: Array, told: Array) -> Array:
        """The errors of all steps, from the one that enters and those of the maps."""
        if self.size == 1:
            return told
        before = prefix.entering(prefix.boundaries(error, told, self.reverse), self.reverse)
        still = self.chain.crossing()[0], jnp.zeros_like(self.offsets)
        return prefix.unfold(still, before, size=self.size, cross=folded.fold.cross, reverse=self.reverse)


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
        if reverse and steps < offsets.shape[0] and error is not None:  # the rest comes first
            error = prefix.last(of_rest(error), reverse)
        error = jnp.zeros_like(start) if error is None else error
        some = prefix.again(made, maps._replace(offset=told - _ends(values[:steps], size, reverse)), affine.renewed, reverse=reverse)
        at = prefix.downsweep(some, error, affine.apply, reverse=reverse)
        before = prefix.entering(prefix.boundaries(error, at, reverse), reverse)
        most, each = exponents.scaled(jnp.abs(before), highest), _largest(values, offsets)

        def follow():
            still = fold.data if steps == offsets.shape[0] else prefix.take(fold.data, slice(None, steps))
            return prefix.unfold((still, jnp.zeros_like(offsets[:steps])), before, size=size, cross=fold.cross, reverse=reverse)

        sizes = each[:steps].reshape(-1, size, each.shape[1])
        inside, sizes = guard.Inside(most, sizes, follow), sizes.max(1)
        if not reverse and steps < offsets.shape[0]:
            at = jnp.concatenate([at, of_rest(at[-1])])
            sizes = jnp.concatenate([sizes, each[steps:]])
        return Errors(at, sizes, prefix.last(at, reverse), inside)

    return Found(values, errors)


def _ends(values: Array, size: int, reverse: bool) -> Array:
    """Of the values inside chunks, the one that leaves each chunk."""
    return values[0 if reverse else size - 1 :: size]


class Fold:
    """How a chunk's map grows: its columns are pushed through the next step, and rescaled every time. The chain's maps are square."""

    def __init__(self, chain: Chain, dtype: Any):
        self.data, self.one = chain.crossing()
        self.forms, self.dtype = chain.forms.closed(), dtype
        self.blocks = tuple((group.blocks, group.side) for group in chain.forms.before)

    def identity(self, chunks: int) -> tuple[Affine, Array]:
        """Maps, and the largest exponent that each of their columns has had: (chunks, n)."""
        seeds = self.forms.seeds(self.dtype)
        columns = jnp.broadcast_to(seeds, (chunks, *seeds.shape))
        n = seeds.shape[1]
        none = jnp.zeros((chunks, n), jnp.int32)
        return Affine(_Columns(columns, self.blocks), none, jnp.zeros((chunks, n), self.dtype)), none

    def extend(self, step: tuple[Any, Array], folded: tuple[Affine, Array]) -> tuple[Affine, Array]:
        (data, offset), (maps, highest) = step, folded
        columns = jax.vmap(jax.vmap(self.one, (None, 0)))(data, maps.matrix.columns)
        assert maps.exponent is not None  # `identity` gave it
        matrix, exponent = affine.renormalised(_Columns(columns, self.blocks), maps.exponent)
        return Affine(matrix, exponent, jax.vmap(self.one)(data, maps.offset) + offset), jnp.maximum(highest, exponent)

    def cross(self, step: tuple[Any, Array], vector: Array) -> Array:
        return _affine(self.one, step, vector)

    def explicit(self, folded: tuple[Affine, Array]) -> Affine:
        maps, _ = folded
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
