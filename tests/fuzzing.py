"""Random examples by the hundred."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from oracle import Tally
from programs import programs


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
