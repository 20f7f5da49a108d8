#!/usr/bin/env python
"""How each cost grows as the work grows, alone: the steps L, the width n, the batch B, each with the other two fixed.

Of a recurrent cell, on whatever device JAX sees: seconds of the forward pass, of the backward pass alone (`parscan.parallel_backward`
from stored activations) and of the whole gradient; temporary bytes of the whole gradient, as XLA plans them; seconds of its first call, tracing
and compiling, measured once; floating-point operations of the compiled gradient, loops counted as often as they turn; depth, as
`parscan.plan` tells it. Results are compared first; times are medians of interleaved rounds, their quartiles shown beside.

\b
  lax         jax.value_and_grad through jax.lax.scan
  sequential  a sequential adjoint for the states alone, then one batched pull-back to the weights
  auto        what parscan chooses by itself
  walk        Jacobians formed in parallel, walked
  chunked     Jacobians folded in chunks, a tree over these
  tree        a work-efficient prefix tree over the Jacobians

An exponent is the slope of log cost over log size on the upper half of a sweep (four sizes if there are), by least squares, with the 95 % interval of
Student's t. Theory is said for large sizes, where arithmetic is the limit:

\b
  time, FLOPs  L 1; B 1; n 2 for loops over vectors, 3 where Jacobians are multiplied, 2 to 3 where they are formed alone; n 1 if nothing mixes
  memory       L 1; B 1; n 1 for loops, up to 2 where Jacobians are held, fewer of them in chunks; walk's segments keep to a size: from 0 on
  first call   0; in L logarithmic for tree and chunked, whose program has a piece for every level
  depth        L 1 for loops; logarithmic for tree and chunked, 2 more for every doubling of L

An accelerator with room for more runs wider work in the same time: there the exponents of time in n and B, and in L for tree and chunked, lie
anywhere from 0 to these. The roofline sets what the whole gradients achieve beside the peak of a large matrix product and the bandwidths of a streaming
a + s b, from memory and from a cache, all measured here, in JAX's default precision.

Written to a directory: scaling.json (every round), scaling.csv (a line a program), figures as PNG, and scaling.html, which holds them all and opens
without a network. The JSON is written after every problem; started again with the same settings, the run goes on where it was.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
from bench import Run, backward, compiled, gaps, gradient, interleaved, seconds
from hlo_costs import costs
from problems import FEW, Problem, make, parse
from results import keep, kept
from scaling_report import AXES, report, table
from tqdm import tqdm

import parscan

CELLS = ("rnn", "gru", "lstm", "residual", "ode", "elementwise", "gated", "pairs", "decay", "rotation")  # each step's Jacobian its own, no more is claimed
METHODS = ("sequential", "auto", "walk", "chunked", "tree")
PASSES = ("gradient", "backward")
FORMING = ("walk", "chunked", "tree")
FULL = {"L": [2**k for k in range(9, 17)], "n": [2**k for k in range(2, 9)], "B": [2**k for k in range(3, 12)]}
QUICK = {"L": [2**8, 2**10, 2**12, 2**14], "n": [16, 32, 64, 128], "B": [16, 64, 256, 1024]}
QUICK_FORMING = {"L": ("walk", "tree"), "n": ("walk",), "B": ()}  # backward alone: they take long to compile
BASE = {"B": 4, "n": 8, "L": 256}
ENOUGH = 2e-2  # seconds that a measurement of the machine's peak takes at least, if memory allows
SPARE = 9  # seconds of a budget left for the report


def sweeps(cell: str, quick: bool, axes: tuple[str, ...], most: int) -> dict[str, list[str]]:
    """Rows of every sweep, small ones first. `most` caps the steps: those of the sweep are as far apart, but end there."""
    found = {}
    for axis in axes:
        sizes = (QUICK if quick else FULL)[axis]
        if axis == "L":
            sizes = sorted({max(2, size * min(most, sizes[-1]) // sizes[-1]) for size in sizes})
        base = BASE | {"L": min(BASE["L"], most)}
        found[axis] = [f"{cell}:{at['B']}:{at['n']}:{at['L']}" for at in (base | {axis: size} for size in sizes)]
    return found


def forward(problem: Problem) -> Run:
    """The final state, and all states: no gradient."""

    def run(weights, start, inputs):
        return jax.lax.scan(lambda h, x: (problem.cell(weights, h, x),) * 2, start, inputs)

    return compiled(run, *problem[1:])


def too_large(error: BaseException) -> str | None:
    """Why a program does not fit, in a line; None if something else is wrong."""
    words = str(error).strip().splitlines() or ["out of memory"]
    refused = isinstance(error, ValueError) and "memory" in str(error)
    return words[0][:150] if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in words[0] or refused else None


def made(problem: Problem, method: str, passes: tuple[str, ...], most_bytes: float) -> dict[str, Run]:
    """The gradient, the backward pass, or both, by one method, each called once.

    Raises:
        MemoryError: it would form more than `most_bytes`, or JAX has no room for it.
    """
    try:
        formed = 0 if method not in FORMING else planned(problem, method).bytes["total"]
        if formed > most_bytes:
            raise MemoryError(f"forms {formed / 1e9:.2g} GB, more than {most_bytes / 1e9:.2g} GB")
        scan = jax.lax.scan if method == "lax" else lambda f, h, x: parscan.scan(f, h, x, method=method)
        runs = {f"{name} {method}": gradient(problem, scan) if name == "gradient" else backward(problem, method) for name in passes}
        for run in runs.values():
            jax.block_until_ready(run.call())
    except Exception as error:
        if why := too_large(error):
            raise MemoryError(why) from None
        raise
    return runs


def planned(problem: Problem, method: str) -> parscan.Plan:
    return parscan.plan(lambda h, x: (problem.cell(problem.weights, h, x), None), problem.start, problem.inputs, method=method)


def measure(row: str, wanted: Mapping[str, tuple[str, ...]], rounds: int, seed: int, most_bytes: float) -> dict[str, Any]:
    """Every figure of one problem, by method and pass; of what does not fit, why."""
    problem, skipped, plans = make(row, 0, seed), {}, {}
    runs = {"forward lax": forward(problem)} | made(problem, "lax", PASSES, most_bytes)
    for method in METHODS:
        try:
            plans[method] = planned(problem, method)
            runs |= made(problem, method, wanted[method], most_bytes) if method in wanted else {}
        except (MemoryError, ValueError) as error:
            if not (why := too_large(error)):
                raise
            skipped[method] = why
    for name in PASSES:
        gaps(row, {key: run for key, run in runs.items() if key.startswith(name)}, f"{name} lax")
    counted = {name: costs(run.program.as_text()) for name, run in runs.items()}
    return {
        "row": row,
        "seconds": interleaved(runs, rounds),
        "temporary": {name: run.temporary for name, run in runs.items()},
        "first": {name: run.first for name, run in runs.items()},
        "flops": {name: c.flops for name, c in counted.items()},
        "bytes": {name: c.bytes for name, c in counted.items()},
        "depth": {"lax": parse(row, 0)[3]} | {method: plan.depth for method, plan in plans.items()},
        "chosen": {method: repr(plan.method) for method, plan in plans.items()},
        "skipped": skipped,
    }


def _best(run: Callable[[], Any]) -> float:
    return min(seconds(run) for _ in range(10))


def peaks() -> dict[str, float]:
    """FLOP/s of a large matrix product; bytes/s of a + s b from memory, and of one that is turned over in a cache; all in float32."""
    found = {"flops": 0.0, "bandwidth": 0.0, "cache": 0.0}
    for k in range(10, 15):  # as large as it must be to take a while
        a = jnp.ones((2**k, 2**k))
        took = _best(compiled(lambda a: a @ a, a).call)
        found["flops"] = max(found["flops"], 2 * 8.0**k / took)
        if took > ENOUGH:
            break
    for k in range(22, 29):
        a, b = jnp.ones(2**k), jnp.ones(2**k)
        took = _best(compiled(lambda a, b: a + 1.5 * b, a, b).call)
        found["bandwidth"] = 12 * 2**k / took
        if took > ENOUGH / 2:
            break
    for k in (14, 16, 18):
        a, b = jnp.ones(2**k), jnp.ones(2**k)
        took = _best(compiled(lambda a, b: jax.lax.fori_loop(0, 256, lambda _, c: a + 0.5 * c, b), a, b).call)
        found["cache"] = max(found["cache"], 256 * 12 * 2**k / took)
    return found


def _in_turn(found: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Axis and row: the smallest of every sweep, then the next."""
    for i in range(max(map(len, found.values()))):
        yield from ((axis, rows[i]) for axis, rows in found.items() if i < len(rows))


