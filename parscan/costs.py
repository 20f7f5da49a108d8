"""What crossing a chain costs, known before anything runs: operations one after another, arithmetic and memory, stage by stage.

The stages of a backward pass:

    forming      Jacobians, or the matrices of chunks: vectors pushed through steps
    up-sweep     products of maps, each with its offset
    down-sweep   the cotangents themselves: a map or a step applied to a vector

The tree is followed level by level with maps that hold shapes in the place of arrays, so that a kind that fills in is counted as what it has
become. Trees over maps of several widths are run, by the code that runs them, on counters.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import ShapeDtypeStruct

from parscan import order, prefix
from parscan.checks import dtype_of, is_inexact
from parscan.jacobians import BlockDiagonal, DirectSum, Jacobian, product
from parscan.jaxprs import Program, flops, flops_on, obstacle
from parscan.methods import Associative, Chunked, Lax, Method, Sequential, Travelling, Walk
from parscan.proof import derivative
from parscan.several import order_of_products, sides_and_blocks
from parscan.structure import Forms, Structure, kind_name

STAGES = ("forming", "up-sweep", "down-sweep")


@dataclass(frozen=True)
class Step:
    """Equal layers of a chain: a program, how many there are, and whether they are a loop (else a single layer, which may change the state)."""

    program: Program
    count: int
    repeats: bool


@dataclass
class Costs:
    """depth: operations one after another, stacked ones counting as one. flops, bytes: by stage; their total; those of the sequential pass.

    Bytes of forming are those of all Jacobians that are held at once, of the up-sweep those of all products, of the down-sweep those of the cotangents.
    """

    depth: int = 0
    flops: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, stage: str, flops: float, bytes: float) -> None:
        self.flops[stage] += int(flops)
        self.bytes[stage] += int(bytes)

    def follow(self, one: Costs, times: int) -> None:
        """So many times that, each in the memory of what was before; the cotangents stay."""
        for stage in STAGES:
            self.flops[stage] += times * one.flops[stage]
            self.bytes[stage] = self.bytes[stage] + times * one.bytes[stage] if stage == "down-sweep" else max(self.bytes[stage], one.bytes[stage])

    def plain(self) -> tuple[int, dict[str, int], dict[str, int]]:
        """Depth, FLOPs and bytes, with the total, stage after stage."""
        return self.depth, _ordered(self.flops), _ordered(self.bytes)


def human(number: int) -> tuple[str, str]:
    """Three digits, and the unit: k, M, G, …"""
    value, unit, units = float(number), "", iter("kMGTPE")
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.0f}" if value >= 100 or not unit else f"{value:.3g}", unit


def _ordered(found: Counter[str]) -> dict[str, int]:
    return {stage: found[stage] for stage in STAGES} | {"total": sum(found[stage] for stage in STAGES), "sequential": found["sequential"]}


def summed(some: Sequence[tuple[int, dict[str, int], dict[str, int]]]) -> tuple[int, dict[str, int], dict[str, int]]:
    """Of stretches crossed one after another."""
    whole = Costs(sum(depth for depth, _, _ in some))
    for _, flops_, bytes_ in some:
        whole.flops.update(flops_)
        whole.bytes.update(bytes_)
    return whole.plain()


@dataclass(frozen=True)
class _Run:
    """Equal maps: how many, FLOPs of one vector pushed through one of them and of forming one, how they are formed, whether all are one, of what numbers."""

    count: int
    push: int
    form: int
    forms: Forms
    same: bool
    dtype: Any

    @property
    def vector(self) -> int:
        """Bytes of what leaves a map."""
        return self.forms.sizes[1] * self.dtype.itemsize

    @property
    def distinct(self) -> int:
        """How many maps are formed."""
        return 1 if self.same else self.count


@jax.numpy_rank_promotion("allow")  # a setting for the user's step, which has been traced
def costs(steps: Sequence[Step], structures: Sequence[Structure] | None, method: Method) -> Costs:
    """Of the backward pass of a chain.

    Args:
        steps: the chain.
        structures: of their Jacobians; None if they are left to JAX.
        method: sizes chosen.
    """
    found, pushes, count = Costs(), [push_flops(step.program) for step in steps], sum(step.count for step in steps)
    arithmetic = sum(step.count * push for step, push in zip(steps, pushes, strict=True))
    vectors = sum(step.count * state_bytes(step.program) for step in steps)
    found.add("sequential", arithmetic, vectors)
    if structures is None or isinstance(method, (Lax, Sequential)):
        found.depth = count
        found.add("down-sweep", arithmetic, vectors)
        return found
    runs = [
        _Run(step.count, push, _form_flops(step.program, one, push), one.forms(transposed=True), one.same, np.dtype(one.before.dtype))
        for step, push, one in zip(steps, pushes, structures, strict=True)
    ]
    assert isinstance(method, Travelling)
    in_segments = method.cuts(run.count for run in runs)
    for journey in _journeys(runs[::-1]):
        depth = 0
        if in_segments:
            for run in journey:
                depth = _by_segments(found, run, method, depth)
        elif len(journey) > 1 and not isinstance(method, Walk):
            depth = _through_order(found, journey, method)
        else:
            for run in journey:
                depth = _through_one(found, run, method, depth)
        found.depth = max(found.depth, depth)
    return found


def push_flops(program: Program) -> int:
    """FLOPs of one vector pushed through a step that is linearised already; of a step that has no such derivative, those of the step."""
    if obstacle(program) is not None:
        return flops(program.jaxpr)
    return flops_on(derivative(program).closed, derivative(program).tangents)


def _form_flops(program: Program, structure: Structure, push: int) -> int:
    """FLOPs of forming the Jacobian of one step, by pushing seeds or from its factors."""
    if structure.factored is None:
        return structure.against.pushes * push
    consts, states, xs = ([ShapeDtypeStruct(a.shape, a.dtype) for a in avals] for avals in program.avals)
    like = [a for a in states if is_inexact(a)]
    formed = functools.partial(structure.factored.formed, like=like, transposed=True, dtype=structure.before.dtype)
    return flops(jax.make_jaxpr(lambda *inputs: formed(inputs))(*consts, *states, *xs))


def state_bytes(program: Program) -> int:
    """Of a cotangent of the state that enters a step."""
    return sum(math.prod(a.shape) * dtype_of(a).itemsize for a in program.avals[1] if is_inexact(a))


def _journeys(runs: Sequence[_Run]) -> Iterator[list[_Run]]:
    """The pieces of a journey through which something travels."""
    some: list[_Run] = []
    for run in runs:
        if 0 in (run.count, *run.forms.sizes):
            if some:
                yield some
            some = []
        else:
            some.append(run)
    if some:
        yield some


# --- one run ------------------------------------------------------------------------------------------------------------


def _by_segments(found: Costs, run: _Run, method: Travelling, at: int) -> int:
    """When the last vector is known, the one that enters being known at `at`: segment after segment."""
    assert method.segment is not None
    several, rest = divmod(run.count, method.segment)
    for count, times in ((rest, 1), (method.segment, several)):
        if count and times:
            one = Costs()
            at += times * _through_one(one, replace(run, count=count), method, 0)
            found.follow(one, times)
    return at


def _through_one(found: Costs, run: _Run, method: Travelling, at: int) -> int:
    """The same, all steps at once."""
    if run.count == 1:
        found.add("down-sweep", run.push, run.vector)
        return at + 1
    match method:
        case Walk():
            one = abstract(run.forms, run.dtype)
            found.add("forming", run.distinct * run.form, run.distinct * one.nbytes)
            found.add("down-sweep", run.count * one.apply_flops, run.count * run.vector)
            return at + run.count + 1
        case Associative():
            return _associative(found, run, at)
        case Chunked(size=size, levels=levels):
            return _chunked(found, run, size or 1, levels, at)
    one = abstract(run.forms, run.dtype)
    found.add("forming", run.distinct * run.form, run.distinct * one.nbytes)
    found.add("down-sweep", 0, run.count * run.vector)
    return _tree(found, run, run.count, 1, None, at)


def _tree(found: Costs, run: _Run, count: int, formed: int, levels: int | None, at: int) -> int:
    """`prefix.tree` over so many maps, all of them known at `formed`; the vectors' bytes are the caller's affair."""
    if count == 0:
        return at
    rounds, alone = tree_rounds(count, levels)
    maps = level_by_level(abstract(run.forms, run.dtype), len(rounds))
    for below, above, pairs in zip(maps, maps[1:], rounds[1:], strict=False):
        distinct = 1 if run.same else pairs
        found.add("up-sweep", distinct * below.product_flops + pairs * below.apply_flops, distinct * above.nbytes)
    applied = [(count + 1) // 2 for count in rounds[:-1]] + [rounds[-1]]
    found.add("down-sweep", sum(a * one.apply_flops for a, one in zip(applied, maps, strict=True)) + alone * maps[0].apply_flops, 0)
    return int(_depths(np.full(count, formed), at, levels).max())


def tree_rounds(count: int, levels: int | None = None) -> tuple[list[int], int]:
    """How many maps every round of `prefix.tree` has, and how many are left out."""
    alone = int(count > 0 and count % 2 == 0 and levels != 0)
    rounds = [count - alone]
    while rounds[-1] > 1 and (levels is None or len(rounds) <= levels):
        rounds.append(rounds[-1] // 2)
    return rounds, alone


def _depths(maps: np.ndarray, at: int, levels: int | None = None) -> np.ndarray:
    """When each vector of `prefix.tree` is known, from when each map is, and the vector that enters."""

    def later(a, b):
        return np.maximum(a, b) + 1

    def walk(maps, start, apply, *, reverse):
        place = np.arange(len(maps))
        return place + 1 + np.maximum(start, np.maximum.accumulate(maps - place))  # t_i = 1 + max(t_{i-1}, m_i)

    return prefix.tree(maps, np.asarray(at), later, later, levels=levels, walk=walk)


def _associative(found: Costs, run: _Run, at: int) -> int:
    """`lax.associative_scan`: pairs are joined, their prefixes found, and every other one extended by one map."""
    one, products, count = abstract(run.forms.closed(), run.dtype), 0, run.count
    while count > 1:
        products += count // 2 + (count - 1) // 2
        count //= 2
    found.add("forming", run.distinct * run.form, run.distinct * one.nbytes)
    found.add("up-sweep", products * (one.product_flops + one.apply_flops), products * one.nbytes)
    found.add("down-sweep", run.count * one.apply_flops, run.count * run.vector)
    return max(at, int(_prefix_depths(np.ones(run.count, int)).max())) + 1


def _prefix_depths(maps: np.ndarray) -> np.ndarray:
    """When each prefix of `lax.associative_scan` is known, from when each map is."""
    if len(maps) < 2:
        return maps
    found = maps.copy()
    found[1::2] = _prefix_depths(np.maximum(maps[:-1:2], maps[1::2]) + 1)
    found[2::2] = np.maximum(found[1:-1:2], maps[2::2]) + 1
    return found


def _chunked(found: Costs, run: _Run, size: int, levels: int | None, at: int) -> int:
    """fold -> scan -> unfold, against the chain: what is left of the steps is crossed first, and the last chunk needs no map."""
    found.add("down-sweep", run.count * run.push, run.count * run.vector)
    chunks, rest = divmod(run.count, size)
    if chunks == 0:
        return at + run.count
    forms = run.forms.closed()
    found.add("forming", *_folding(run, size, chunks))
    done = _tree(found, replace(run, forms=forms, same=False), chunks - 1, size, levels, at + rest)
    return done + size


def _folding(run: _Run, size: int, chunks: int) -> tuple[int, int]:
    """FLOPs and bytes of pushing the columns of chunks, and their offset, through the steps."""
    pushes = run.forms.closed().pushes
    return chunks * size * (pushes + 1) * run.push, chunks * pushes * run.vector


# --- several runs ---------------------------------------------------------------------------------------------------------


class _Maps(NamedTuple):
    """Maps from the place lo of the journey to the place hi; when they are known."""

    lo: np.ndarray
    hi: np.ndarray
    depth: np.ndarray


class _Counting:
    """Apply and join, counting what they cost between vectors of the widths of `order.Costs`, one a place."""

    def __init__(self, found: Costs, of: order.Costs, itemsize: int):
        self.found, self.of, self.w, self.itemsize = found, of, of.widths, itemsize

    def apply(self, maps: _Maps, value: np.ndarray) -> np.ndarray:
        self.found.add("down-sweep", np.sum(self.of.apply(self.w[maps.lo], self.w[maps.hi])), 0)
        return np.maximum(maps.depth, value) + 1

    def then(self, second: _Maps, first: _Maps) -> _Maps:
        before, middle, after = self.w[first.lo], self.w[first.hi], self.w[second.hi]
        self.found.add("up-sweep", np.sum(self.of.join(before, middle, after)), np.sum(self.of.apply(before, after)) / 2 * self.itemsize)
        return _Maps(first.lo, second.hi, np.maximum(first.depth, second.depth) + 1)


@dataclass(frozen=True)
class _Piece:
    """Of a run, so many maps of `size` steps each."""

    run: _Run
    count: int
    size: int


def _through_order(found: Costs, journey: Sequence[_Run], method: Method) -> int:
    """Dry-runs the tree that `parscan.order` finds, on counters. Sides of blocks stand for their kinds, as they do there."""
    size = method.size or 1 if isinstance(method, Chunked) else 1
    pieces = [piece for run in journey for piece in _pieces(run, size)]
    ends = [piece.run.forms.before for piece in pieces] + [journey[-1].forms.after]
    tree = order_of_products([piece.count for piece in pieces], ends).tree
    assert tree is not None
    widths, blocks = sides_and_blocks(ends)
    places = [i for i, piece in enumerate(pieces) for _ in range(piece.count)] + [len(pieces)]
    counting = _Counting(found, order.Costs(blocks, [widths[i] for i in places]), journey[0].dtype.itemsize)
    stacks, first = [], 0
    for piece in pieces:
        stacks.append(_stack(found, piece, first))
        first += piece.count
    values = prefix.ordered(stacks, tree, np.asarray(0), counting.apply, counting.then)
    entering, depth = 0, 0
    for piece, leaving in zip(pieces, values, strict=True):
        inside = np.append(entering, leaving[:-1]) + piece.size if piece.size > 1 else 0
        depth, entering = max(depth, int(np.max(leaving)), int(np.max(inside))), leaving[-1]
        found.add("down-sweep", piece.count * piece.size * piece.run.push if piece.size > 1 else 0, piece.count * piece.size * piece.run.vector)
    return depth


def _pieces(run: _Run, size: int) -> list[_Piece]:
    """A run's chunks, against the chain: the shorter one, at its end, first."""
    size = min(size, run.count)
    chunks, rest = divmod(run.count, size)
    return [_Piece(run, 1, rest)] * (rest > 0) + [_Piece(run, chunks, size)]


