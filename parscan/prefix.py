"""Schedules for a chain of maps: who is applied to whom, and when.

Nothing here knows what a map is. A chain is a pytree of arrays with a leading axis of length L, one entry a map; a caller
says how a map acts on a value (`apply`) and how two maps join (`then(second, first)`, named in the order in which they are
applied). `reverse=True` travels from the last entry to the first. Every schedule returns the value that leaves each map,
at that map's own index.

Written against the array API, so that the tests can run the very same code on NumPy spans `(lo, hi, depth)` and prove order,
coverage and depth without a float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax import lax

from parscan.order import Node, Unit, units

Maps = Any
Value = Any
Apply = Callable[[Maps, Value], Value]
Then = Callable[[Maps, Maps], Maps]
Renew = Callable[[Maps, Maps, Maps], Maps]  # (what two maps were joined to, second, first) -> the same with the offset that they now have


def length(maps: Maps) -> int:
    """Number of maps in a stacked chain. A leaf whose leading axis is 1, where others are longer, is the same for all."""
    sizes = [leaf.shape[0] for leaf in jax.tree.leaves(maps)]
    return 0 if 0 in sizes else max(sizes)


def take(tree: Any, index: Any) -> Any:
    """Index or slice the leading axis of every leaf."""
    if len({leaf.shape[0] for leaf in jax.tree.leaves(tree)}) < 2:
        return jax.tree.map(lambda x: x[index], tree)
    return jax.tree.map(lambda x: x[index] if x.shape[0] != 1 else x if isinstance(index, slice) else x[0], tree)


def apart(maps: Maps, rest: int, reverse: bool) -> tuple[Maps, Maps]:
    """All but the journey's last `rest` maps, and these."""
    count = length(maps)
    whole, others = (slice(rest, count), slice(0, rest)) if reverse else (slice(0, count - rest), slice(count - rest, count))
    return take(maps, whole), take(maps, others)


def expanded(maps: Maps) -> Maps:
    """The same maps with what is the same for all written out for each."""
    count = length(maps)
    return jax.tree.map(lambda x: x.__array_namespace__().broadcast_to(x, (count, *x.shape[1:])), maps)


def _concat(parts: list) -> Any:
    return parts[0].__array_namespace__().concat(parts, axis=0)


def boundaries(start: Value, leaving: Value, reverse: bool) -> Value:
    """The L + 1 values between the maps, from the value entering the first and those leaving each."""

    return jax.tree.map(lambda s, rest: _concat([rest, s[None]] if reverse else [s[None], rest]), start, leaving)


def entering(bounds: Value, reverse: bool) -> Value:
    """Of L + 1 boundary values, the one that enters each of the L maps."""
    return take(bounds, slice(1, None) if reverse else slice(None, -1))


def leaving(bounds: Value, reverse: bool) -> Value:
    """Of L + 1 boundary values, the one that leaves each of the L maps."""
    return entering(bounds, not reverse)


def first(bounds: Value, reverse: bool) -> Value:
    """Of L + 1 boundary values, the one the journey starts from."""
    return take(bounds, -1 if reverse else 0)


def last(values: Value, reverse: bool) -> Value:
    """Of the values that leave each map, the one the journey ends with."""
    return take(values, 0 if reverse else -1)


def walk(maps: Maps, start: Value, apply: Apply, *, reverse: bool = False, scan: Callable = lax.scan) -> Value:
    """One map after another: depth L, no product of maps. `apply` gets a single map."""

    return _crossing(maps, start, apply, reverse, scan)


