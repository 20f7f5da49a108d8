"""The schedules alone, run on spans (lo, hi, depth): order, coverage, depth and work, exactly and without a float."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest

from parscan import prefix

NOT_YET = 0


class Spans(NamedTuple):
    """Maps that cover the steps lo … hi - 1 of the journey; depth counts operations on the longest path that made them."""

    lo: np.ndarray
    hi: np.ndarray
    depth: np.ndarray


class Counter:
    """`apply` and `then` on spans. A value is (position, depth): the journey as far as `position`."""

    def __init__(self):
        self.joins = self.applications = 0

    def then(self, second: Spans, first: Spans) -> Spans:
        assert np.array_equal(first.hi, second.lo), f"joined {second} after {first}"
        self.joins += np.size(first.lo)
        return Spans(first.lo, second.hi, np.maximum(first.depth, second.depth) + 1)

    def apply(self, maps: Spans, value):
        position, depth = value
        assert np.array_equal(position, maps.lo), f"{maps} met a value at {position}"
        self.applications += np.size(maps.lo)
        return maps.hi, np.maximum(depth, maps.depth) + 1


def scan(f, init, xs, *, reverse=False):
    """`lax.scan` of NumPy arrays."""
    count = prefix.length(xs)
    order = range(count)[::-1] if reverse else range(count)
    outs = [None] * count
    for i in order:
        init, outs[i] = f(init, prefix.take(xs, i))
    if count == 0:
        return init, tuple(np.zeros((0, *np.shape(v)), int) for v in init)
    return init, None if outs[0] is None else tuple(np.stack(leaf) for leaf in zip(*outs, strict=True))


def steps(length: int, reverse: bool) -> Spans:
    lo = np.arange(length)[::-1] if reverse else np.arange(length)
    return Spans(lo, lo + 1, np.full(length, NOT_YET))


def start():
    return np.array(0), np.array(0)


def assert_everywhere(values, length, reverse):
    """The value leaving step i of the journey stands at that step's index, having crossed exactly the steps before."""
    expected = np.arange(1, length + 1)
    np.testing.assert_array_equal(values[0], expected[::-1] if reverse else expected)


def walk(maps, value, apply, *, reverse):
    return prefix.walk(maps, value, apply, reverse=reverse, scan=scan)


@pytest.mark.parametrize("reverse", [False, True])
def test_tree(reverse):
    for length in range(301):
        counter = Counter()
        values = prefix.tree(steps(length, reverse), start(), counter.apply, counter.then, reverse=reverse, walk=walk)
        assert_everywhere(values, length, reverse)
        assert counter.joins <= max(length - 1, 0)
        assert counter.applications <= 2 * length
        if length:
            assert values[1].max() <= 2 * math.ceil(math.log2(length)) + 2


@pytest.mark.parametrize("levels", [0, 1, 2, 5])
@pytest.mark.parametrize("reverse", [False, True])
def test_tree_that_stops_early_walks_the_rest(levels, reverse):
    for length in (0, 1, 2, 3, 7, 31, 64, 100):
        counter = Counter()
        values = prefix.tree(steps(length, reverse), start(), counter.apply, counter.then, reverse=reverse, levels=levels, walk=walk)
        assert_everywhere(values, length, reverse)
        assert counter.joins <= length * (1 - 0.5**levels)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("reverse", [False, True])
def test_chunked(size, reverse):
    for length in range(301):
        counter, fold = Counter(), Counter()

        def through(maps, value, counter=counter):
            return prefix.tree(maps, value, counter.apply, counter.then, reverse=reverse, walk=walk)

        def identity(chunks, length=length):
            lo = np.arange(chunks)[::-1] if reverse else np.arange(chunks)
            rest = length - chunks * size if reverse else 0  # in reverse, the rest is crossed before any chunk
            return Spans(lo * size + rest, lo * size + rest, np.full(chunks, 0))

        values = prefix.chunked(
            steps(length, reverse), start(), size=size, identity=identity, extend=fold.then, cross=fold.apply, through=through, reverse=reverse, scan=scan
        )
        assert_everywhere(values, length, reverse)
        formed = length // size  # a chunk's first step is pushed a basis through: that forms its matrix, and multiplies none
        assert fold.joins - formed + counter.joins <= length
        if length:
            assert values[1].max() <= 2 * size + 2 * math.ceil(math.log2(length)) + 2


def test_a_swapped_argument_is_caught():
    counter = Counter()
    with pytest.raises(AssertionError, match="joined"):
        prefix.tree(steps(8, False), start(), counter.apply, lambda second, first: counter.then(first, second), walk=walk)


def test_a_late_value_is_caught():
    counter = Counter()
    with pytest.raises(AssertionError, match="met a value"):
        prefix.walk(steps(8, False), start(), counter.apply, reverse=True, scan=scan)
