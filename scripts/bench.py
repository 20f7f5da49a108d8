#!/usr/bin/env python
"""How long gradients take through parscan, beside the honest sequential baselines.

\b
  bench.py --quick              a few small rows of every suite, in a minute or two
  bench.py --suite bppsa        one suite; may be repeated, `all` is every one
  bench.py --row gru:16:8       single recurrences; without any, a few for this platform

Suites: bppsa, deer, elementwise, deep (times of forward, backward alone, whole gradient and training step), structure (each kind of Jacobian beside
full blocks), auto (recurrences drawn at random), compile (first calls), memory. Their results go to one file a machine, written after every row: the
same command goes on where it was interrupted. `scripts/performance.py` makes docs/performance.md of such files.

A single row is a recurrent cell with B states of width n over T steps, every hidden state carrying a cotangent, the gradient being taken in the weights
and in the initial state. In one run, on the same inputs, results compared first, interleaved:

\b
  lax         jax.value_and_grad through jax.lax.scan
  sequential  a sequential adjoint for the states alone, then one batched pull-back to the weights (method="sequential")
  auto        what parscan.scan chooses by itself

Ratios are medians over interleaved pairs of the time of `lax` to that of the column: above 1 is faster. `backward` columns time
`parscan.parallel_backward` on stored activations, without any forward pass. What takes less than 10 ms is called as often as fills these, and
waited for once: on an accelerator a call from Python alone takes 0.1 ms.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
from problems import Problem, make, parse
from results import keep, machine
from tqdm import tqdm

import parscan

ROWS = ("rnn:1:8", "rnn:4:8", "rnn:16:8", "gru:1:8", "gru:4:8", "gru:16:8", "gru:64:4", "gru:16:20")
GPU_ROWS = (
    *("rnn:16:20:256", "rnn:16:20:10000", "rnn:16:20:30000", "rnn:1:8:100000", "rnn:16:64:10000", "rnn:16:128:1024"),
    *("gru:16:16:10000", "elementwise:1:1024:16384"),
)
SUITE_NAMES = ("bppsa", "deer", "elementwise", "deep", "structure", "auto", "compile", "memory")
SHORT = 1e-2  # seconds that a measurement takes at least
LONG = 1.0  # seconds of a call from which on three measurements do


def loss_through(problem: Problem, scan: Callable[..., Any]) -> Callable[..., jax.Array]:
    """(weights, start, inputs) -> a loss that reads every hidden state."""

    def loss(weights, start, inputs):
        def f(h, x):
            h = problem.cell(weights, h, x)
            return h, h

        final, states = scan(f, start, inputs)
        return jnp.stack([jnp.mean(leaf**2) for leaf in jax.tree.leaves(states)] + [jnp.mean(leaf) for leaf in jax.tree.leaves(final)]).sum()

    return loss


class Run(NamedTuple):
    """A compiled program at its inputs: called, it is not waited for.

    temporary: bytes, as XLA plans them. first: seconds of tracing and compiling. program: what JAX compiled.
    """

    call: Callable[[], Any]
    temporary: int
    first: float
    program: Any = None


def compiled(f: Callable[..., Any], *args: Any) -> Run:
    begun = time.perf_counter()
    program = jax.jit(f).lower(*args).compile()
    analysis = program.memory_analysis()
    return Run(lambda: program(*args), 0 if analysis is None else analysis.temp_size_in_bytes, time.perf_counter() - begun, program)


def gradient(problem: Problem, scan: Callable[..., Any]) -> Run:
    """The loss and its gradient in weights and start; in start and inputs, if there are no weights."""
    return compiled(jax.value_and_grad(loss_through(problem, scan), (0, 1) if problem.weights else (1, 2)), *problem[1:])


@functools.cache
def _stored(cell: Callable[..., Any]) -> Callable[..., Any]:
    def layer(params, h):
        return cell(params[0], h, params[1])

    return jax.jit(lambda params, start: parscan.forward(layer, params, start, params_axes=(None, 0))[1])


def backward(problem: Problem, method: parscan.Method | str) -> Run:
    """`parallel_backward` alone, from stored activations."""
    axes = (None, 0)

    def layer(params, h):
        return problem.cell(params[0], h, params[1])

    params = (problem.weights, problem.inputs)
    activations = _stored(problem.cell)(params, problem.start)

    def run(params, activations):
        grads = parscan.parallel_backward(layer, params, activations, None, layer_cotangents=activations, params_axes=axes, method=method)
        return grads.params[0], grads.activations

    return compiled(run, params, activations)


def seconds(call: Callable[[], Any], times: int = 1) -> float:
    """Of a call, several of which are waited for together."""
    start = time.perf_counter()
    results = [call() for _ in range(times)][-1]
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / times


def gap(got: Any, want: Any) -> float:
    """Largest norm-relative difference of two pytrees' leaves."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(jnp.linalg.norm(jnp.ravel(g - w)) / jnp.maximum(jnp.linalg.norm(jnp.ravel(w)), 1e-30)) for g, w in pairs)


