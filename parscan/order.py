"""In what order to multiply a chain of rectangular maps: the matrix-chain problem, for a vector and in logarithmic depth.

The maps of a journey are numbered 0 … N - 1 in the order of travel; map i takes vectors of width w_i to width w_{i+1}. What is wanted is
every vector on the way, given the one that enters map 0. A binary tree over the maps says how:

    Join(first, second)   the vector enters `first`; what leaves it is the product matrix of `first` times the vector, and enters `second`
    Join(…, walked=True)  what leaves `first` is known once every vector inside `first` is; no product is needed

A product is multiplied out only where somebody asks for it: along the tree's last branches a vector is handed on instead, which is why a
wide map that the vector meets first is cheap, and one that it meets last is dear. Among all trees whose depth is at most
2 ceil(log2 L) + 2 the one with the least arithmetic is found by dynamic programming over (interval, time of arrival, height).

*Units* are stacks of equal maps: their own tree is the balanced one, batched, and stays one piece of program. Short ones are taken apart.

Source: S. S. Godbole, On efficient computation of matrix chain products (1973), for the products alone.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

MOST_UNITS = 32  # dynamic programming is cubic in them: half a second here; longer chains of unequal maps keep the balanced tree
SHORT = 8  # stacks of fewer equal maps are taken apart


@dataclass(frozen=True)
class Unit:
    """Maps first … first + count - 1 of stack `stack`, in the order of travel."""

    stack: int
    first: int
    count: int


class Join(NamedTuple):
    """The maps of `first`, then those of `second`; see the module."""

    first: Node
    second: Node
    walked: bool = False


Node = Unit | Join


class Order(NamedTuple):
    """A tree over all units, and its arithmetic in FLOPs beside that of the balanced tree. `tree` is None for a chain of no maps."""

    tree: Node | None
    flops: int
    balanced: int


def units(node: Node) -> Iterator[Unit]:
    """The leaves, in the order of travel."""
    if isinstance(node, Unit):
        yield node
    else:
        yield from units(node.first)
        yield from units(node.second)


def height(count: int) -> int:
    """Rounds of joins that make one map of `count`."""
    return math.ceil(math.log2(count)) if count > 1 else 0


def depth_bound(count: int) -> int:
    """Operations, one after another, that a tree over `count` maps may take."""
    return 2 * height(count) + 2


def pass_depth(count: int, at: int) -> int:
    """When the last vector leaves a balanced tree over `count` maps that a vector enters at time `at`."""
    levels = height(count)
    return at + 1 if count == 1 else max(at, levels - 1) + levels + 1


def joins(count: int, whole: bool) -> int:
    """Products of a balanced tree: for its one product and every vector, or for the vectors alone."""
    if whole:
        return max(count - 1, 0)
    count, total = count - (count % 2 == 0), 0
    while count > 1:
        count //= 2
        total += count
    return total


def applies(count: int, whole: bool) -> int:
    """Vectors of a balanced tree that are computed inside it. With a whole product the last one is known, and a map without a partner takes part twice."""
    if not whole:
        return count
    total = count - 1
    while count > 1:
        total += count % 2
        count = (count + 1) // 2
    return total


@functools.lru_cache(maxsize=256)
def ordered(counts: tuple[int, ...], widths: tuple[Any, ...], blocks: Any = 1) -> Order:
    """The cheapest order for stacks of maps.

    Args:
        counts: maps in each stack, all of them equal; 1 for a stack whose map changes the width.
        widths: of the vectors before, between and after the stacks, in the order of travel; one more than stacks. Integers, or tuples of
            them: the widths of independent blocks side by side.
        blocks: how many blocks there are of that width, or of each.

    Returns:
        `Order`, its `flops` never above `balanced`. Stacks are kept whole where that allows it.
    """
    costs = Costs(blocks, widths)
    balanced = costs.balanced([place for place, count in enumerate(counts) for _ in range(count)] + [len(counts)])
    whole = [Unit(stack, 0, count) for stack, count in enumerate(counts) if count]
    if not whole:
        return Order(None, 0, 0)
    for doublings in range(6):
        parts = [part for unit in whole for part in _parts(unit, doublings)]
        if len(parts) > MOST_UNITS:
            break
        found = Order(*_Search(costs, parts).best(), balanced)
        if found.flops <= balanced:
            return found
    tree = _aligned(counts)
    return Order(tree, int(costs.of(tree)), balanced)


def _parts(unit: Unit, doublings: int) -> list[Unit]:
    """A stack taken apart: a short one altogether; of a longer one the edges, where products may meet a narrower neighbour: 1, 2, 4, …, 4, 2, 1."""
    edge = [2**i for i in range(doublings) if 4 * 2**i <= unit.count]
    sizes = [1] * unit.count if unit.count < SHORT else [*edge, unit.count - 2 * sum(edge), *edge[::-1]]
    firsts = itertools.accumulate(sizes[:-1], initial=unit.first)
    return [Unit(unit.stack, first, size) for first, size in zip(firsts, sizes, strict=True)]


def _aligned(counts: Sequence[int]) -> Node:
    """The balanced tree over all maps: neighbours are joined, round by round, one without a partner waits for the next.

    Its nodes cover the positions i 2^k … (i + 1) 2^k - 1; those that lie inside a stack are units.
    """
    ends = list(itertools.accumulate(counts))

    def node(lo: int, size: int) -> Node:
        hi = min(lo + size, ends[-1])
        stack = bisect.bisect_right(ends, lo)
        if hi <= ends[stack]:
            return Unit(stack, lo - ends[stack] + counts[stack], hi - lo)
        half = size // 2
        return Join(node(lo, half), node(lo + half, half)) if lo + half < ends[-1] else node(lo, half)

    return node(0, 2 ** height(ends[-1]))


class Costs:
    """FLOPs: two for each multiply-add. A product carries its offset along, which is one matrix-vector product more."""

    def __init__(self, blocks: Any, widths: Sequence[Any]):
        self.blocks = np.atleast_1d(np.asarray(blocks, float))
        self.widths = np.asarray(widths, float).reshape(len(widths), len(self.blocks))

    def apply(self, w_in, w_out):
        """A matrix times a vector; widths (..., groups of blocks)."""
        return 2 * (self.blocks * w_in * w_out).sum(-1)

    def join(self, w_in, middle, w_out):
        """The product of two affine maps."""
        return 2 * (self.blocks * w_in * middle * w_out).sum(-1) + self.apply(middle, w_out)

    def ends(self, node: Node) -> tuple[np.ndarray, np.ndarray]:
        """The widths that a node's vector has before and after it."""
        some = list(units(node))
        return self.widths[some[0].stack], self.widths[some[-1].stack + (some[-1].count == 1)]

    def unit(self, unit: Unit, whole: bool) -> int:
        """A balanced tree inside a stack: products and vectors. The last vector is the one that the whole product hands on, if there is one."""
        ends = self.ends(unit)
        return joins(unit.count, whole) * self.join(ends[0], ends[0], ends[0]) + applies(unit.count, whole) * self.apply(*ends)

    def of(self, node: Node, whole: bool = False) -> int:
        """All vectors inside a tree, and with `whole` its product."""
        if isinstance(node, Unit):
            return self.unit(node, whole)
        if node.walked:
            return self.of(node.first) + self.of(node.second)
        (start, middle), end = self.ends(node.first), self.ends(node.second)[1]
        product = self.join(start, middle, end) if whole else 0
        return self.of(node.first, True) + self.apply(start, middle) + self.of(node.second, whole) + product

    def balanced(self, places: Sequence[int]) -> int:
        """The tree of `prefix.tree` over maps, one by one, between the vectors at these places."""
        w = self.widths[list(places)]
        count, total = len(w) - 1, 0.0
        if count > 1 and count % 2 == 0:  # the last map is left out
            total, count = self.apply(w[-2], w[-1]), count - 1
        while count >= 1:
            w, pairs = w[: count + 1], count // 2
            firsts = slice(0, count, 2)
            total += self.apply(w[firsts], w[1:][firsts]).sum()
            total += self.join(w[0 : 2 * pairs : 2], w[1 : 2 * pairs : 2], w[2 : 2 * pairs + 1 : 2]).sum()
            w, count = w[: 2 * pairs + 1 : 2], pairs
        return int(total)


