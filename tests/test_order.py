"""The order of products where widths differ: against brute force, against the balanced tree, and as it is really run."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
from test_prefix import Counter, Spans, start

from parscan import order, prefix
from parscan.order import Join, Unit


def random_widths(count, seed):
    random = np.random.default_rng(seed)
    return tuple(int(w) for w in random.choice([1, 2, 3, 5, 8, 13, 32, 64, 100, 256], count + 1))


# --- brute force -----------------------------------------------------------------------------------------------------------


@functools.cache
def every_tree(lo, hi):
    """All binary trees over the maps lo … hi - 1."""
    if hi - lo == 1:
        return [Unit(lo, 0, 1)]
    return [Join(a, b) for m in range(lo + 1, hi) for a, b in itertools.product(every_tree(lo, m), every_tree(m, hi))]


def measured(tree, widths):
    """(FLOPs, depth) of a tree, counted apart from the code that is tested.

    Products: of every node inside a first branch. Vectors: what each first branch hands on, and what leaves the last map.
    """

    def span(node):
        return (node.stack, node.stack + 1) if isinstance(node, Unit) else (span(node.first)[0], span(node.second)[1])

    def products(node):
        if isinstance(node, Unit):
            return 0
        (a, m), (_, b) = span(node.first), span(node.second)
        own = 2 * widths[a] * widths[m] * widths[b] + 2 * widths[m] * widths[b]
        return own + products(node.first) + products(node.second)

    def height(node):
        return 0 if isinstance(node, Unit) else 1 + max(height(node.first), height(node.second))

    def travel(node, at, end, inside):
        """(FLOPs, last vector known when); `end`: when the vector leaving this node is known, `inside`: its products are counted already."""
        if isinstance(node, Unit):
            a, b = span(node)
            return (2 * widths[a] * widths[b], at + 1) if end is None else (0, end)
        a, m = span(node.first)
        handed = max(at, height(node.first)) + 1
        one, first = travel(node.first, at, handed, True)
        two, second = travel(node.second, handed, end, inside)
        return one + two + 2 * widths[a] * widths[m] + (0 if inside else products(node.first)), max(first, second)

    return travel(tree, 0, None, False)


@pytest.mark.parametrize("count", range(1, 10))
def test_within_the_bound_nothing_is_cheaper(count):
    """200 random sequences over all lengths up to 9."""
    for seed in range(23):
        widths = random_widths(count, 100 * count + seed)
        found = order.ordered((1,) * count, widths)
        costs = order.Costs(1, widths)
        assert found.flops == costs.of(found.tree)
        brute = min(flops for flops, depth in (measured(tree, widths) for tree in every_tree(0, count)) if depth <= order.depth_bound(count))
        assert found.flops <= brute * 1.0001, (widths, found)
        assert measured(found.tree, widths)[1] <= order.depth_bound(count)


@pytest.mark.parametrize("bound", [3, 4, 5, 6, 7])
def test_tighter_bounds_need_products_and_are_met_at_the_least_cost(bound, monkeypatch):
    """At most 9 maps could be walked within the bound; with less time there is something to choose."""
    monkeypatch.setattr(order, "depth_bound", lambda count: bound)
    tried = 0
    for seed in range(20):
        count = 4 + seed % 5
        widths = random_widths(count, seed)
        costs = order.Costs(1, widths)
        every = [measured(tree, widths) for tree in every_tree(0, count)]
        feasible = [flops for flops, depth in every if depth <= bound]
        if not feasible:
            continue
        tried += 1
        tree, flops = order._Search(costs, [Unit(i, 0, 1) for i in range(count)]).best()
        assert flops == min(feasible) == measured(tree, widths)[0]
        assert measured(tree, widths)[1] <= bound
    assert tried >= 3


# --- the balanced tree ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_never_more_arithmetic_than_the_balanced_tree(seed):
    """200 random sequences: in all, and as counted on what really runs."""
    saved = []
    for i in range(20):
        count = int(np.random.default_rng(1000 * seed + i).integers(1, 33))
        widths = random_widths(count, 20 * seed + i)
        found = order.ordered((1,) * count, widths)
        assert found.flops <= found.balanced
        assert counted(found.tree, (1,) * count, widths) == found.flops
        assert found.balanced == counted_balanced(widths)
        saved.append(1 - found.flops / found.balanced)
    assert np.median(saved) > 0.1


def test_repeated_layers_stay_one_piece():
    for ends in ((64, 10), (10, 64), (16, 16), (1, 1)):
        found = order.ordered((1, 498, 1), (ends[0], 16, 16, ends[1]))
        counts = [unit.count for unit in order.units(found.tree)]
        assert found.flops <= found.balanced and sum(counts) == 500
        assert counts in ([1, 498, 1], [1, 1, 496, 1, 1], [1, 1, 2, 4, 8, 468, 8, 4, 2, 1, 1])  # whole, or some of its edges apart
    assert order.ordered((), (5,)) == (None, 0, 0)
    assert list(order.units(order.ordered((3, 1), (4, 4, 2)).tree)) == [Unit(0, 0, 1), Unit(0, 1, 1), Unit(0, 2, 1), Unit(1, 0, 1)]


def test_a_narrow_waist_between_long_runs_is_used():
    found = order.ordered((100, 1, 1, 100), (16, 16, 1, 16, 16))
    assert found.flops <= found.balanced


@pytest.mark.parametrize("seed", range(3))
def test_stacks_and_single_maps_in_any_number(seed):
    """Never more arithmetic than the balanced tree, never deeper than the bound, and counted as it runs, also beyond what is searched."""
    random = np.random.default_rng(seed)
    for _ in range(40):
        counts = tuple(int(c) for c in random.choice([1, 1, 1, 2, 5, 8, 9, 16, 17, 33, 100, 300], int(random.choice([2, 3, 5, 9, 20, 33, 50, 70]))))
        widths = [int(random.choice([1, 2, 4, 8, 16, 64, 512]))]
        for count in counts:
            widths.append(widths[-1] if count > 1 else int(random.choice([1, 2, 4, 8, 16, 64, 512])))
        found = order.ordered(counts, tuple(widths))
        counter, depth = run_on_spans(found.tree, counts, tuple(widths), reverse=bool(seed % 2))
        assert counter.flops == found.flops <= found.balanced, (counts, widths)
        assert depth <= order.depth_bound(sum(counts)), (counts, widths)


def test_more_unequal_layers_than_are_searched_keep_the_balanced_tree():
    widths = random_widths(80, 0)
    found = order.ordered((1,) * 80, widths)
    assert found.flops <= found.balanced and len(list(order.units(found.tree))) == 80


def test_the_vector_comes_first():
    """A wide layer that the vector meets first is cheap, one that it meets last is dear."""
    narrow = (8,) * 30
    first, last = order.ordered((1,) * 30, (256, *narrow)), order.ordered((1,) * 30, (*narrow, 256))
    assert first.flops < 1.01 * last.flops
    assert first.balanced > 4 * first.flops


# --- as it is really run -----------------------------------------------------------------------------------------------------------


class Weighing(Counter):
    """`apply` and `then` on spans, which also add up their arithmetic."""

    def __init__(self, widths):
        super().__init__()
        self.widths, self.flops = np.asarray(widths), 0

    def then(self, second, first):
        a, m, b = self.widths[first.lo], self.widths[first.hi], self.widths[second.hi]
        self.flops += int(np.sum(2 * a * m * b + 2 * m * b))
        return super().then(second, first)

    def apply(self, maps, value):
        self.flops += int(np.sum(2 * self.widths[maps.lo] * self.widths[maps.hi]))
        return super().apply(maps, value)


def stacks_of(counts, reverse, counter, crossed):
    """Spans, stack after stack; a stack of one map may be crossed without being formed."""
    stacks, lo = [], 0
    for count in counts:
        position = np.arange(lo, lo + count)[:: -1 if reverse else 1]
        maps = Spans(position, position + 1, np.zeros(count, int))
        cross = (lambda value, maps=maps: counter.apply(maps, tuple(np.asarray(v)[None] for v in value))) if count == 1 and crossed else None
        stacks.append(prefix.Stack(count, lambda maps=maps: maps, cross))
        lo += count
    return stacks


def run_on_spans(tree, counts, widths, reverse=False, crossed=False):
    per_map = [w for count, w in zip(counts, widths, strict=False) for _ in range(count)] + [widths[-1]]
    counter = Weighing(per_map)
    values = prefix.ordered(stacks_of(counts, reverse, counter, crossed), tree, start(), counter.apply, counter.then, reverse=reverse)
    lo, depth = 0, 0
    for count, value in zip(counts, values, strict=True):
        expected = np.arange(lo + 1, lo + count + 1)
        np.testing.assert_array_equal(value[0], expected[:: -1 if reverse else 1])
        depth, lo = max(depth, value[1].max(initial=0)), lo + count
    return counter, depth


def counted(tree, counts, widths):
    return run_on_spans(tree, counts, widths)[0].flops


def counted_balanced(widths):
    count = len(widths) - 1
    counter = Weighing(widths)
    lo = np.arange(count)
    prefix.tree(Spans(lo, lo + 1, np.zeros(count, int)), start(), counter.apply, counter.then)
    return counter.flops


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("crossed", [False, True])
def test_order_coverage_and_depth_of_stacks(reverse, crossed):
    random = np.random.default_rng(0)
    for _ in range(60):
        stacks = int(random.integers(1, 7))
        counts = tuple(int(c) for c in random.choice([1, 1, 2, 5, 9, 16, 31, 60], stacks))
        widths = [int(random.choice([1, 4, 16]))]
        for count in counts:
            widths.append(widths[-1] if count > 1 else int(random.choice([1, 4, 16])))
        found = order.ordered(counts, tuple(widths))
        counter, depth = run_on_spans(found.tree, counts, tuple(widths), reverse, crossed)
        total = sum(counts)
        assert depth <= order.depth_bound(total), (counts, widths, depth)
        assert counter.joins <= total
        assert depth <= 2 * math.ceil(math.log2(total)) + 2 if total > 1 else depth == 1


@pytest.mark.parametrize("reverse", [False, True])
def test_every_shape_of_tree_gives_the_same_values(reverse):
    counts, widths = (1, 4, 1, 1, 3), (2, 3, 3, 1, 5, 5)
    for tree in every_tree(0, 5):
        whole = replaced(tree, counts)
        run_on_spans(whole, counts, widths, reverse)
        run_on_spans(walked(whole), counts, widths, reverse)


def replaced(node, counts):
    return Unit(node.stack, 0, counts[node.stack]) if isinstance(node, Unit) else Join(replaced(node.first, counts), replaced(node.second, counts))


def walked(node):
    return node if isinstance(node, Unit) else Join(walked(node.first), walked(node.second), walked=True)
