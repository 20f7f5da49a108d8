#!/usr/bin/env python
"""What structure costs to find, and what it is worth.

\b
  finding  how long `parscan.plan` takes for recurrent cells of all widths, the first and the second time
  blocks   whole gradients of elementwise recurrences and of recurrences of 2 x 2 blocks, beside jax.lax.scan
  kinds    backward passes with the kind of Jacobian that is found, beside full blocks, size by size: where it begins to pay
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from bench import gap, seconds
from problems import gru
from results import markdown
from tqdm import tqdm

import parscan


def where() -> str:
    """The machine, in words."""
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


# --- finding --------------------------------------------------------------------------------------------------------------


def finding_problems() -> dict[str, tuple[Callable[..., Any], Any, Any]]:
    """From a name: f, the initial state, the inputs."""
    weights = {"W": jnp.ones((128, 384)), "U": jnp.ones((4, 384)), "b": jnp.zeros(384)}
    million, kernel = jnp.ones(10**6), jnp.ones((3, 3, 1, 1))
    convolved = lambda h: jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    return {
        "GRU, 32 × 128": (lambda h, x: (gru(weights, h, x), None), jnp.zeros((32, 128)), jnp.ones((8, 32, 4))),
        "tanh(a h + x), 10⁶ coordinates": (lambda h, x: (jnp.tanh(million * h + x), None), million, jnp.ones((8, 1))),
        "elementwise LSTM, 2 × 10⁶ coordinates": (
            lambda s, x: ((jax.nn.sigmoid(s[1] + x) * s[0] + jnp.tanh(s[1]), jnp.tanh(s[0])), None),
            (million, million),
            jnp.ones((8, 1)),
        ),
        "RNN, batch of 10⁵ × 10": (lambda h, x: (jnp.tanh(h @ jnp.ones((10, 10)) + x), None), jnp.ones((10**5, 10)), jnp.ones((8, 1))),
        "2-D convolution, 32 × 32": (lambda h, x: (jnp.tanh(convolved(h) + x), None), jnp.ones((4, 32, 32, 1)), jnp.ones((8, 1))),
        "heat equation, 4096 points": (lambda h, x: (h.at[1:-1].add(0.1 * (h[2:] - 2 * h[1:-1] + h[:-2])) + x, None), jnp.ones(4096), jnp.ones((8, 1))),
    }


def finding() -> tuple[list[str], list[list[Any]]]:
    """Seconds of `plan`, the first time and the second."""
    rows = []
    for name, (f, init, xs) in finding_problems().items():
        jax.eval_shape(f, init, jax.tree.map(lambda x: x[0], xs))  # JAX's own first trace is not ours
        times = []
        for _ in range(4):
            fresh = lambda h, x, f=f: f(h, x)  # noqa: E731  # another function object each time
            begun = time.perf_counter()
            plan = parscan.plan(fresh, init, xs, method="tree")
            times.append(time.perf_counter() - begun)
        rows.append([name, plan.kind, str(plan.blocks), f"{times[0]:.2f}", f"{1e3 * float(np.median(times[1:])):.1f}"])
    return ["step", "kind", "blocks", "first time, s", "again, ms"], rows


# --- blocks ---------------------------------------------------------------------------------------------------------------


def elementwise(a: jax.Array, h: jax.Array, x: jax.Array) -> jax.Array:
    """h' = tanh(a h + x); a, h, x (..., D)."""
    return jnp.tanh(a * h + x)


def pairs(a: jax.Array, h: jax.Array, x: jax.Array) -> jax.Array:
    """D / 2 pairs that turn and are squashed; h (D / 2, 2)."""
    p, q = h[..., 0], h[..., 1]
    return jnp.stack([jnp.tanh(a * p - 0.4 * q + x), jnp.tanh(0.4 * p + a * q * p)], axis=-1)


def block_problem(name: str, width: int, length: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The cell, and its parameters, initial state and inputs."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape, cell = {"elementwise": ((width,), elementwise), "pairs": ((width // 2, 2), pairs), "batch": ((256, width), elementwise)}[name]
    inner = shape[:-1] if name == "pairs" else shape
    a = jnp.cos(jax.random.normal(keys[0], inner[-1:]))
    return cell, (a, jax.random.normal(keys[1], shape), jax.random.normal(keys[2], (length, *inner)))


def whole_gradient(cell: Callable[..., Any], scan: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Callable[[], Any], int]:
    """The compiled loss and gradient in parameters, state and inputs, and its temporary bytes."""

    def loss(a, h, xs):
        def f(h, x):
            h = cell(a, h, x)
            return h, h

        final, states = scan(f, h, xs)
        return jnp.mean(states**2) + jnp.mean(final)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arguments).compile()
    analysis = compiled.memory_analysis()
    return lambda: jax.block_until_ready(compiled(*arguments)), 0 if analysis is None else analysis.temp_size_in_bytes


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every run, warm and blocked."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: np.array(some) for name, some in times.items()}