def up(maps: Maps, then: Then, *, reverse: bool = False, levels: int | None = None, carry: Callable[[Maps, Maps], Maps] | None = None) -> list[Maps]:
    """The maps, and those of every round of joining neighbours, each round half as many.

    A map without a partner is nobody's burden: it is left out of the next round. With `carry`, which puts two stacks of maps one after the other, it is
    carried along, so that the last round's one map is the product of all, in ceil(log2 C) rounds and C - 1 joins.
    """
    rounds = [maps]
    while length(rounds[-1]) > 1 and (levels is None or len(rounds) <= levels):
        maps = rounds[-1]
        _, pairs, firsts, evens, odds = _halves(maps, reverse)
        joined = then(odds, take(evens, slice(firsts - pairs, None) if reverse else slice(None, pairs)))
        if carry is not None and firsts > pairs:
            alone = take(evens, slice(None, 1) if reverse else slice(-1, None))
            joined = carry(alone, joined) if reverse else carry(joined, alone)
        rounds.append(joined)
    return rounds


def down(rounds: list[Maps], start: Value, apply: Apply, *, reverse: bool = False, walk: Callable = walk, end: Value | None = None) -> Value:
    """The value leaving each map, handed out from the last round to the first: as many rounds of `apply`, on stacked maps.

    end: the value that leaves the last round's one map, if it is known.
    """
    count = length(rounds[-1])
    if count == 0:
        return jax.tree.map(lambda s: s[None][:0], start)
    if count > 1:
        values = walk(rounds[-1], start, apply, reverse=reverse)
    elif end is not None:
        values = jax.tree.map(lambda e: e[None], end)
    else:
        values = apply(rounds[-1], jax.tree.map(lambda s: s[None], start))
    for maps in reversed(rounds[:-1]):
        even, pairs, firsts, evens, _ = _halves(maps, reverse)
        after_odd = take(values, slice(-pairs, None) if reverse else slice(None, pairs))
        before_even = take(boundaries(start, after_odd, reverse), slice(pairs + 1 - firsts, None) if reverse else slice(None, firsts))
        after_even = apply(evens, before_even)
        lead, other = (after_even, after_odd) if even == 0 else (after_odd, after_even)
        values = jax.tree.map(_interleave, lead, other)
    return values


def _halves(maps: Maps, reverse: bool) -> tuple[int, int, int, Maps, Maps]:
    """Position p of the journey is entry p, or entry count - 1 - p in reverse: where 0, 2, … begin, how many pairs, how many of 0, 2, …, both."""
    count = length(maps)
    even, odd = ((count - 1) % 2, count % 2) if reverse else (0, 1)
    return even, count // 2, (count + 1) // 2, take(maps, slice(even, None, 2)), take(maps, slice(odd, None, 2))


class Upsweep(NamedTuple):
    """What `tree` makes on the way up. last: the journey's last map where it has an even number of them, which meets a vector only; else None."""

    rounds: list[Maps]
    last: Maps | None


def upsweep(maps: Maps, then: Then, *, reverse: bool = False, levels: int | None = None) -> Upsweep:
    count = length(maps)
    if count % 2 or count == 0 or levels == 0:
        return Upsweep(up(maps, then, reverse=reverse, levels=levels), None)
    rest, last = apart(maps, 1, reverse)
    return Upsweep(up(rest, then, reverse=reverse, levels=levels), last)


def downsweep(made: Upsweep, start: Value, apply: Apply, *, reverse: bool = False, walk: Callable = walk) -> Value:
    values = down(made.rounds, start, apply, reverse=reverse, walk=walk)
    if made.last is None:
        return values
    end = apply(made.last, take(values, slice(None, 1) if reverse else slice(-1, None)))
    return jax.tree.map(lambda v, e: _concat([e, v] if reverse else [v, e]), values, end)


def again(made: Upsweep, maps: Maps, renew: Renew, *, reverse: bool = False) -> Upsweep:
    """The same upsweep over maps of which only the offsets are others."""
    known, (rest, last) = iter(made.rounds[1:]), (maps, None) if made.last is None else apart(maps, 1, reverse)
    return Upsweep(up(rest, lambda second, first: renew(next(known), second, first), reverse=reverse, levels=len(made.rounds) - 1), last)


