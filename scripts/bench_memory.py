#!/usr/bin/env python
"""What a gradient holds, what that costs in time, and what the guard adds, by method, beside `lax.scan`.

Each row is a recurrent cell with B states of width n over T steps, as in `bench.py`; the gradient is taken in the weights and in the initial state.

\b
  residuals  bytes that the forward pass keeps for the backward pass, jax.vjp's own arrays
  peak       temporary bytes of the whole compiled gradient, as XLA plans them
  time       of the whole gradient, medians over interleaved rounds in one run

All three are ratios to `jax.grad(lax.scan)`; below 1 is less.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from bench import chosen, gaps, gradient, interleaved, loss_through
from problems import Problem, make
from tqdm import tqdm

import parscan

ROWS = ("rnn:4:8", "gru:4:8", "gru:1:8", "rnn:16:32")


def methods(length: int, segments: bool) -> dict[str, Any]:
    """By what the table calls them: each all at once, in segments if these are wanted too, and without the guard."""
    sizes = (length, max(1, length // 16)) if segments else (length,)
    found: dict[str, Any] = {"auto": "auto", "Sequential()": parscan.Sequential()}
    found |= {f"Sequential(segment={size})": parscan.Sequential(segment=size) for size in sizes[1:]}
    for kind, some in ((parscan.Walk, {}), (parscan.Chunked, {"size": 8}), (parscan.Tree, {})):
        for segment, guard in itertools.product(sizes, (True, False)):
            method = kind(**some, segment=segment, guard=guard)
            found[repr(method)] = method
    return found


def residuals(problem: Problem, scan: Callable[..., Any]) -> int:
    """Bytes that are kept for the backward pass in the weights and the initial state."""
    loss = loss_through(problem, scan)
    kept = jax.eval_shape(lambda weights, start, inputs: jax.vjp(lambda w, h: loss(w, h, inputs), weights, start)[1], *problem[1:])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def measure(row: str, length: int, segments: bool, rounds: int, seed: int) -> dict[str, Any]:
    """All figures of one row: bytes, and milliseconds."""
    problem = make(row, length, seed)
    scans = {"lax": jax.lax.scan} | {name: lambda f, h, x, m=m: parscan.scan(f, h, x, method=m) for name, m in methods(length, segments).items()}
    runs = {name: gradient(problem, scan) for name, scan in tqdm(scans.items(), desc=row, leave=False)}
    gaps(row, runs)
    times = interleaved(runs, rounds)
    return {
        "row": row,
        "length": length,
        "auto": chosen(problem),
        "residual bytes": {name: residuals(problem, scan) for name, scan in scans.items()},
        "peak bytes": {name: run.temporary for name, run in runs.items()},
        "ms": {name: 1e3 * float(np.median(t)) for name, t in times.items()},
        "time": {name: float(np.median(np.array(t) / np.array(times["lax"]))) for name, t in times.items()},
        "guard": {name: float(np.median(np.array(times[name]) / np.array(t))) for name, t in _without_guard(times)},
    }


def _without_guard(some: dict[str, Any]) -> list[tuple[str, Any]]:
    """Of every method that was also run without its guard: its name, and the figure of that."""
    bare = ", guard=False"
    return [(name.replace(bare, ""), value) for name, value in some.items() if bare in name]


def table(results: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    lines = ["| cell, B × n, T | method | residuals × | peak × | time × | guard, peak × | guard, time × |", "|" + "---|" * 7]
    for r in results:
        cell, b, n = r["row"].split(":")
        bare = dict(_without_guard(r["peak bytes"]))
        for name in r["ms"]:
            if "guard=False" in name:
                continue
            title = f"auto: {r['auto']}" if name == "auto" else name
            figures = [r["residual bytes"][name] / r["residual bytes"]["lax"], r["peak bytes"][name] / r["peak bytes"]["lax"], r["time"][name]]
            figures += [r["peak bytes"][name] / bare[name], r["guard"][name]] if name in bare else []
            cells = [f"{figure:.2f}" for figure in figures] + [""] * (5 - len(figures))
            if name == "lax":
                cells[:3] = [f"{r['residual bytes'][name] / 1e6:.3g} MB", f"{r['peak bytes'][name] / 1e6:.3g} MB", f"{r['ms'][name]:.1f} ms"]
            lines.append(f"| {cell} {b} × {n}, {r['length']} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--row", "rows", multiple=True, default=ROWS, show_default=True, metavar="CELL:B:N", help="A problem; may be repeated.")
@click.option("--length", "lengths", multiple=True, default=(1024, 4096), show_default=True, type=click.IntRange(2), help="Steps T; may be repeated.")
@click.option("--segments/--whole", default=True, show_default=True, help="In segments of a sixteenth of the steps as well, or only all at once.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(3), help="Interleaved measurements of every method.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights and inputs.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Also write every figure to this file.")
def main(rows: tuple[str, ...], lengths: tuple[int, ...], segments: bool, rounds: int, seed: int, path: Path | None) -> None:
    click.echo(f"jax {jax.__version__} on {jax.default_backend()}, medians of {rounds} rounds\n")
    results = [measure(row, length, segments, rounds, seed) for row in rows for length in lengths]
    click.echo(table(results))
    if path is not None:
        path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
