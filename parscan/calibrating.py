"""`calibrate`: measures what this machine takes, and keeps it for all later plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from parscan import machines, timing
from parscan.costs import Step
from parscan.machines import Machine
from parscan.methods import Chunked, Lax, Method, Sequential, Tree, Walk, sized
from parscan.scanning import scan, traced_scan
from parscan.structure import Structure, blocks_of

BUDGET = 50.0  # seconds after which nothing more is measured
ROUNDS = 5
SHORT = 3e-3  # seconds that a measurement takes at least
STIFFNESS = 0.2  # how much a default weighs beside measurements, in logarithms


class Sample(NamedTuple):
    """A recurrence that is measured: the step, by its weights, their width n, B states, T steps."""

    name: str
    steps: int
    batch: int
    width: int


CELLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "tanh": lambda w, h, x: jnp.tanh(h @ w + x),
    "gate": lambda w, h, x: jax.nn.sigmoid(h @ w) * h + jnp.tanh(x),
    "decay": lambda w, h, x: jax.nn.sigmoid(x) * h + x,
    "turn": lambda w, h, x: jnp.tanh(jnp.cos(x) * h - jnp.sin(x) * h[..., ::-1]),
    "rule": lambda w, h, x: h - jnp.outer(x[0], x[0] @ h) + x,
}
SAMPLES = tuple(
    Sample(*one)
    for one in (
        ("tanh", 2000, 4, 8), ("decay", 4000, 1, 4), ("tanh", 4000, 1, 8), ("gate", 1000, 8, 16), ("decay", 2000, 8, 32), ("turn", 1000, 4, 16),
        ("tanh", 300, 32, 32), ("rule", 1000, 8, 8), ("gate", 300, 64, 8), ("decay", 400, 64, 32), ("turn", 4000, 1, 6), ("tanh", 100, 64, 64),
    )
)  # fmt: skip


class Measured(NamedTuple):
    """What `calibrate` has found.

    Attributes:
        machine: what one of each takes, in nanoseconds.
        told: floating-point array (k,), of each of k measurements the seconds that this machine tells.
        seconds: floating-point array (k,), those that were measured.

    Example:
        >>> measured = parscan.calibrate(progress=False, save=False, budget=0.1)
        >>> measured.told.shape == measured.seconds.shape
        True
    """

    machine: Machine
    told: np.ndarray
    seconds: np.ndarray


def calibrate(*, progress: bool = True, save: bool = True, budget: float = BUDGET) -> Measured:
    """Measures what JAX's default device takes for the work of a gradient, in under a minute, and keeps it for all later plans.

    A dozen small recurrences are differentiated by several methods, and the terms of the cost model (`Machine`) fitted to their times, in logarithms and
    in relation to the defaults, which stand for what the measurements do not tell. The file lies where the platform's conventions put caches, one for
    each device, version of JAX and version of parscan. Functions that are compiled already keep the method that was chosen for them.

    Args:
        progress: show a progress bar.
        save: keep the result for later plans, of this process and of others.
        budget: seconds after which nothing more is measured.

    Returns:
        the machine, and how well it tells what was measured.

    Raises:
        ImportError: `platformdirs` is not there to say where to keep it (`save=True`), or `tqdm` to show a bar (`progress=True`):
            `pip install 'parscan[calibrate]'`.
        OSError: the file cannot be written.
        ValueError: `budget` is not positive.

    Example:
        >>> parscan.calibrate(progress=False, save=False, budget=0.1).machine.start > 0
        True
    """
    if not budget > 0:
        raise ValueError(f"`calibrate(budget=...)` must be a positive number of seconds; got {budget!r}.")
    if save:
        machines.folder()  # raises before anything is measured
    default, begun = machines.default(jax.default_backend()), time.perf_counter()
    terms, times = [], []
    for sample in _shown(SAMPLES, progress):
        if times and time.perf_counter() - begun > budget:
            break
        for row, seconds in _measured(sample):
            terms.append(row)
            times.append(seconds)
    rows, seconds = np.array(terms), np.array(times)
    found = fitted(rows, seconds, default)
    if save:
        machines.save(found)
    return Measured(found, rows @ np.array(astuple(found)), seconds)


def calibration() -> Machine | None:
    """What `calibrate` has measured on JAX's default device with these versions of JAX and parscan.

    Plans of this process use what was there when the first of them was made, or was measured since.

    Returns:
        the machine, its times in nanoseconds; None if there is no measurement, or, with a warning, if its file cannot be read.

    Example:
        >>> found = parscan.calibration()
        >>> found is None or found.start > 0
        True
    """
    return machines.load()


def _shown(samples: tuple[Sample, ...], progress: bool) -> Any:
    if not progress:
        return samples
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("`parscan.calibrate(progress=True)` shows its bar by `tqdm`: `pip install 'parscan[calibrate]'`.") from None
    return tqdm(samples, desc="calibrating", unit="recurrence", leave=False)


def _measured(sample: Sample) -> Iterator[tuple[np.ndarray, float]]:
    """The model's terms and the seconds of every method."""
    cell, keys = CELLS[sample.name], jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (sample.width, sample.width)) / sample.width**0.5 if sample.name in ("tanh", "gate") else None
    start = jax.random.normal(keys[1], (sample.batch, sample.width))
    xs = 0.3 * jax.random.normal(keys[2], (sample.steps, sample.batch, sample.width))
    step, structure = _traced(cell, weights, start, xs)
    methods: list[Method] = [Lax(), Sequential(), Walk()] if jax.default_backend() == "cpu" else [Lax(), Sequential(), Chunked(), Tree()]
    for method in methods:
        method = sized(method, step.count, blocks_of([structure]))
        yield _terms(step, structure, method), _seconds(cell, method, weights, start, xs)