def tree(maps: Maps, start: Value, apply: Apply, then: Then, *, reverse: bool = False, levels: int | None = None, walk: Callable = walk) -> Value:
    """Work-efficient prefix: neighbours are joined on the way up, values handed out on the way down.

    C maps take fewer than C joins in less than log2(C) rounds, and as many rounds of `apply`, on stacked maps. No product
    is made that no value needs: the journey's last map meets a vector only. After `levels` rounds the maps that remain are walked.

    Source: G. E. Blelloch, Prefix sums and their applications (1990); S. Wang, Y. Bai, G. Pekhimenko, BPPSA (MLSys 2020).
    """
    return downsweep(upsweep(maps, then, reverse=reverse, levels=levels), start, apply, reverse=reverse, walk=walk)


def _interleave(lead, other):
    """lead[0], other[0], lead[1], …; `lead` may be longer by one."""
    xp, common = lead.__array_namespace__(), other.shape[0]
    woven = xp.reshape(xp.stack([lead[:common], other], axis=1), (2 * common, *lead.shape[1:]))
    return woven if lead.shape[0] == common else _concat([woven, lead[common:]])


def associative(maps: Maps, start: Value, apply: Apply, then: Then, *, reverse: bool = False) -> Value:
    """`lax.associative_scan`: every prefix as an explicit map, then all applied to the start."""
    if length(maps) == 0:
        return walk(maps, start, apply, reverse=reverse)
    prefixes = lax.associative_scan(lambda earlier, later: then(later, earlier), expanded(maps), reverse=reverse)
    return apply(prefixes, jax.tree.map(lambda s: s[None], start))


@dataclass(frozen=True)
class Stack:
    """Equal maps of a chain whose maps differ elsewhere.

    count: how many.
    form: () -> the maps, with leading axis `count`.
    cross: value entering -> values leaving each of them (leading axis `count`), without forming anything; None if there is no such way.
    """

    count: int
    form: Callable[[], Maps]
    cross: Callable[[Value], Value] | None = None


def one_after_another(first: Maps, second: Maps) -> Maps:
    """Two stacks as one."""
    return jax.tree.map(lambda a, b: _concat([a, b]), expanded(first), expanded(second))


def ordered(stacks: Sequence[Stack], tree: Node, start: Value, apply: Apply, then: Then, **options: Any) -> list[Value]:
    """The values leaving each map of every stack, by a tree from `parscan.order`.

    Args:
        stacks: in the order of travel; `reverse` travels each from its last entry to its first.
        tree: over units of them, in the order of travel.
        options: those of `Ordered`.
    """
    return Ordered(stacks, apply, then, **options).values(tree, start)


