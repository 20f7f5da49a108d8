"""What the notebooks share: the look of their figures, tables, gaps, and how a time is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

import parscan

# Okabe and Ito's colours, told apart by every kind of colour vision; what is compared differs in its marker and its dashes, too.
BLUE, ORANGE, GREEN, YELLOW, PINK, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#666666"
METHODS: dict[str, dict[str, Any]] = {
    "lax": {"color": ORANGE, "marker": "o", "linestyle": "-"},
    "sequential": {"color": BLUE, "marker": "s", "linestyle": "--"},
    "walk": {"color": PINK, "marker": "v", "linestyle": "-."},
    "chunked": {"color": YELLOW, "marker": "D", "linestyle": (0, (5, 1))},
    "tree": {"color": GREEN, "marker": "^", "linestyle": ":"},
    "auto": {"color": GREY, "marker": "x", "linestyle": (0, (1, 1))},
}


def start() -> None:
    """Sets the look of all figures, and says what this is run with."""
    plt.rcParams.update({"font.size": 13, "lines.linewidth": 2, "lines.markersize": 8, "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 110})
    plt.rcParams.update({"axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, YELLOW, PINK, SKY]), "figure.constrained_layout.use": True})
    print("jax", jax.__version__, "on", jax.default_backend(), "· parscan", parscan.__version__)


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Displays rows of strings and numbers."""
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)))


def gap(got: Any, want: Any) -> float:
    """The relative difference in norm, over all leaves of two pytrees."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    difference = sum(float(np.sum((np.asarray(a, float) - np.asarray(b, float)) ** 2)) for a, b in pairs)
    return (difference / sum(float(np.sum(np.asarray(b, float) ** 2)) for _, b in pairs)) ** 0.5


class Time(NamedTuple):
    """Milliseconds of a warm call: the median and the quartiles."""

    median: float
    low: float
    high: float


def times(programs: Mapping[str, Callable[[], Any]], rounds: int = 7, least: float = 0.2) -> dict[str, Time]:
    """How long each program takes, in interleaved rounds, so that all of them see the same moods of the machine.

    Args:
        programs: by name, functions of no arguments; each is called once before anything is measured.
        rounds: how many rounds at least.
        least: seconds to go on for at least.
    """
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for run in programs.values():
        jax.block_until_ready(run())
    order, until = list(programs.items()), time.perf_counter() + least
    while time.perf_counter() < until or min(map(len, taken.values())) < rounds:
        order.reverse()  # back and forth, or the one that follows the largest would always find its caches cold
        for name, run in order:
            begin = time.perf_counter()
            jax.block_until_ready(run())
            taken[name].append(1e3 * (time.perf_counter() - begin))
    return {name: Time(*(float(q) for q in np.quantile(some, [0.5, 0.25, 0.75]))) for name, some in taken.items()}