class _Search:
    """Dynamic programming over intervals a … b of units.

    need[a, b][T, h]: least arithmetic of the vectors inside and the product, the vector entering at time T, the product known at time h.
    only[a, b][T, t]: of the vectors alone, entering at T, the last of them known at t.
    Both non-increasing in their second index; infinite where the bound on the depth would be missed.
    """

    def __init__(self, costs: Costs, parts: Sequence[Unit]):
        self.costs, self.parts, n = costs, list(parts), len(parts)
        self.w = [costs.ends(unit)[0] for unit in parts] + [costs.ends(parts[-1])[1]]
        self.bound = depth_bound(sum(unit.count for unit in parts))
        self.need, self.only = {}, {}
        for i in range(n):
            self.need[i, i + 1], self.only[i, i + 1] = self._leaf(i)
        for span in range(2, n + 1):
            for a in range(n - span + 1):
                self._fill(a, a + span)

    def best(self) -> tuple[Node, int]:
        """The tree, retraced from the costs, and its arithmetic."""
        n = len(self.parts)
        return self._retraced("only", 0, n, 0, self.bound), int(self.only[0, n][0, self.bound])

    def _leaf(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        unit, bound = self.parts[i], self.bound
        need, only = np.full((bound + 1, bound + 1), np.inf), np.full((bound + 1, bound + 1), np.inf)
        for at in range(bound + 1):
            leaves = pass_depth(unit.count, at)
            if leaves <= bound or unit.count == 1:  # a single map's vector is the one that its product hands on
                need[at, height(unit.count) :] = self.costs.unit(unit, True)
            if leaves <= bound:
                only[at, leaves:] = self.costs.unit(unit, False)
        return need, only

    def _candidates(self, a: int, b: int) -> Iterator[tuple[str, int, np.ndarray]]:
        """Every split m, as (kind, m, costs): of `need` [T, h1, h], of `only` by a product [T, h1, t], of `only` by walking [T, t1, t]."""
        times = np.arange(self.bound + 1)
        arrival = np.maximum(times[:, None], times[None, :]) + 1  # [T, h1]
        late, arrival = arrival > self.bound, np.minimum(arrival, self.bound)
        height_left = times - 1
        too_high = height_left[None, None, :] < times[None, :, None]
        for m in range(a + 1, b):
            hand_on = self.costs.apply(self.w[a], self.w[m])
            first = np.where(late, np.inf, self.need[a, m] + hand_on)[:, :, None]
            inner = np.where(too_high, np.inf, self.need[m, b][arrival][:, :, height_left])
            yield "need", m, first + inner + self.costs.join(self.w[a], self.w[m], self.w[b])
            yield "only", m, first + self.only[m, b][arrival]
            if self.parts[m - 1].count > 1:  # else a product costs no more
                yield "walked", m, self.only[a, m][:, :, None] + self.only[m, b][None, :, :]

    def _fill(self, a: int, b: int) -> None:
        found = {"need": np.inf, "only": np.inf}
        for kind, _, cost in self._candidates(a, b):
            key = "need" if kind == "need" else "only"
            found[key] = np.minimum(found[key], cost.min(axis=1))
        self.need[a, b] = np.minimum.accumulate(found["need"], axis=1)
        self.only[a, b] = np.minimum.accumulate(found["only"], axis=1)

    def _retraced(self, goal: str, a: int, b: int, at: int, by: int) -> Node:
        if b == a + 1:
            return self.parts[a]
        found = []
        for kind, m, cost in self._candidates(a, b):
            if (kind == "need") == (goal == "need"):
                h1, t = np.unravel_index(cost[at, :, : by + 1].argmin(), cost[at, :, : by + 1].shape)
                found.append((float(cost[at, h1, t]), kind, m, int(h1), int(t)))
        _, kind, m, h1, t = min(found)
        if kind == "walked":
            return Join(self._retraced("only", a, m, at, h1), self._retraced("only", m, b, h1, t), walked=True)
        second = ("need", t - 1) if kind == "need" else ("only", t)
        return Join(self._retraced("need", a, m, at, h1), self._retraced(second[0], m, b, max(at, h1) + 1, second[1]))