class Ordered:
    """A journey by a tree from `parscan.order`. Maps are formed, and products taken, when somebody first asks for them.

    Args:
        carry: how two stacks of maps become one, if they are not alike.
    """

    def __init__(self, stacks: Sequence[Stack], apply: Apply, then: Then, *, reverse: bool = False, carry: Callable[[Maps, Maps], Maps] = one_after_another):
        self.stacks, self.apply, self.then, self.reverse, self.carry = stacks, apply, then, reverse, carry
        self.formed: dict[int, Maps] = {}
        self.rounds: dict[Unit, list[Maps]] = {}
        self.upsweeps: dict[Unit, Upsweep] = {}
        self.products: dict[Node, Maps] = {}
        self.left: dict[Unit, Value] = {}

    def maps(self, unit: Unit) -> Maps:
        stack = self.stacks[unit.stack]
        maps = self.formed[unit.stack] if unit.stack in self.formed else self.formed.setdefault(unit.stack, stack.form())
        first, past = unit.first, unit.first + unit.count
        return take(maps, slice(stack.count - past, stack.count - first) if self.reverse else slice(first, past))

    def rounds_of(self, unit: Unit) -> list[Maps]:
        """The maps of a unit, and those of every round of joining neighbours, down to one."""
        return up(self.maps(unit), self.then, reverse=self.reverse, carry=self.carry)

    def upsweep_of(self, unit: Unit) -> Upsweep:
        return upsweep(self.maps(unit), self.then, reverse=self.reverse)

    def joined(self, node: Node) -> Maps:
        assert not isinstance(node, Unit)
        return self.then(self.product(node.second), self.product(node.first))

    def product(self, node: Node) -> Maps:
        """The one map across a node."""
        if node not in self.products:
            if isinstance(node, Unit):
                self.rounds[node] = self.rounds_of(node)
                self.products[node] = take(self.rounds[node][-1], 0)
            else:
                self.products[node] = self.joined(node)
        return self.products[node]

    def travel(self, node: Node, start: Value, end: Value | None = None) -> Value:
        """Notes the values leaving each map of a node, and returns the last: `end`, if that is known."""
        if isinstance(node, Unit):
            self.left[node] = self.inside(node, start, end)
            return last(self.left[node], self.reverse)
        if node.walked:
            return self.travel(node.second, self.travel(node.first, start), end)
        middle = self.apply(self.product(node.first), start)
        self.travel(node.first, start, middle)
        return self.travel(node.second, middle, end)

    def inside(self, unit: Unit, start: Value, end: Value | None) -> Value:
        stack = self.stacks[unit.stack]
        if unit in self.rounds:
            return down(self.rounds[unit], start, self.apply, reverse=self.reverse, end=end)
        if unit.count == stack.count == 1 and stack.cross is not None:
            return stack.cross(start)
        self.upsweeps[unit] = self.upsweep_of(unit)
        return downsweep(self.upsweeps[unit], start, self.apply, reverse=self.reverse)

    def values(self, root: Node, start: Value) -> list[Value]:
        self.travel(root, start)
        found = []
        for place, stack in enumerate(self.stacks):
            some = [self.left[unit] for unit in units(root) if unit.stack == place]
            found.append(jax.tree.map(lambda *v: _concat(list(v[::-1] if self.reverse else v)), *some) if len(some) > 1 else some[0] if stack.count else None)
        return found


class Again(Ordered):
    """The same journey over maps of which only the offsets are others."""

    def __init__(self, made: Ordered, stacks: Sequence[Stack], renew: Renew):
        super().__init__(stacks, made.apply, made.then, reverse=made.reverse, carry=made.carry)
        self.made, self.renew = made, renew

    def rounds_of(self, unit: Unit) -> list[Maps]:
        known = iter(self.made.rounds[unit][1:])

        def then(second: Maps, first: Maps) -> Maps:
            joined, count = next(known), length(second)  # where a map without a partner was carried along, it stands at the end of the journey
            return self.renew(take(joined, slice(-count, None) if self.reverse else slice(None, count)), second, first)

        return up(self.maps(unit), then, reverse=self.reverse, carry=self.carry)

    def upsweep_of(self, unit: Unit) -> Upsweep:
        return again(self.made.upsweeps[unit], self.maps(unit), self.renew, reverse=self.reverse)

    def joined(self, node: Node) -> Maps:
        assert not isinstance(node, Unit)
        return self.renew(self.made.products[node], self.product(node.second), self.product(node.first))


def by_segments(
    cross: Callable[[Any, Maps, int], tuple[Any, Any]], carry: Any, steps: Maps, count: int, size: int | None, *, reverse: bool = False
) -> tuple[Any, Any]:
    """`cross` from segment to segment of `size` steps, and over a shorter one at the end of the chain.

    Args:
        cross: (carry, steps, how many) -> (carry, what each of these steps gives).

    Returns:
        the last carry, and what every step gives.
    """
    if size is None or count <= size:
        return cross(carry, steps, count)
    whole, found = count // size * size, {}
    for lo, hi in ((whole, count), (0, whole)) if reverse else ((0, whole), (whole, count)):
        some, several = take(steps, slice(lo, hi)), (hi - lo) // size
        if several > 1:
            cut = jax.tree.map(lambda x, several=several: x.reshape(several, size, *x.shape[1:]), some)
            carry, parts = lax.scan(lambda carry, part: cross(carry, part, size), carry, cut, reverse=reverse)
            found[lo] = jax.tree.map(lambda x: x.reshape(x.shape[0] * size, *x.shape[2:]), parts)
        elif hi > lo:
            carry, found[lo] = cross(carry, some, hi - lo)
    parts = [found[lo] for lo in sorted(found)]
    return carry, jax.tree.map(lambda *some: _concat(list(some)), *parts) if len(parts) > 1 else parts[0]


