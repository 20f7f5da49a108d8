"""The tree drawn beside the chain, from the calls that `parscan.prefix.tree` really makes: README's picture and the notebook's."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from parscan import prefix

# Okabe and Ito's colours, told apart by every kind of colour vision; shapes differ too.
MATRIX, MATRIX_FILL = "#B34700", "#FBE3D0"
VECTOR, VECTOR_FILL = "#0072B2", "#D6EAF6"
INK, FAINT, BAND = "#222222", "#8A8A8A", "#F4F4F4"


@dataclass
class Schedule:
    """The calls of one run, on spans of layers. Layer i takes the gradient g_i to g_{i-1}; a join of layers lo … hi, g_hi to g_{lo-1}.

    Attributes:
        joins: (lo, middle, hi, level): layers lo … middle joined with middle + 1 … hi.
        applies: (lo, hi, level, call): the map of layers lo … hi, applied to g_hi.
    """

    joins: list[tuple[int, int, int, int]] = field(default_factory=list)
    applies: list[tuple[int, int, int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, count: int) -> Schedule:
        """Runs the tree on NumPy spans. A call's level is one more than that of the latest call it waits for, for its maps or its values."""
        self = cls()
        calls = 0

        def then(second, first):
            assert (second["hi"] + 1 == first["lo"]).all(), "the gradient passes the later layers first"
            level = max(second["level"].max(), first["level"].max()) + 1
            self.joins += [(int(lo), int(middle), int(hi), int(level)) for lo, middle, hi in zip(second["lo"], second["hi"], first["hi"], strict=True)]
            return {"lo": second["lo"], "hi": first["hi"], "level": np.full_like(second["lo"], level)}

        def apply(maps, values):
            nonlocal calls
            assert (maps["hi"] == values["at"]).all(), "layers lo … hi act on g_hi"
            level = max(maps["level"].max(), values["level"].max()) + 1
            self.applies += [(int(lo), int(hi), int(level), calls) for lo, hi in zip(maps["lo"], maps["hi"], strict=True)]
            calls += 1
            return {"at": maps["lo"] - 1, "level": np.full_like(maps["lo"], level)}

        layers = np.arange(1, count + 1)
        start = {"at": np.array(count), "level": np.array(0)}
        values = prefix.tree({"lo": layers, "hi": layers, "level": np.zeros_like(layers)}, start, apply, then, reverse=True)
        assert (values["at"] == layers - 1).all(), "every gradient comes out, at its own index"
        return self

    @property
    def depth(self) -> int:
        """The number of levels."""
        return max(level for _, _, level, _ in self.applies)


def product(lo: int, hi: int) -> str:
    """The map of layers lo … hi, in mathtext."""
    first, last = rf"J_{{{lo}}}^{{\mathsf{{T}}}}", rf"J_{{{hi}}}^{{\mathsf{{T}}}}"
    return f"${first}$" if lo == hi else rf"${first}\, {last}$" if hi == lo + 1 else rf"${first} \cdots {last}$"


RADIUS = 0.27
SIZE = 12


def gradient(ax: Axes, i: int, y: float, given: bool = False) -> None:
    """The circle g_i, at the boundary between layers i and i + 1."""
    ax.add_patch(Circle((i + 0.5, y), RADIUS, facecolor="white" if given else VECTOR_FILL, edgecolor=VECTOR, linewidth=1.3, zorder=4))
    ax.text(i + 0.5, y - 0.015, f"$g_{{{i}}}$", ha="center", va="center", fontsize=SIZE, color=INK, zorder=5)


def matrix(ax: Axes, lo: int, hi: int, y: float, given: bool = False) -> None:
    """The bar of layers lo … hi."""
    box = FancyBboxPatch(
        (lo - 0.36, y - 0.2), hi - lo + 0.72, 0.4, boxstyle="round,pad=0,rounding_size=0.07", facecolor="white" if given else MATRIX_FILL, edgecolor=MATRIX
    )
    box.set(linewidth=1.3, zorder=4)
    ax.add_patch(box)
    ax.text((lo + hi) / 2, y - 0.01, product(lo, hi), ha="center", va="center", fontsize=SIZE, color=INK, zorder=5)


def hop(ax: Axes, lo: int, hi: int, y: float) -> None:
    """The arrow g_hi -> g_{lo-1}, with its map written above."""
    ax.annotate(
        "", (lo - 0.5 + RADIUS, y), (hi + 0.5, y), arrowprops={"arrowstyle": "-|>", "color": VECTOR, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}, zorder=3
    )
    tail = hi + 0.5 - (RADIUS if lo == hi else 0)
    ax.text((lo - 0.5 + RADIUS + tail) / 2 + 0.05, y + 0.06, product(lo, hi), ha="center", va="bottom", fontsize=SIZE - 0.5, color=INK, zorder=5)