def _stack(found: Costs, piece: _Piece, first: int) -> prefix.Stack:
    run, place = piece.run, np.arange(first, first + piece.count)

    def form():
        if piece.size > 1:
            found.add("forming", *_folding(run, piece.size, piece.count))
        else:
            distinct = 1 if run.same else piece.count
            found.add("forming", distinct * run.form, distinct * abstract(run.forms, run.dtype).nbytes)
        return _Maps(place, place + 1, np.full(piece.count, piece.size))

    def cross(start):
        found.add("down-sweep", run.push, 0)
        return np.asarray(start + 1)[None]

    return prefix.Stack(piece.count, form, cross if piece.count == piece.size == 1 else None)


# --- maps with shapes in the place of arrays ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def abstract(forms: Forms, dtype: Any) -> Jacobian:
    """One map, as it is formed."""
    blocks = []
    for group, form, shared in zip(forms.before, forms.each, forms.shared, strict=True):
        along = tuple(1 if same else count for same, count in zip(shared, group.counts, strict=True))
        blocks.append(jax.tree.map(lambda leaf, along=along: ShapeDtypeStruct((*along, *leaf.shape), leaf.dtype), form.abstract(dtype)))
    return forms.of_blocks(blocks)


def level_by_level(one: Jacobian, levels: int) -> list[Jacobian]:
    """The maps of the first levels of a tree over equal steps: each is the product of two of the level below."""
    found = [one]
    while len(found) < levels:
        following = jax.eval_shape(product, found[-1], found[-1])
        if following == found[-1]:
            return found + [following] * (levels - len(found))
        found.append(following)
    return found


def levels(structure: Structure, method: Method, length: int) -> list[tuple[int, str, int]]:
    """(level, kind, bytes of one map) of the tree over so many equal steps, or over their chunks."""
    forms = structure.forms(transposed=True)
    if isinstance(method, Chunked):
        length = max(length // (method.size or 1) - 1, 1)  # the last one's is not needed
    if isinstance(method, (Associative, Chunked)):
        forms = forms.closed()
    maps = level_by_level(abstract(forms, np.dtype(structure.before.dtype)), len(tree_rounds(length)[0]))
    return [(level, name_of(one), one.nbytes) for level, one in enumerate(maps)]


def name_of(one: Any) -> str:
    """What a map is called: as `Structure.kind` calls the Jacobians that it is one of."""
    found = list(_blocks(one))
    return kind_name({name for name, _ in found}, sum(count for _, count in found))


def _blocks(one: Any) -> Iterator[tuple[str, int]]:
    """The kinds of a map's blocks, and how many there are of each."""
    if isinstance(one, DirectSum):
        for part in one.parts:
            yield from _blocks(part)
    elif isinstance(one, BlockDiagonal):
        yield type(one.inner).__name__, math.prod(one.along)
    else:
        yield type(one).__name__, 1