def gaps(row: str, runs: dict[str, Run], baseline: str = "lax") -> dict[str, float]:
    """How far every gradient is from that of the baseline, which must be near."""
    want = runs[baseline].call()
    found = {name: gap(run.call(), want) for name, run in runs.items()}
    if max(found.values()) > (1e-3 if jax.default_backend() == "cpu" else 1e-2):  # accelerators multiply in TF32 or bfloat16, if not told otherwise
        raise click.ClickException(f"{row}: gradients disagree, {found}")
    return found


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each, all of them one after another in every round."""
    once = {name: min(seconds(run.call), seconds(run.call)) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(min(3, rounds) if max(once.values()) > LONG else rounds):
        for name, run in runs.items():
            times[name].append(seconds(run.call, max(1, round(SHORT / once[name]))))
    return times


def chosen(problem: Problem) -> str:
    """What `auto` takes."""
    return str(parscan.plan(lambda h, x: (problem.cell(problem.weights, h, x), None), problem.start, problem.inputs).method)


def measure(row: str, length: int, pairs: int, seed: int, extra: tuple[str, ...], jobs: int) -> dict[str, Any]:
    """All figures of one row, in ms, ratios and bytes."""
    problem = make(row, length, seed)
    scans = {"lax": jax.lax.scan} | {m: lambda f, h, x, m=m: parscan.scan(f, h, x, method=m) for m in ("sequential", "auto", *extra)}
    making = {name: functools.partial(gradient, problem, scan) for name, scan in scans.items()}
    making |= {f"backward {m}": functools.partial(backward, problem, m) for m in ("lax", "sequential", "auto", *extra)}
    with ThreadPoolExecutor(jobs) as pool:
        runs = dict(zip(making, pool.map(lambda make: make(), making.values()), strict=True))
    found = gaps(row, {name: runs[name] for name in scans})
    times = interleaved(runs, pairs)
    return {
        "row": row,
        "length": parse(row, length)[3],
        "auto": chosen(problem),
        "ms": {name: 1e3 * float(np.median(t)) for name, t in times.items()},
        "ratio": {name: float(np.median(np.array(times["lax"]) / np.array(times[name]))) for name in scans},
        "spread": {name: [float(q) for q in np.quantile(np.array(times["lax"]) / np.array(times[name]), (0.25, 0.75))] for name in scans},
        "temporary bytes": {name: run.temporary for name, run in runs.items()},
        "first call s": {name: run.first for name, run in runs.items()},
        "gap": found,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    names = list(results[0]["ratio"])[1:]
    alone = [name for name in results[0]["ms"] if name.startswith("backward")]
    head = ["cell, B × n", "T", "auto chose", "lax ms", *(f"{n} ×" for n in names), "memory ×", "first call ×", *(f"{n} ms" for n in alone)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in results:
        cell, b, n, length = parse(r["row"], r["length"])
        cells = [f"{cell} {b} × {n}", f"{length}", r["auto"], f"{r['ms']['lax']:.1f}", *(f"{r['ratio'][name]:.2f}" for name in names)]
        for key in ("temporary bytes", "first call s"):
            cells.append(f"{r[key]['auto'] / max(r[key]['lax'], 1e-9):.2f}")
        cells += [f"{r['ms'][name]:.2f}" for name in alone]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure_rows(rows: tuple[str, ...], length: int, pairs: int, seed: int, extra: tuple[str, ...], jobs: int, path: Path | None) -> None:
    """Single rows, and their table."""
    for row in rows:
        try:
            parse(row, length)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--row") from None
    chosen = rows or (ROWS if jax.default_backend() == "cpu" else GPU_ROWS)
    where = machine()
    click.echo(f"{where}\n")
    results: list[dict[str, Any]] = []
    try:
        for row in tqdm(chosen, desc="rows", unit="row", leave=False):
            results.append(measure(row, length, pairs, seed, extra, jobs))
            if path is not None:
                keep(path, {"where": where, "results": results})
    except KeyboardInterrupt:
        click.echo(f"interrupted after {len(results)} of {len(chosen)} rows", err=True)
    if results:
        click.echo(table(results))
        if path is not None:
            click.echo(f"\nwrote {path}")


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--suite", "suites", multiple=True, type=click.Choice([*SUITE_NAMES, "all"]), help="A suite; may be repeated.")
@click.option("--quick", is_flag=True, help="A few small rows of each suite; of all, if none is named.")
@click.option("--row", "rows", multiple=True, metavar="CELL:B:N[:T]", help="A problem, e.g. gru:16:8; may be repeated. Default: a set for this platform.")
@click.option("--length", default=4096, show_default=True, type=click.IntRange(2), help="Steps T of rows that do not say.")
@click.option("--pairs", default=7, show_default=True, type=click.IntRange(5), help="Interleaved measurements of every column; 3 for what takes over a second.")
@click.option(
    "--method", "extra", multiple=True, type=click.Choice(["walk", "tree", "associative", "chunked"]), help="Further methods to time; may be repeated."
)
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Programs to compile at once; first calls are told right by 1 alone.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights and inputs.")
@click.option("--bytes", "limit", type=float, help="Of a suite's row: what inputs and states may take. Default: 5e8, on an accelerator 1/8 of its memory.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="File of results. Default for suites: out/bench/, named by the machine.")
def main(suites: tuple[str, ...], quick: bool, rows: tuple[str, ...], limit: float | None, path: Path | None, **asked: Any) -> None:
    if not suites and not quick:
        return measure_rows(rows, **asked, path=path)
    if rows:
        raise click.UsageError("--row is for single rows: without --suite and --quick")
    from running import run_suites  # which needs this module

    run_suites(SUITE_NAMES if "all" in suites or not suites else suites, quick, asked["pairs"], limit, asked["seed"], path)


if __name__ == "__main__":
    main()