def run_all(found: dict[str, list[str]], results: dict[str, Any], deadline: float, measured: Callable[[str], dict[str, Any]], save: Callable) -> None:
    """Fills `results`, problem by problem, until the deadline comes near."""
    say = functools.partial(tqdm.write, file=sys.stderr)
    last = dict.fromkeys(found, 0.0)
    for axis, row in tqdm([(a, r) for a, r in _in_turn(found)], unit="problem", leave=False):
        if row in results["points"]:
            continue
        if time.perf_counter() + 1.5 * last[axis] > deadline:
            say(f"{row}: left out, the time is used up; start again to go on, or give a larger --budget")
            continue
        begun = time.perf_counter()
        try:
            results["points"][row] = point = measured(row)
        except MemoryError as error:
            results["points"][row] = point = {"row": row, "skipped": {"every method": str(error)}}
        for method, why in point["skipped"].items():
            say(f"{row}, {method}: skipped, {why}")
        last[axis] = time.perf_counter() - begun
        save()


def _where(settings: str) -> str:
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # the latter where a platform is asked for that JAX has no plugin for
        why = next(iter(str(error).splitlines()), f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', 'not set')}")
        raise click.ClickException(f"JAX finds no device: {why}") from None
    return f"{device.device_kind} ({device.platform}), {platform.machine()}, jax {jax.__version__}, Python {platform.python_version()}, float32; {settings}"


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--quick", is_flag=True, help="Four sizes a sweep, 5 rounds; walk in L and n, tree in L, both backward alone, no chunked; at most 90 s.")
@click.option("--cell", default="rnn", show_default=True, type=click.Choice(CELLS), help="The recurrence.")
@click.option("--sweep", "axes", multiple=True, type=click.Choice(list(AXES)), help="What grows; may be repeated. Default: each of them.")
@click.option("--method", "asked", multiple=True, type=click.Choice(METHODS), help="Besides lax; may be repeated. Default: all.")
@click.option("--most-steps", default=2**16, show_default=True, type=click.IntRange(16), help="Steps L of the longest problem.")
@click.option("--most-bytes", default=5e8, show_default=True, help="Of Jacobians and their products, above which a method is skipped.")
@click.option("--rounds", type=click.IntRange(3), help="Interleaved measurements of every program. Default: 7, or 5 with --quick.")
@click.option("--budget", type=click.FloatRange(1), help="Seconds in all, about: larger problems are left out. Default: 575, or 88 with --quick.")
@click.option("--seed", default=0, show_default=True, help="Of weights and inputs.")
@click.option("--out", default="scaling", show_default=True, type=click.Path(file_okay=False, path_type=Path), help="Directory; gone on with.")
def main(
    quick: bool,
    cell: str,
    axes: tuple[str, ...],
    asked: tuple[str, ...],
    most_steps: int,
    most_bytes: float,
    rounds: int | None,
    budget: float | None,
    seed: int,
    out: Path,
) -> None:
    begun, rounds = time.perf_counter(), rounds or (5 if quick else 7)
    deadline = begun + (budget or (88 if quick else 575)) - SPARE
    methods = tuple(m for m in METHODS if m in asked or (not asked and not (quick and m == "chunked")))
    found = sweeps(cell, quick, axes or tuple(AXES), most_steps)
    longest = max(parse(row, 0)[3] for rows in found.values() for row in rows)
    limits = f"L ≤ {longest}, Jacobians ≤ {most_bytes / 1e9:.3g} GB, {rounds} rounds, seed {seed}"
    where, path = _where(f"{'quick, ' if quick else ''}{cell}; {', '.join(found)}; lax, {', '.join(methods)}; {limits}"), out / "scaling.json"
    about = {"cell": cell, "mixes": cell not in FEW, "cpu": jax.default_backend() == "cpu"}
    results = kept(path, where, option="--out") if path.exists() else {**about, "sweeps": found, "points": {}}
    click.echo(f"{where}\n")

    def measured(row: str) -> dict[str, Any]:
        wanted = dict.fromkeys(methods, PASSES)
        if quick and not asked:
            some = {m for axis, rows in found.items() if row in rows for m in QUICK_FORMING[axis]}
            wanted = {"sequential": PASSES, "auto": PASSES, **dict.fromkeys(some, ("backward",))}
        return measure(row, wanted, rounds, seed, most_bytes)

    try:
        results["peaks"] = results.get("peaks") or peaks()
        run_all(found, results, deadline, measured, lambda: keep(path, {"where": where, "results": results}))
    except KeyboardInterrupt:
        click.echo(f"interrupted after {len(results['points'])} problems; started again, it goes on", err=True)
    if any("seconds" in point for point in results["points"].values()):
        click.echo(table(results))
        click.echo(f"\nwrote {report(out, where, results)}")


if __name__ == "__main__":
    main()