def _traced(cell: Callable, weights: Any, start: Any, xs: Any) -> tuple[Step, Structure]:
    found = []

    def trace(weights):
        traced = traced_scan(lambda h, x: (cell(weights, h, x),) * 2, start, xs, None, False, Sequential(), None)
        assert traced is not None and traced.plan._given is not None and traced.plan._given.structures is not None
        found.append((traced.plan._given.steps[0], traced.plan._given.structures[0]))

    jax.eval_shape(trace, weights)
    return found[0]


def _terms(step: Step, structure: Structure, method: Method) -> np.ndarray:
    """How often each of a machine's times is counted: the model is linear in them."""
    units = np.eye(len(fields(Machine)))
    return np.array([timing.seconds(step, structure, method, Machine(*unit), jax.default_backend()) for unit in units])


def _seconds(cell: Callable, method: Method, weights: Any, start: Any, xs: Any) -> float:
    """Of a value and gradient, compiled; the median of several, each of as many calls as fill a few milliseconds."""

    def loss(weights, start, xs):
        final, states = scan(lambda h, x: (cell(weights, h, x),) * 2, start, xs, method=method)
        return jnp.mean(states**2) + jnp.mean(final)

    compiled = jax.jit(jax.value_and_grad(loss, (1, 2) if weights is None else (0, 1)))

    def run(times: int) -> float:
        begun = time.perf_counter()
        jax.block_until_ready([compiled(weights, start, xs) for _ in range(times)][-1])
        return (time.perf_counter() - begun) / times

    run(1)
    times = max(1, round(SHORT / run(1)))
    return float(np.median([run(times) for _ in range(ROUNDS)]))


def fitted(terms: np.ndarray, seconds: np.ndarray, default: Machine) -> Machine:
    """The machine whose times, so often counted, tell these seconds best: robust least squares of logarithms, drawn towards a default.

    Gauss–Newton with reweighting: a measurement that is off by more than the others counts as its distance, not as its square.

    Args:
        terms: (measurements, terms of a machine). seconds: (measurements,).
    """
    prior = np.log(np.array(astuple(default)))
    prior += np.median(np.log(seconds) - np.log(terms @ np.exp(prior)))  # a machine that is faster in all
    x = prior.copy()
    for _ in range(100):
        parts = terms * np.exp(x)
        told = parts.sum(1)
        off, slopes = np.log(told) - np.log(seconds), parts / told[:, None]
        weights = 1 / np.sqrt(1 + (off / 0.3) ** 2)
        normal = slopes.T @ (weights[:, None] * slopes) + STIFFNESS**2 * np.eye(len(x))
        step = np.linalg.solve(normal, slopes.T @ (weights * off) + STIFFNESS**2 * (x - prior))
        x -= np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-6:
            break
    return Machine(*map(float, np.exp(x)))
