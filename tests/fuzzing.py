"""Random programs by the hundred."""

from __future__ import annotations

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from oracle import Tally
from programs import programs


def tally(narrow: bool, count: int, seed: str) -> Tally:
    """What `count` programs show, the same ones for the same seed."""
    found, distinct = Tally(narrow), set()

    @hypothesis.seed(seed)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(programs(narrow))
    def add(program):
        if found.counts["programs"] < count:
            found.add(program)
            distinct.add(repr(program))

    add()
    found.counts["distinct"] = len(distinct)
    return found