def blocks(length: int, rounds: int) -> tuple[list[str], list[list[Any]]]:
    """Ratios to lax.scan, in one run."""
    rows = []
    cases = [(name, width, length) for name in ("elementwise", "pairs") for width in (4, 64, 256, 1024)] + [("batch", 4, length // 16)]
    for name, width, steps in tqdm(cases, leave=False):
        cell, arguments = block_problem(name, width, steps)
        scans = {"lax": jax.lax.scan} | {m: (lambda f, h, x, m=m: parscan.scan(f, h, x, method=m)) for m in ("auto", "sequential", "walk", "chunked")}
        built = {m: whole_gradient(cell, scan, arguments) for m, scan in scans.items()}
        want = built["lax"][0]()
        gaps = max(gap(run(), want) for run, _ in built.values())
        if not gaps < 1e-3:
            raise click.ClickException(f"{name} {width}: gradients disagree, {gaps}")
        times = interleaved({m: run for m, (run, _) in built.items()}, rounds)
        chosen = parscan.plan(lambda h, x, cell=cell, a=arguments[0]: (cell(a, h, x), None), *arguments[1:]).method
        ratio = {m: float(np.median(times["lax"] / t)) for m, t in times.items()}
        memory = built["auto"][1] / max(built["lax"][1], 1)
        shown = f"{name} 256 × {width}" if name == "batch" else f"{name} {width}"
        row = [f"{shown}, T = {steps}", str(chosen), f"{1e3 * np.median(times['lax']):.1f}", f"{ratio['auto']:.2f}", f"{memory:.2f}"]
        rows.append([*row, *(f"{ratio[m]:.2f}" for m in ("sequential", "walk", "chunked"))])
    return ["recurrence", "auto chose", "lax ms", "auto ×", "memory ×", "sequential ×", "walk ×", "chunked ×"], rows


# --- kinds ----------------------------------------------------------------------------------------------------------------


def kind_problems(n: int) -> dict[str, Callable[[Any, Any], Any]]:
    """Layers (weights, h) -> h whose Jacobians are of one kind; weights and state of n numbers, (n,) or for Kronecker (√n, √n)."""
    down, up = (0.5 * jax.random.normal(jax.random.key(i), (n, 2)) / n**0.5 for i in (0, 1))
    side = round(n**0.5)
    left = jax.random.normal(jax.random.key(2), (side, side)) / side**0.5
    return {
        "Banded": lambda w, h: h + 0.1 * (jnp.roll(w, 1) * jnp.pad(h[1:], (0, 1)) + jnp.tanh(w * jnp.pad(h[:-1], (1, 0)))),
        "Sparse": lambda w, h: h + 0.1 * (jnp.tanh(w * jnp.roll(h, 1)) + jnp.roll(h, -1)),
        "LowRank": lambda w, h: h + up @ jnp.tanh(w[:2] + h @ down),
        "Kronecker": lambda w, h: (w * left) @ h @ left.T,
        "Kronecker, then tanh": lambda w, h: jnp.tanh(left @ h @ left.T + w),
        "Permutation": lambda w, h: jnp.tanh(w * h[::-1]),
    }


def backward_pass(layer: Callable[..., Any], shape: tuple[int, ...], length: int, method: str, structure: Any) -> tuple[Callable[[], Any], str]:
    """The compiled `parallel_backward` alone, and the kind it works with."""
    weights = jax.random.normal(jax.random.key(3), (length, *shape))
    _, activations = parscan.forward(layer, weights, jnp.ones(shape))
    kind = ""

    def run(weights, activations):
        nonlocal kind
        grads = parscan.parallel_backward(layer, weights, activations, jnp.ones(shape), method=method, structure=structure)
        kind = grads.plan.kind
        return grads.params, grads.activations

    compiled = jax.jit(run).lower(weights, activations).compile()
    return lambda: jax.block_until_ready(compiled(weights, activations)), kind


WIDTHS = (4, 9, 16, 36, 64, 144)


def kind_figures(name: str, n: int, length: int, rounds: int) -> dict[str, Any]:
    """By method, the kind that is found, and every round's ratio: time with full blocks over time with that kind."""
    layer, shape = kind_problems(n)[name], (round(n**0.5),) * 2 if name.startswith("Kronecker") else (n,)
    found: dict[str, Any] = {}
    for method in ("walk", "tree"):
        (special, kind), (full, _) = backward_pass(layer, shape, length, method, "auto"), backward_pass(layer, shape, length, method, "dense")
        if gap(special(), full()) > 1e-3:
            raise click.ClickException(f"{name} {n}: gradients disagree")
        times = interleaved({"special": special, "full": full}, rounds)
        found[method] = {"kind": kind, "ms": {run: 1e3 * float(np.median(t)) for run, t in times.items()}, "ratio": times["full"] / times["special"]}
    return found


def kinds(length: int, rounds: int, only: str) -> tuple[list[str], list[list[Any]]]:
    """Time with full blocks over time with the kind that is found."""
    rows = []
    for name in (name for name in kind_problems(16) if name.startswith(only)):
        for n in WIDTHS:
            found = kind_figures(name, n, length, rounds)
            rows.append([name, n, *(cell for one in found.values() for cell in (one["kind"], f"{float(np.median(one['ratio'])):.2f}"))])
    return ["layer", "n", "walk works with", "walk ×", "tree works with", "tree ×"], rows


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.argument("what", type=click.Choice(["finding", "blocks", "kinds"]))
@click.option("--length", type=click.IntRange(2), help="Steps: 16384 for blocks, 64 for kinds, if not given.")
@click.option("--only", help="Of kinds, those alone whose name begins so.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(3), help="Interleaved measurements.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the table to this file.")
def main(what: str, length: int | None, only: str | None, rounds: int, path: Path | None) -> None:
    head, rows = finding() if what == "finding" else blocks(length or 16384, rounds) if what == "blocks" else kinds(length or 64, rounds, only or "")
    click.echo(f"{where()}\n\n{markdown(head, rows)}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"where": where(), "head": head, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
