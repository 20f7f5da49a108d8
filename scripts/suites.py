"""The suites of `bench.py`, as data: which rows, which few of them make a quick run, and how one is measured."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import bench_auto
import bench_memory
import bench_structure
import jax
import numpy as np
import torch_baselines
from bench import compiled, loss_through
from contest import contest, deep, loop, quartiles, recurrence
from problems import draw, make, parse

import parscan


class Settings(NamedTuple):
    """rounds: interleaved measurements. limit: bytes that inputs and states, or Jacobians, may take. seed: of weights, inputs and drawn problems.

    quick: leaves out what takes longest to compile, and says so.
    """

    rounds: int
    limit: float
    seed: int
    quick: bool = False

    @property
    def steps(self) -> int:
        """Steps up to which `lax.associative_scan` is compiled."""
        return 32 if self.quick else 2**31


class Suite(NamedTuple):
    """about: a sentence, for the tables. rows: of a seed, all; quick: the few of a quick run. measure: a row's figures."""

    about: str
    rows: Callable[[int], list[str]]
    quick: Callable[[int], list[str]]
    measure: Callable[[str, Settings], dict[str, Any]]


def grid(pattern: str, **axes: tuple[int | str, ...]) -> list[str]:
    """The pattern with every combination of values, the first axis slowest."""
    return [pattern.format(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def _rivals(row: str, seed: int) -> Callable[[Any], tuple[dict[str, dict[str, Any]], list[str]]] | None:
    """PyTorch's contenders, on a GPU."""
    if jax.default_backend() != "gpu":
        return None
    return lambda want: torch_baselines.entrants(make(row, 0, seed), "cuda", want)


def _recurrence(row: str, settings: Settings, *, torch: bool = False) -> dict[str, Any]:
    task = recurrence(row, settings.limit, settings.seed)
    return contest(row, task, settings.rounds, settings.limit, settings.steps, _rivals(row, settings.seed) if torch else None)


def _deep(row: str, settings: Settings) -> dict[str, Any]:
    return contest(row, deep(row, settings.limit, settings.seed), settings.rounds, settings.limit, settings.steps)


def _structure(row: str, settings: Settings) -> dict[str, Any]:
    """A row KIND:N."""
    name, n = row.rsplit(":", 1)
    found = bench_structure.kind_figures(name, int(n), 64, settings.rounds)
    return {method: one | {"ratio": quartiles(one["ratio"])} for method, one in found.items()}


def _auto(row: str, settings: Settings) -> dict[str, Any]:
    return bench_auto.measure(row, (1, 2, 4, 8), settings.rounds, settings.seed)


COMPILED: dict[str, Any] = {"auto": "auto", "tree": parscan.Tree(), "chunked": parscan.Chunked()}


def _compile(row: str, settings: Settings) -> dict[str, Any]:
    """Seconds of tracing and compiling the gradient, nothing being run, three times over (once if quick), with JAX's caches emptied before each."""
    cell, b, n, length = parse(row, 0)
    problem = make(f"{cell}:{b}:{n}:2", 0, settings.seed)
    inputs = jax.ShapeDtypeStruct((length, *problem.inputs.shape[1:]), problem.inputs.dtype)
    scans = {"lax": loop("lax 1")} | {name: functools.partial(parscan.scan, method=method) for name, method in COMPILED.items()}
    times: dict[str, list[float]] = {name: [] for name in scans}
    for _ in range(1 if settings.quick else 3):
        for name, scan in scans.items():
            jax.clear_caches()
            gradient = jax.value_and_grad(loss_through(problem, scan), (0, 1))
            times[name].append(compiled(gradient, problem.weights, problem.start, inputs).first)
    plan = parscan.plan(lambda h, x: (problem.cell(problem.weights, h, x), None), problem.start, inputs)
    return {
        "auto": str(plan.method),
        "s": {name: quartiles(t) for name, t in times.items()},
        "ratio": {name: float(np.median(t) / np.median(times["lax"])) for name, t in times.items()},
    }


def _memory(row: str, settings: Settings) -> dict[str, Any]:
    """A row CELL:B:N:T."""
    problem, length = row.rsplit(":", 1)
    return bench_memory.measure(problem, int(length), not settings.quick, settings.rounds, settings.seed) | {"row": row}


def _drawn(seed: int) -> list[str]:
    return draw(seed, 120)


def _smallest(seed: int) -> list[str]:
    """The drawn problems of least arithmetic, one of each of two cells."""
    size = lambda row: int(np.prod([int(part) for part in row.split(":")[1:]]))  # noqa: E731
    firsts = {row.split(":")[0]: row for row in sorted(_drawn(seed), key=size, reverse=True)}
    return sorted(firsts.values(), key=size)[:2]


def _fixed(rows: list[str]) -> Callable[[int], list[str]]:
    return lambda seed: rows


LENGTHS = (10, 30, 100, 300, 1000, 3000, 10000, 30000)
SUITES = {
    "bppsa": Suite(
        "A tanh RNN of 20 coordinates, the grid of Wang, Bai and Pekhimenko (MLSys 2020, Figures 9 to 11).",
        _fixed(grid("rnn:{b}:20:{t}", t=LENGTHS, b=(2, 4, 8, 16, 32, 64, 128, 256))),
        _fixed(["rnn:2:20:30", "rnn:16:20:300"]),
        functools.partial(_recurrence, torch=True),
    ),
    "deer": Suite(
        "A GRU, the grid of Lim et al. (2024).",
        _fixed(grid("gru:{b}:{n}:{t}", t=(1000, 10_000, 100_000, 1_000_000), n=(1, 2, 4, 8, 16, 32, 64), b=(1, 4, 16))),
        _fixed(["gru:4:8:1000"]),
        _recurrence,
    ),
    "elementwise": Suite(
        "Recurrences whose coordinates never mix: a gated linear unit and a decay whose inputs were computed before.",
        _fixed(grid("{cell}:1:{d}:{t}", t=(1024, 16_384, 65_536, 262_144), d=(16, 64, 256, 1024, 4096), cell=("gated", "decay"))),
        _fixed(["gated:1:64:1024", "decay:1:256:1024"]),
        _recurrence,
    ),
    "deep": Suite(
        "Residual networks, h + relu(h W + b) V, on 4 inputs, through `parscan.chain` and through `lax.scan` over the stacked layers; T is the layers.",
        _fixed(grid("mlp:4:{n}:{t}", t=(16, 64, 256, 1024, 4096), n=(8, 16, 32, 64, 128))),
        _fixed(["mlp:4:8:64"]),
        _deep,
    ),
    "structure": Suite(
        "Each kind of Jacobian beside full blocks: `parallel_backward` alone through 64 cheap layers of n coordinates.",
        _fixed(grid("{kind}:{n}", kind=tuple(bench_structure.kind_problems(16)), n=bench_structure.WIDTHS)),
        _fixed(["Banded:36"]),
        _structure,
    ),
    "auto": Suite("Recurrences drawn at random over all axes, by every choice that `auto` has.", _drawn, _smallest, _auto),
    "compile": Suite(
        "First calls: seconds of tracing and compiling a GRU's whole gradient.",
        _fixed(grid("gru:{b}:{n}:{t}", b=(1, 4, 16), n=(8,), t=(100, 1000, 10_000, 100_000, 1_000_000))),
        _fixed(["gru:4:8:100"]),
        _compile,
    ),
    "memory": Suite(
        "What a whole gradient holds.",
        _fixed(grid("{problem}:{t}", problem=bench_memory.ROWS, t=(1024, 4096))),
        _fixed(["rnn:4:8:1024"]),
        _memory,
    ),
}


def limit() -> float:
    """Bytes that inputs and states may take unless told otherwise: an eighth of an accelerator's memory, half a gigabyte on a CPU."""
    try:
        return jax.devices()[0].memory_stats()["bytes_limit"] / 8
    except (KeyError, TypeError, jax.errors.JaxRuntimeError):
        return 5e8
