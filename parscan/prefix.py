"""Schedules for a chain of maps: who is applied to whom, and when.

Nothing here knows what a map is. A chain is a pytree of arrays with a leading axis of length L, one entry a map; a caller
says how a map acts on a value (`apply`) and how two maps join (`then(second, first)`, named in the order in which they are
applied). `reverse=True` travels from the last entry to the first. Every schedule returns the value that leaves each map,
at that map's own index.

Written against the array API, so that the tests can run the very same code on NumPy spans `(lo, hi, depth)` and prove order,
coverage and depth without a float.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

Maps = Any
Value = Any
Apply = Callable[[Maps, Value], Value]
Then = Callable[[Maps, Maps], Maps]


def length(maps: Maps) -> int:
    """Number of maps in a stacked chain."""
    return jax.tree.leaves(maps)[0].shape[0]


def take(tree: Any, index: Any) -> Any:
    """Index or slice the leading axis of every leaf."""
    return jax.tree.map(lambda x: x[index], tree)


def boundaries(start: Value, leaving: Value, reverse: bool) -> Value:
    """The L + 1 values between the maps, from the value entering the first and those leaving each."""

    def join(s, rest):
        parts = (rest, s[None]) if reverse else (s[None], rest)
        return s.__array_namespace__().concat(parts, axis=0)

    return jax.tree.map(join, start, leaving)


def entering(bounds: Value, reverse: bool) -> Value:
    """Of L + 1 boundary values, the one that enters each of the L maps."""
    return take(bounds, slice(1, None) if reverse else slice(None, -1))


def leaving(bounds: Value, reverse: bool) -> Value:
    """Of L + 1 boundary values, the one that leaves each of the L maps."""
    return entering(bounds, not reverse)


def first(bounds: Value, reverse: bool) -> Value:
    """Of L + 1 boundary values, the one the journey starts from."""
    return take(bounds, -1 if reverse else 0)


def walk(maps: Maps, start: Value, apply: Apply, *, reverse: bool = False, scan: Callable = lax.scan) -> Value:
    """One map after another: depth L, no product of maps. `apply` gets a single map."""

    def step(value, one):
        value = apply(one, value)
        return value, value

    return scan(step, start, maps, reverse=reverse)[1]


def tree(maps: Maps, start: Value, apply: Apply, then: Then, *, reverse: bool = False, levels: int | None = None, walk: Callable = walk) -> Value:
    """Work-efficient prefix: neighbours are joined on the way up, values handed out on the way down.

    With C maps: fewer than C joins in at most ceil(log2 C) rounds, and as many rounds of `apply`, which acts on stacked maps
    here. After `levels` rounds the maps that remain are walked. A map without a partner is nobody's burden: it is
    the last of the journey, so its value is one more `apply`.

    Source: G. E. Blelloch, Prefix sums and their applications (1990); S. Wang, Y. Bai, G. Pekhimenko, BPPSA (MLSys 2020).
    """
    count = length(maps)
    if count == 1:
        return apply(maps, jax.tree.map(lambda s: s[None], start))
    if count == 0:
        return jax.tree.map(lambda s: s[None][:0], start)
    if levels == 0:
        return walk(maps, start, apply, reverse=reverse)
    pairs, firsts = count // 2, (count + 1) // 2
    # Position p of the journey is entry p, or entry count - 1 - p in reverse: where positions 0, 2, … and 1, 3, … begin.
    even, odd = ((count - 1) % 2, count % 2) if reverse else (0, 1)
    evens, odds = take(maps, slice(even, None, 2)), take(maps, slice(odd, None, 2))
    paired = take(evens, slice(firsts - pairs, None) if reverse else slice(None, pairs))
    remaining = None if levels is None else levels - 1
    after_odd = tree(then(odds, paired), start, apply, then, reverse=reverse, levels=remaining, walk=walk)
    before_even = boundaries(start, after_odd, reverse)
    before_even = take(before_even, slice(pairs + 1 - firsts, None) if reverse else slice(None, firsts))
    after_even = apply(evens, before_even)
    lead, other = (after_even, after_odd) if even == 0 else (after_odd, after_even)
    return jax.tree.map(_interleave, lead, other)


def _interleave(lead, other):
    """lead[0], other[0], lead[1], …; `lead` may be longer by one."""
    xp, common = lead.__array_namespace__(), other.shape[0]
    woven = xp.reshape(xp.stack([lead[:common], other], axis=1), (2 * common, *lead.shape[1:]))
    return woven if lead.shape[0] == common else xp.concat([woven, lead[common:]], axis=0)


def associative(maps: Maps, start: Value, apply: Apply, then: Then, *, reverse: bool = False) -> Value:
    """`lax.associative_scan`: every prefix as an explicit map, then all applied to the start."""
    if length(maps) == 0:
        return walk(maps, start, apply, reverse=reverse)
    prefixes = lax.associative_scan(lambda earlier, later: then(later, earlier), maps, reverse=reverse)
    return apply(prefixes, jax.tree.map(lambda s: s[None], start))


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
) -> Value:
    """fold -> scan -> unfold over chunks of `size` steps.

    Args:
        steps: the chain; L need not be a multiple of `size`: the rest is walked apart, beside the fold or the unfold.
        identity: number of chunks -> that many identity maps.
        extend: (steps, maps) -> the maps followed by the steps, for all chunks at once.
        cross: (step, value) -> value; stacked steps or a single one.
        through: (chunk maps, start) -> the value leaving each chunk; a tree or a walk.
    """
    count = length(steps)
    chunks = count // size

    def sweep(some, value):
        def step(value, one):
            value = cross(one, value)
            return value, value

        return scan(step, value, some, reverse=reverse)

    rest = take(steps, slice(chunks * size, None))
    if chunks == 0:
        return sweep(rest, start)[1]
    has_rest = chunks * size < count
    if has_rest and reverse:  # the rest comes first in the journey
        start, after_rest = sweep(rest, start)
    by_chunk = jax.tree.map(lambda x: x[: chunks * size].reshape(chunks, size, *x.shape[1:]).swapaxes(0, 1), steps)
    maps, _ = scan(lambda maps, step: (extend(step, maps), None), identity(chunks), by_chunk, reverse=reverse)
    last_matters = has_rest and not reverse  # the journey's last chunk needs no map, unless the rest follows it
    if not last_matters:
        maps = take(maps, slice(1, None) if reverse else slice(None, -1))
    bounds = boundaries(start, through(maps, start), reverse)
    inside = sweep(by_chunk, entering(bounds, reverse) if last_matters else bounds)[1]
    values = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(chunks * size, *x.shape[2:]), inside)
    if not has_rest:
        return values
    if not reverse:
        after_rest = sweep(rest, take(bounds, -1))[1]
    return jax.tree.map(lambda v, r: v.__array_namespace__().concat([v, r], axis=0), values, after_rest)
