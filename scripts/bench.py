#!/usr/bin/env python
"""How long a whole gradient takes through `parscan.scan`, beside the honest sequential baselines.

Each row is a recurrent cell with B states of width n over T steps, every hidden state carrying a cotangent, the gradient being
taken in the weights and in the initial state. In one run, on the same inputs, results compared first, interleaved:

\b
  lax         jax.value_and_grad through jax.lax.scan
  sequential  a sequential adjoint for the states alone, then one batched pull-back to the weights (method="sequential")
  auto        what parscan.scan chooses by itself

Ratios are medians over interleaved pairs of the time of `lax` to that of the column: above 1 is faster. `backward` columns time
`parscan.parallel_backward` on stored activations, without any forward pass.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import parscan

INPUTS = 4
ROWS = ("rnn:1:8", "rnn:4:8", "rnn:16:8", "gru:1:8", "gru:4:8", "gru:16:8", "gru:64:4", "gru:16:20")
GPU_ROWS = ("rnn:16:20", "rnn:1:8", "rnn:16:64", "rnn:64:32", "rnn:16:128")


class Problem(NamedTuple):
    """A cell, its weights, the initial states (B, n), the inputs (T, B, 4)."""

    cell: Callable[[Any, jax.Array, jax.Array], jax.Array]
    weights: dict[str, jax.Array]
    start: jax.Array
    inputs: jax.Array


def rnn(weights: dict[str, jax.Array], h: jax.Array, x: jax.Array) -> jax.Array:
    """h' = tanh(h W + x U + b)."""
    return jnp.tanh(h @ weights["W"] + x @ weights["U"] + weights["b"])


def gru(weights: dict[str, jax.Array], h: jax.Array, x: jax.Array) -> jax.Array:
    """A gated recurrent unit, its three products with h fused into one."""
    n = h.shape[-1]
    from_x, from_h = x @ weights["U"] + weights["b"], h @ weights["W"]
    z, r = jnp.split(jax.nn.sigmoid(from_x[..., : 2 * n] + from_h[..., : 2 * n]), 2, axis=-1)
    c = jnp.tanh(from_x[..., 2 * n :] + r * from_h[..., 2 * n :])
    return z * h + (1 - z) * c


CELLS: dict[str, tuple[Any, int]] = {"rnn": (rnn, 1), "gru": (gru, 3)}


def make(row: str, length: int, seed: int) -> Problem:
    """The problem of a row such as `gru:16:8`: cell, B, n."""
    name, batch, width = row.split(":")
    cell, gates = CELLS[name]
    b, n = int(batch), int(width)
    keys = jax.random.split(jax.random.key(seed), 4)
    weights = {
        "W": 0.9 * jax.random.normal(keys[0], (n, gates * n)) / n**0.5,
        "U": 0.5 * jax.random.normal(keys[1], (INPUTS, gates * n)),
        "b": jnp.zeros(gates * n),
    }
    return Problem(cell, weights, jax.random.normal(keys[2], (b, n)), jax.random.normal(keys[3], (length, b, INPUTS)))


def loss_through(problem: Problem, scan: Callable[..., Any]) -> Callable[..., jax.Array]:
    """(weights, start, inputs) -> a loss that reads every hidden state."""

    def loss(weights, start, inputs):
        def f(h, x):
            h = problem.cell(weights, h, x)
            return h, h

        final, states = scan(f, start, inputs)
        return jnp.mean(states**2) + jnp.mean(final)

    return loss


def gradient(problem: Problem, scan: Callable[..., Any]) -> tuple[Callable[[], Any], int]:
    """The compiled loss and gradient in weights and start, and its temporary bytes as XLA plans them."""
    compiled = jax.jit(jax.value_and_grad(loss_through(problem, scan), (0, 1))).lower(*problem[1:]).compile()
    analysis = compiled.memory_analysis()
    return lambda: jax.block_until_ready(compiled(*problem[1:])), 0 if analysis is None else analysis.temp_size_in_bytes


def backward(problem: Problem, method: parscan.Method | str) -> Callable[[], Any]:
    """The compiled `parallel_backward` alone, from stored activations."""
    axes = (None, 0)

    def layer(params, h):
        return problem.cell(params[0], h, params[1])

    params = (problem.weights, problem.inputs)
    _, activations = jax.jit(lambda p, x: parscan.forward(layer, p, x, params_axes=axes))(params, problem.start)

    def run(params, activations):
        grads = parscan.parallel_backward(layer, params, activations, None, layer_cotangents=activations, params_axes=axes, method=method)
        return grads.params[0], grads.activations

    compiled = jax.jit(run).lower(params, activations).compile()
    return lambda: jax.block_until_ready(compiled(params, activations))


