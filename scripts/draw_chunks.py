"""Draws the pictures of docs/explanation/mathematics.md: fold, scan and unfold, from the calls that `parscan.prefix.chunked` really makes, as SVG, and
what depth costs in arithmetic, from the counts of `parscan.plan`, as PNG.

Rows are levels: calls in one row wait for nothing in it. A bar is the map of a stretch of layers, a dot a gradient that is known from that level on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from tree_picture import BAND, FAINT, INK, MATRIX, MATRIX_FILL, VECTOR, VECTOR_FILL

from parscan import prefix

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "explanation"
LAYERS, SIZE = 16, 4
STEP, ROW, LEFT, TOP, RIGHT = 36, 34, 64, 58, 330

STAGES = {
    "fold": ("a basis pushed through the layers of a chunk,", "all chunks at once: one matrix a chunk"),
    "scan": ("a tree over the chunks' matrices:", "the gradient that enters every chunk"),
    "unfold": ("that gradient pulled through the chunk's layers,", "all chunks at once"),
}


@dataclass
class Schedule:
    """The calls of one run against the chain.

    Attributes:
        bars: (stage, lo, hi, level): the map of layers lo … hi, which is there at that level.
        hops: (stage, lo, hi, level): that map, or those layers, applied to g_hi, which gives g_{lo-1} at that level.
    """

    bars: list[tuple[str, int, int, int]] = field(default_factory=list)
    hops: list[tuple[str, int, int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, count: int, size: int) -> Schedule:
        """Runs `prefix.chunked` on NumPy spans; layers lo … hi take g_hi to g_{lo-1}. Chunks have no rest."""
        self = cls()

        def joined(stage: str) -> Callable:
            def then(second: dict, first: dict) -> dict:
                empty = first["hi"] < first["lo"]  # of the identities that a fold begins with
                assert (second["hi"] + 1 == first["lo"]).all(), "the gradient passes the later layers first"
                found = {"lo": second["lo"], "hi": np.where(empty, second["hi"], first["hi"]), "level": _next(second, first)}
                self.bars += [(stage, int(lo), int(hi), int(level)) for lo, hi, level in zip(*found.values(), strict=True)]
                return found

            return then

        def applied(stage: str) -> Callable:
            def apply(maps: dict, values: dict) -> dict:
                assert (maps["hi"] == values["at"]).all(), "layers lo … hi act on g_hi"
                levels = _next(maps, values)
                self.hops += [(stage, int(lo), int(hi), int(level)) for lo, hi, level in zip(maps["lo"], maps["hi"], levels, strict=True)]
                return {"at": maps["lo"] - 1, "level": levels}

            return apply

        def identity(chunks: int) -> dict:
            lo = np.arange(1, chunks + 1) * size + 1
            return {"lo": lo, "hi": lo - 1, "level": np.zeros_like(lo)}

        def through(maps: dict, start: dict) -> dict:
            return prefix.tree(maps, start, applied("scan"), joined("scan"), reverse=True)

        layers = np.arange(1, count + 1)
        steps, start = {"lo": layers, "hi": layers, "level": np.zeros_like(layers)}, {"at": np.array(count), "level": np.array(0)}
        options: dict[str, Any] = {"extend": joined("fold"), "cross": applied("unfold"), "through": through, "reverse": True, "scan": _loop}
        values = prefix.chunked(steps, start, size=size, identity=identity, **options)
        assert (values["at"] == layers - 1).all(), "every gradient comes out, at its own index"
        return self

    @property
    def depth(self) -> int:
        return max(level for _, _, _, level in self.hops)


def _next(*given: dict) -> np.ndarray:
    """The level of a call on stacked maps, which waits for all of them."""
    shape = np.broadcast_shapes(*(one["level"].shape for one in given))
    return np.full(shape, max(one["level"].max() for one in given) + 1)


def _loop(f: Callable, init: Any, xs: Any, *, reverse: bool = False) -> tuple[Any, Any]:
    """`lax.scan` of dicts of NumPy arrays."""
    count = prefix.length(xs)
    outs: list[Any] = [None] * count
    for i in range(count)[:: -1 if reverse else 1]:
        init, outs[i] = f(init, prefix.take(xs, i))
    return init, None if outs[0] is None else {name: np.stack([out[name] for out in outs]) for name in outs[0]}


def x(i: int) -> int:
    """Of g_i; layer i is between g_{i-1} and g_i."""
    return LEFT + STEP * i


def y(level: int) -> int:
    return TOP + ROW * level


def text(at: float, height: float, said: Any, more: str = "") -> str:
    return f'<text x="{at:g}" y="{height:g}" fill="{INK}"{more}>{said}</text>'


def drawing(count: int = LAYERS, size: int = SIZE) -> str:
    """SVG; the same for the same schedule."""
    schedule = Schedule.of(count, size)
    width, height = x(count) + 24 + RIGHT, y(schedule.depth) + 64
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif" font-size="13">',
        f"<title>Chunks of {size}: {count} layers in {schedule.depth} levels</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *_stages(schedule, x(count) + 32, width),
        text(18, y(0) + 4, "level"),
        *(text(30, y(level) + 4, level) for level in range(1, schedule.depth + 1)),
        *(f'<path d="M{x(i)} {y(0) - 20}V{y(schedule.depth) + 16}" stroke="{FAINT}" stroke-dasharray="2 4"/>' for i in range(0, count + 1, size)),
        *(text(x(i) - STEP / 2, y(0) - 26, i, ' text-anchor="middle" font-size="11"') for i in range(1, count + 1)),
        *(_bar(i, i, 0, "#ffffff") for i in range(1, count + 1)),
        *(_bar(lo, hi, level, MATRIX_FILL) for _, lo, hi, level in schedule.bars),
        *_hops(schedule, count),
    ]
    foot = y(schedule.depth) + 42
    lines += [
        f'<rect x="18" y="{foot - 9}" width="28" height="18" rx="5" fill="{MATRIX_FILL}" stroke="{MATRIX}" stroke-width="1.3"/>',
        text(54, foot + 4, "the map of these layers (white: given)"),
        f'<circle cx="330" cy="{foot}" r="7" fill="{VECTOR_FILL}" stroke="{VECTOR}" stroke-width="1.3"/>',
        text(344, foot + 4, "the gradient here is known (white: given)"),
        text(x(count) + 32, foot + 4, f"{count} layers, chunks of {size}: {schedule.depth} levels"),
    ]
    return "\n".join([*lines, "</svg>", ""])


def _stages(schedule: Schedule, at: int, width: int) -> list[str]:
    """A band for each stage, and what it does."""
    calls, lines = schedule.bars + schedule.hops, []
    for stage, meaning in STAGES.items():
        rows = [level for name, _, _, level in calls if name == stage]
        low, high = y(min(rows)) - ROW // 2, y(max(rows)) + ROW // 2
        if stage != "scan":
            lines.append(f'<rect x="8" y="{low}" width="{width - 16}" height="{high - low}" fill="{BAND}"/>')
        lines.append(text(at, (low + high) / 2 - 14, stage, ' font-weight="bold" font-size="15"'))
        lines += [text(at, (low + high) / 2 + 5 + 17 * n, said) for n, said in enumerate(meaning)]
    return lines


def _bar(lo: int, hi: int, level: int, fill: str) -> str:
    box = f'x="{x(lo - 1) + 4}" y="{y(level) - 9}" width="{STEP * (hi - lo + 1) - 8}" height="18" rx="5"'
    return f'<rect {box} fill="{fill}" stroke="{MATRIX}" stroke-width="1.3"/>'


def _hops(schedule: Schedule, count: int) -> list[str]:
    """Every gradient as a dot where it is first known, a line down to its last use, an arrow for each use."""
    first = min(level for stage, _, _, level in schedule.hops if stage == "scan")
    born, last = {count: first}, {count: first}
    for _, lo, hi, level in sorted(schedule.hops, key=lambda hop: hop[3]):
        if born.setdefault(lo - 1, level) == level:  # what enters a chunk is found again at the end of the one before it
            last[hi] = max(last.get(hi, level), level)
    lines = [f'<path d="M{x(i)} {y(born[i])}V{y(end)}" stroke="{VECTOR}" stroke-width="1.3"/>' for i, end in last.items()]
    for _, lo, hi, level in schedule.hops:
        if born[lo - 1] == level:
            tip = x(lo - 1) + 8
            lines.append(f'<path d="M{x(hi)} {y(level)}H{tip + 5}" stroke="{VECTOR}" stroke-width="1.3"/>')
            lines.append(f'<path d="M{tip} {y(level)}l7 -4v8z" fill="{VECTOR}"/>')
    for i, level in born.items():
        fill = "#ffffff" if i == count else VECTOR_FILL
        lines.append(f'<circle cx="{x(i)}" cy="{y(level)}" r="7" fill="{fill}" stroke="{VECTOR}" stroke-width="1.3"/>')
    return lines


def costs(path: Path, length: int = 4096, width: int = 8) -> None:
    """Depth and arithmetic of every method, for a tanh recurrence of one dense block, as counted by `parscan.plan`."""
    import jax
    import jax.numpy as jnp
    from matplotlib.figure import Figure

    import parscan

    def counted(method: parscan.Method) -> tuple[int, float]:
        given = jax.ShapeDtypeStruct((width,), jnp.float32), jax.ShapeDtypeStruct((length, width), jnp.float32)
        plan = parscan.plan(lambda h, x: (jnp.tanh(h @ jnp.ones((width, width)) + x), None), *given, method=method)
        return plan.depth, plan.flops["total"] / plan.flops["sequential"]

    fig = Figure(figsize=(7, 4), layout="constrained")
    ax = fig.subplots()
    sizes = [2**k for k in range(length.bit_length() - 1)]
    depth, work = zip(*(counted(parscan.Chunked(size)) for size in sizes), strict=True)
    ax.plot(depth, work, "o-", color=VECTOR, label="Chunked(K)")
    for size, at, high in zip(sizes, depth, work, strict=True):
        place: dict[str, Any] = {"xytext": (7, -3)} if size < 4 else {"xytext": (0, 7), "ha": "center" if size > 4 else "left"}
        ax.annotate(f"K = {size}" if size == 1 else f"{size}", (at, high), textcoords="offset points", fontsize=8, color=VECTOR, **place)
    marks = {parscan.Tree(): "s", parscan.Associative(): "D", parscan.Walk(segment=length): "^", parscan.Sequential(): "v"}
    for method, mark in marks.items():
        ax.plot(*counted(method), mark, color=MATRIX, markersize=8, linestyle="none", label=type(method).__name__)
    ax.set(xscale="log", xlabel="depth: operations one after another", ylabel="arithmetic, × that of the sequential pass", ylim=(0, None))
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set_title(f"{length} steps of one block of {width} coordinates", fontsize=11)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=160)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=DOCS, help="where to write; docs/explanation if not given")
@click.option("--check", is_flag=True, help="write nothing, but fail if chunks.svg is not what would be written")
def main(out: Path, check: bool) -> None:
    found, target = drawing(), out / "chunks.svg"
    if check:
        if not target.exists() or target.read_text() != found:
            sys.exit(f"{target} is not the schedule of today: python scripts/draw_chunks.py")
        return
    out.mkdir(parents=True, exist_ok=True)
    target.write_text(found)
    costs(out / "costs.png")


if __name__ == "__main__":
    main()
