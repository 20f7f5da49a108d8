"""Random examples by the hundred."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from oracle import Tally
from programs import programs
from scans import ScanTally, disagreement, scans

FRESH = 9  # of ten examples: the first is always the smallest, and after the tenth Hypothesis varies those that it has


def each(strategy: SearchStrategy, count: int, seed: str, visit: Callable[[Any], None], shrink: bool = False) -> None:
    """Visits `count` examples, the same ones for the same seed; an error stops it, and is raised with the smallest example if that is asked for."""
    visited = 0

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(example):
        nonlocal visited
        visited += 1
        if shrink or visited <= count:
            visit(example)

    one()


def tally(narrow: bool, count: int, seed: str) -> Tally:
    """What `count` programs show, the same ones for the same seed."""
    found, distinct = Tally(narrow), set()

    def add(program):
        found.add(program)
        distinct.add(repr(program))

    each(programs(narrow), count, seed, add)
    found.counts["distinct"] = len(distinct)
    return found


def batches(count: int, seed: str) -> Iterator[tuple[int, str]]:
    """Of random scans: how many at a time, and the seed."""
    return ((min(FRESH, count - done), f"{seed}:{done}") for done in range(0, count, FRESH))


def tally_of_scans(count: int, seed: str) -> ScanTally:
    """What `count` scans show, the same ones for the same seed."""
    found = ScanTally()
    for some, its_seed in batches(count, seed):
        cases = iter(range(some + 1))
        each(scans(), some + 1, its_seed, lambda case, cases=cases: found.add(case) if next(cases) else None)
    return found


def shrink_scans(count: int, seed: str) -> None:
    """Raises the smallest scan that disagrees, if one of these does."""

    def agrees(case):
        problem, _ = disagreement(case)
        assert problem is None, problem

    for some, its_seed in batches(count, seed):
        each(scans(), some + 1, its_seed, agrees, shrink=True)