def seconds(run: Callable[[], Any]) -> float:
    """One warm, blocked call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gap(got: Any, want: Any) -> float:
    """Largest norm-relative difference of two pytrees' leaves."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(jnp.linalg.norm(jnp.ravel(g - w)) / jnp.maximum(jnp.linalg.norm(jnp.ravel(w)), 1e-30)) for g, w in pairs)


def gaps(row: str, runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """How far every gradient is from that of `lax`, which must be near."""
    want = runs["lax"]()
    found = {name: gap(run(), want) for name, run in runs.items()}
    if max(found.values()) > 1e-3:
        raise click.ClickException(f"{row}: gradients disagree, {found}")
    return found


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of so many calls of each, all of them one after another in every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


def chosen(problem: Problem) -> str:
    """What `auto` takes."""
    return str(parscan.plan(lambda h, x: (problem.cell(problem.weights, h, x), None), problem.start, problem.inputs).method)


def measure(row: str, length: int, pairs: int, seed: int, extra: tuple[str, ...]) -> dict[str, Any]:
    """All figures of one row, in ms, ratios and bytes."""
    problem = make(row, length, seed)
    scans = {"lax": jax.lax.scan} | {m: lambda f, h, x, m=m: parscan.scan(f, h, x, method=m) for m in ("sequential", "auto", *extra)}
    runs: dict[str, Callable[[], Any]] = {}
    first: dict[str, float] = {}
    temporary: dict[str, int] = {}
    for name, scan in scans.items():
        begun = time.perf_counter()
        runs[name], temporary[name] = gradient(problem, scan)
        runs[name]()
        first[name] = time.perf_counter() - begun
    found = gaps(row, runs)
    runs |= {f"backward {m}": backward(problem, m) for m in ("lax", "sequential", "auto")}
    for run in runs.values():
        run()
    times = interleaved(runs, pairs)
    return {
        "row": row,
        "length": length,
        "auto": chosen(problem),
        "ms": {name: 1e3 * float(np.median(t)) for name, t in times.items()},
        "ratio": {name: float(np.median(np.array(times["lax"]) / np.array(times[name]))) for name in scans},
        "spread": {name: [float(q) for q in np.quantile(np.array(times["lax"]) / np.array(times[name]), (0.25, 0.75))] for name in scans},
        "temporary bytes": temporary,
        "first call s": first,
        "gap": found,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    names = list(results[0]["ratio"])[1:]
    head = [
        "cell, B × n",
        "auto chose",
        "lax ms",
        *(f"{n} ×" for n in names),
        "memory ×",
        "first call ×",
        *(f"backward {n} ms" for n in ("lax", "sequential", "auto")),
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in results:
        cell, b, n = r["row"].split(":")
        cells = [f"{cell} {b} × {n}", r["auto"], f"{r['ms']['lax']:.1f}", *(f"{r['ratio'][name]:.2f}" for name in names)]
        for key in ("temporary bytes", "first call s"):
            cells.append(f"{r[key]['auto'] / max(r[key]['lax'], 1e-9):.2f}")
        cells += [f"{r['ms'][f'backward {name}']:.1f}" for name in ("lax", "sequential", "auto")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--row", "rows", multiple=True, metavar="CELL:B:N", help="A problem, e.g. gru:16:8; may be repeated. Default: a set for this platform.")
@click.option("--length", default=4096, show_default=True, type=click.IntRange(2), help="Steps T.")
@click.option("--pairs", default=7, show_default=True, type=click.IntRange(5), help="Interleaved measurements of every column.")
@click.option(
    "--method", "extra", multiple=True, type=click.Choice(["walk", "tree", "associative", "chunked"]), help="Further methods to time; may be repeated."
)
@click.option("--seed", default=0, show_default=True, help="Seed of weights and inputs.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Also write every figure to this file.")
def main(rows: tuple[str, ...], length: int, pairs: int, extra: tuple[str, ...], seed: int, path: Path | None) -> None:
    for row in rows:
        parts = row.split(":")
        if len(parts) != 3 or parts[0] not in CELLS or not all(p.isdigit() and int(p) for p in parts[1:]):
            raise click.BadParameter(f"{row!r} is not CELL:B:N with CELL one of {', '.join(CELLS)} and B, N positive integers", param_hint="--row")
    chosen = rows or (ROWS if jax.default_backend() == "cpu" else GPU_ROWS)
    device = jax.devices()[0]
    where = f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}, Python {platform.python_version()}, T = {length}, float32"
    click.echo(f"{where}\n")
    results = [measure(row, length, pairs, seed, extra) for row in tqdm(chosen, desc="rows", unit="row", leave=False)]
    click.echo(table(results))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"where": where, "results": results}, indent=1))
        click.echo(f"\nwrote {path}")


if __name__ == "__main__":
    main()