def picture(count: int = 8) -> Figure:
    """Seven inches wide."""
    schedule, longer = Schedule.of(count), 1024
    up = max(level for *_, level in schedule.joins)
    calls = sorted({(level, call) for _, _, level, call in schedule.applies})

    fig = Figure(facecolor="white", layout="none")  # pyright: ignore[reportArgumentType]  # which matplotlib takes, and its stubs do not
    ax = fig.add_axes((0, 0, 1, 1))
    ax.axis("off")
    left = -0.75

    def title(y: float, text: str, rest: str) -> None:
        ax.text(left, y, text, fontsize=SIZE + 1, fontweight="bold", color=INK, va="center")
        ax.text(count + 0.85, y, rest, fontsize=SIZE, color=INK, va="center", ha="right")

    title(0, "One layer after another", f"{count} steps, each waiting for the one before")
    y = -0.75
    for i in range(count + 1):
        gradient(ax, i, y, given=i == count)
    for i in range(1, count + 1):
        hop(ax, i, i, y)

    title(-1.6, "A tree", f"{schedule.depth} levels; for {longer} layers {Schedule.of(longer).depth} instead of {longer}")
    top = -2.25
    for i in range(1, count + 1):
        matrix(ax, i, i, top, given=True)
    heights = {0: top}
    y = top
    for level in range(1, up + 1):
        y -= 0.72
        heights[level] = y
    for lo, middle, hi, level in schedule.joins:
        matrix(ax, lo, hi, heights[level])
        for a, b in ((lo, middle), (middle + 1, hi)):
            ax.plot([(a + b) / 2] * 2, [heights[level] + 0.2, heights[level - 1] - 0.2], color=MATRIX, linewidth=1.3, zorder=2)
    rows, bands = {}, {}
    y -= 0.1
    for level, call in calls:
        y -= 0.72
        rows[call] = y
        bands.setdefault(level, []).append(y)
    begin = rows[calls[0][1]]
    gradient(ax, count, begin, given=True)
    born = {count: begin} | {lo - 1: rows[call] for lo, _, _, call in schedule.applies}
    last_use: dict[int, float] = {}
    for lo, hi, _, call in schedule.applies:
        gradient(ax, lo - 1, rows[call])
        hop(ax, lo, hi, rows[call])
        last_use[hi] = min(last_use.get(hi, 0.0), rows[call])
        ax.plot(hi + 0.5, rows[call], "o", color=VECTOR, markersize=3.2, zorder=3)
    for i, end in last_use.items():
        ax.plot([i + 0.5] * 2, [born[i], end], color=VECTOR, linewidth=1.3, zorder=2)
    bottom = y - 0.42

    for level, height in heights.items():
        if level:
            bands[level] = [height]
    for level, ys in bands.items():
        high, low = max(ys) + 0.36, min(ys) - 0.36
        if level % 2:
            ax.axhspan(low, high, 0.02, 0.98, color=BAND, zorder=0)
        ax.text(left + 0.22, (high + low) / 2, f"{level}", fontsize=SIZE, color=INK, va="center", ha="center")
    ax.text(left, top, "level", fontsize=SIZE, color=INK, va="center")

    y = bottom - 0.3
    key = {"boxstyle": "round,pad=0,rounding_size=0.07", "facecolor": MATRIX_FILL, "edgecolor": MATRIX, "linewidth": 1.3}
    ax.add_patch(FancyBboxPatch((left, y - 0.13), 0.5, 0.26, **key))
    ax.add_patch(Circle((left + 0.25, y - 0.42), 0.15, facecolor=VECTOR_FILL, edgecolor=VECTOR, linewidth=1.3))
    meanings = ("matrix · matrix: neighbours' Jacobians joined", "matrix · vector: a gradient handed on")
    for line, meaning in enumerate(meanings):
        ax.text(left + 0.65, y - 0.42 * line, f"{meaning} (white: given)", fontsize=SIZE - 0.5, va="center", color=INK)
    ax.set(xlim=(left - 0.25, count + 1.1), ylim=(y - 0.8, 0.4))
    ax.set_aspect("equal")
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    fig.set_size_inches(7, 7 * (y1 - y0) / (x1 - x0))
    return fig