def fold(steps: Maps, *, size: int, identity: Callable[[int], Maps], extend: Then, reverse: bool = False, scan: Callable = lax.scan) -> Maps:
    """The maps of chunks of `size` steps, which divides their number: all chunks at once, step by step; see `chunked`."""
    chunks = length(steps) // size
    return scan(lambda maps, step: (extend(step, maps), None), identity(chunks), _by_chunk(steps, size), reverse=reverse)[0]


def unfold(steps: Maps, before: Value, *, size: int, cross: Apply, reverse: bool = False, scan: Callable = lax.scan) -> Value:
    """The value leaving every step, from the one entering each chunk: all chunks at once, step by step."""
    inside = _crossing(_by_chunk(steps, size), before, cross, reverse, scan)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(length(steps), *x.shape[2:]), inside)


def _by_chunk(steps: Maps, size: int) -> Maps:
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // size, size, *x.shape[1:]).swapaxes(0, 1), steps)


def _crossing(steps: Maps, value: Value, cross: Apply, reverse: bool, scan: Callable) -> Value:
    leaves, tree = jax.tree.flatten(steps)
    count = length(steps)
    same = {i: leaf[0] for i, leaf in enumerate(leaves) if leaf.shape[0] != count}

    def step(value, some):
        rest = iter(some)
        value = cross(jax.tree.unflatten(tree, [same[i] if i in same else next(rest) for i in range(len(leaves))]), value)
        return value, value

    return scan(step, value, [leaf for i, leaf in enumerate(leaves) if i not in same], reverse=reverse)[1]


def chunked(
    steps: Maps,
    start: Value,
    *,
    size: int,
    identity: Callable[[int], Maps],
    extend: Then,
    cross: Apply,
    through: Callable[[Maps, Value], Value],
    reverse: bool = False,
    scan: Callable = lax.scan,
    every: bool = False,
) -> Value:
    """fold -> scan -> unfold over chunks of `size` steps.

    Args:
        steps: the chain; L need not be a multiple of `size`: the rest is walked apart, beside the fold or the unfold.
        identity: number of chunks -> that many identity maps.
        extend: (steps, maps) -> the maps followed by the steps, for all chunks at once.
        cross: (step, value) -> value; stacked steps or a single one.
        through: (chunk maps, start) -> the value leaving each chunk; a tree or a walk.
        every: take all chunks' maps through it, although the journey's last chunk needs none, unless the rest follows it.
    """
    whole = length(steps) // size * size
    steps, rest = take(steps, slice(None, whole)), take(steps, slice(whole, None))
    if whole == 0:
        return _crossing(rest, start, cross, reverse, scan)
    has_rest = length(rest) > 0
    if has_rest and reverse:  # the rest comes first in the journey
        after_rest = _crossing(rest, start, cross, reverse, scan)
        start = take(after_rest, 0)
    maps = fold(steps, size=size, identity=identity, extend=extend, reverse=reverse, scan=scan)
    last_matters = every or (has_rest and not reverse)
    if not last_matters:
        maps = take(maps, slice(1, None) if reverse else slice(None, -1))
    ends = through(maps, start) if length(maps) else jax.tree.map(lambda v: v[None][:0], start)  # of a single chunk, whose map nobody needs
    bounds = boundaries(start, ends, reverse)
    values = unfold(steps, entering(bounds, reverse) if last_matters else bounds, size=size, cross=cross, reverse=reverse, scan=scan)
    if not has_rest:
        return values
    if not reverse:
        after_rest = _crossing(rest, take(bounds, -1), cross, reverse, scan)
    return jax.tree.map(lambda v, r: _concat([v, r]), values, after_rest)
