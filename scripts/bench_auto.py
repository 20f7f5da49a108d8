#!/usr/bin/env python
"""Whether `method="auto"` chooses well: recurrences drawn at random, each by every choice it has, and by the loop that it is to beat.

\b
  lax         jax.value_and_grad through jax.lax.scan, by the best unroll of those asked for
  sequential  a sequential adjoint for the states alone, then one batched pull-back to the weights
  walk        Jacobians formed in parallel, walked; where a step's have at most 16384 entries
  auto        what parscan.scan chooses by itself

Whole gradients, results compared first, medians of interleaved rounds, in one run. A problem counts as lost where auto takes more than
1.10 times the best of lax and sequential, by the median of the rounds' ratios and by their lower quartile, too. The file of results is
written after every problem; started again with the same file and seed, the run goes on where it was.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from bench import Run, gaps, gradient, interleaved
from problems import draw, make
from results import keep, kept
from tqdm import tqdm

import parscan

WALKED = 2**14  # entries of a step's Jacobian up to which it is walked


def measure(row: str, unrolls: tuple[int, ...], rounds: int, seed: int) -> dict[str, Any]:
    """Seconds of every round, by method, what auto chose and the times it was told."""
    name, b, n, length = row.split(":")
    problem = make(row, int(length), seed)
    scans: dict[str, Any] = {f"lax {u}": lambda f, h, x, u=u: jax.lax.scan(f, h, x, unroll=u) for u in unrolls}
    methods = ("sequential", "walk", "auto") if int(b) * int(n) * int(n) * (4 if name == "lstm" else 1) <= WALKED else ("sequential", "auto")
    scans |= {m: lambda f, h, x, m=m: parscan.scan(f, h, x, method=m) for m in methods}
    runs: dict[str, Run] = {m: gradient(problem, scan) for m, scan in scans.items()}
    gaps(row, runs, "lax 1")
    plan = parscan.plan(lambda h, x: (problem.cell(problem.weights, h, x),) * 2, problem.start, problem.inputs)
    told = {("lax 1" if method == "Lax" else method.lower()): time for method, time in plan.seconds.items()}
    return {"row": row, "auto": repr(plan.method), "reason": plan.reason, "told": told, "seconds": interleaved(runs, rounds)}


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """Medians of the rounds' ratios: auto's gain over the plain loop; its time over the best baseline's and over the best of parscan's."""
    times = {m: np.array(t) for m, t in result["seconds"].items()}
    medians = {m: float(np.median(t)) for m, t in times.items()}
    baselines = [m for m in times if m.startswith("lax") or m == "sequential"]
    base = min(baselines, key=medians.__getitem__)
    own = min((m for m in times if m in ("lax 1", "sequential", "walk", "auto")), key=medians.__getitem__)
    behind = times["auto"] / times[base]
    _, b, n, _ = result["row"].split(":")
    return {
        "gain": float(np.median(times["lax 1"] / times["auto"])),
        "behind": float(np.median(behind)),
        "lost": bool(np.median(behind) > 1.1 and np.quantile(behind, 0.25) > 1.1),
        "base": base,
        "own": float(np.median(times["auto"] / times[own])),
        "coordinates": int(b) * int(n),
    }


def predictions(results: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """The seconds that were told and those that were measured, by method; of results that hold what was told."""
    found: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        for method, time in result.get("told", {}).items():
            if method in result["seconds"]:
                found.setdefault(method, []).append((time, float(np.median(result["seconds"][method]))))
    return found


def near(pairs: list[tuple[float, float]]) -> float:
    """The share of predictions within a factor of 2."""
    return float(np.mean([0.5 <= told / measured <= 2 for told, measured in pairs]))


def geometric(values: list[float]) -> str:
    return f"{float(np.exp(np.mean(np.log(values)))):.2f}" if values else "–"


def summary(results: list[dict[str, Any]]) -> str:
    """What the whole list says."""
    found = [(result, judged(result)) for result in results]
    middle = [one["gain"] for _, one in found if 8 < one["coordinates"] <= 256]
    chosen = [one["gain"] for result, one in found if not result["auto"].startswith("Lax")]
    lost = [f"{result['row']} {result['auto']} {one['behind']:.2f} behind {one['base']}" for result, one in found if one["lost"]]
    lines = [
        f"{len(found)} problems; auto chose Lax {len(found) - len(chosen)}, Sequential {sum('Seq' in r['auto'] for r, _ in found)}, "
        f"Walk {sum('Walk' in r['auto'] for r, _ in found)} times",
        f"gain over grad(lax.scan), geometric mean: {geometric([one['gain'] for _, one in found])}; "
        f"8 < B·n ≤ 256: {geometric(middle)} ({len(middle)}); where auto did not choose Lax: {geometric(chosen)}",
        f"more than 1.10 × the best baseline: {len(lost)}",
        *(f"  {one}" for one in lost),
        f"within 1.25 × of parscan's best: {np.mean([one['own'] <= 1.25 for _, one in found]):.0%}",
    ]
    told = predictions(results)
    if told:
        each = ", ".join(f"{method} {near(pairs):.0%}" for method, pairs in told.items())
        lines.append(f"told within a factor of 2: {near([pair for pairs in told.values() for pair in pairs]):.0%} ({each})")
    return "\n".join(lines)


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--seed", default=0, show_default=True, help="Of the list of problems.")
@click.option("--count", default=120, show_default=True, type=click.IntRange(1), help="Problems.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(3), help="Interleaved measurements.")
@click.option(
    "--unroll", "unrolls", default=(1,), multiple=True, show_default=True, type=click.IntRange(1), help="Of the plain loop; may be repeated, 1 first."
)
@click.option("--most", default=1e8, show_default=True, help="Multiply-adds of a forward pass above which a problem is drawn again.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="File of results, which is gone on with.")
def main(seed: int, count: int, rounds: int, unrolls: tuple[int, ...], most: float, path: Path | None) -> None:
    where = f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}, seed {seed}, at most {most:.3g}"
    results: list[dict[str, Any]] = []
    if path is not None and path.exists():
        results = kept(path, where)
    try:
        done = {result["row"] for result in results}
        for row in tqdm([row for row in draw(seed, count, most=most) if row not in done], unit="problem", leave=False):
            results.append(measure(row, (1, *(u for u in unrolls if u > 1)), rounds, seed))
            if path is not None:
                keep(path, {"where": where, "results": results})
    except KeyboardInterrupt:
        click.echo(f"interrupted after {len(results)} of {count} problems", err=True)
    click.echo(where)
    if results:
        click.echo(summary(results))


if __name__ == "__main__":
    main()
