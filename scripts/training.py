"""What the tasks of `train.py` share: batches, the training of several runs side by side, figures and learning curves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import numpy as np
import optax
from jax import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

CLASSES = 10  # of either data set
EVALUATIONS = 20
# Okabe and Ito's colours, told apart by every kind of colour vision; dashes and widths differ too.
STYLES = {"lax": ("#E69F00", "-", 5.0), "parscan": ("#0072B2", "--", 2.0)}

Params = dict[str, Any]


class Split(NamedTuple):
    """Features, the examples on the last axis but one, and the class of each: (1460, series, 2), time-major, or (images, 64)."""

    features: Array
    labels: Array


def batches(data: Split, size: int, steps: int, seed: int) -> Iterator[Split]:
    """`steps` batches of `size` examples; each epoch in a new order, its incomplete last batch left out."""
    shuffle = np.random.default_rng(seed).permutation
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = shuffle(len(data.labels))
        chosen, order = order[:size], order[size:]
        yield Split(data.features[..., chosen, :], data.labels[chosen])


def cross_entropy(scores: Array, labels: Array) -> Array:
    """The mean over the batch, nats."""
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


@dataclass
class Run:
    """Training with one backward pass: its weights and what was measured.

    Attributes:
        label: the function that makes the pass.
        losses: cross-entropy of each batch before its update, nats.
        seconds: how long each update took; the first includes compilation.
        accuracies: (step, of the training data, of the test data), fractions.
    """

    name: str
    label: str
    scores: Callable[[Params, Array], Array]
    optimizer: optax.GradientTransformation
    params: Params
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = self.optimizer.init(self.params)
        self._update = jax.jit(self._updated)
        self._accuracy = jax.jit(lambda params, data: (self.scores(params, data.features).argmax(axis=-1) == data.labels).mean())

    def _updated(self, params: Params, state: optax.OptState, batch: Split) -> tuple[Any, optax.OptState, Array]:
        loss, gradient = jax.value_and_grad(lambda params: cross_entropy(self.scores(params, batch.features), batch.labels))(params)
        updates, state = self.optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    def step(self, batch: Split) -> None:
        """One timed update."""
        begun = time.perf_counter()
        self.params, self.state, loss = jax.block_until_ready(self._update(self.params, self.state, batch))
        self.seconds.append(time.perf_counter() - begun)
        self.losses.append(float(loss))
        if not np.isfinite(loss):
            raise click.ClickException(f"{self.name}: the loss is {loss} after {len(self.losses)} steps: try a smaller --learning-rate")

    def evaluate(self, train: Split, test: Split) -> None:
        """Notes the accuracy on all examples of both halves."""
        self.accuracies.append((len(self.losses), float(self._accuracy(self.params, train)), float(self._accuracy(self.params, test))))


def train(
    runs: list[Run], data: Split, unseen: Split, batch: int, steps: int, seed: int, watch: Callable[[int, Split], None] = lambda count, batch: None
) -> None:
    """Feeds every run the same batches, turn by turn, so that a busy machine slows all of them alike; `watch` sees each batch before they do."""
    every = max(1, steps // EVALUATIONS)
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        for count, chosen in enumerate(batches(data, batch, steps, seed), start=1):
            watch(count, chosen)
            for run in runs:
                run.step(chosen)
                if count % every == 0 or count == steps:
                    run.evaluate(data, unseen)
            bar.update()
            bar.set_postfix({run.name: f"{run.losses[-1]:.3f}" for run in runs})


# --- report --------------------------------------------------------------------------------------------------------------


def summary(run: Run) -> dict[str, float]:
    """The figures of one run: times, the mean loss of the last tenth of the steps, the accuracies at the end."""
    _, train_accuracy, test_accuracy = run.accuracies[-1]
    return {
        "first_call_s": run.seconds[0],
        "median_step_ms": 1e3 * float(np.median(run.seconds[1:])) if run.seconds[1:] else float("nan"),
        "loss": float(np.mean(run.losses[-max(1, len(run.losses) // 10) :])),
        "train_accuracy": train_accuracy,
        "test_accuracy": test_accuracy,
    }


def comparison(one: Run, other: Run) -> dict[str, float]:
    """How far apart two loss curves are, and how many times as long a step of `one` takes."""
    first, second = np.array(one.losses), np.array(other.losses)
    apart = np.abs(first - second)
    return {
        "largest_loss_difference": float(apart.max()),
        "largest_relative_loss_difference": float((apart / first).max()),
        "largest_loss_difference_in_first_quarter": float(apart[: -(-len(apart) // 4)].max()),
        "step_time_ratio": summary(one)["median_step_ms"] / summary(other)["median_step_ms"],
    }


def report(runs: list[Run], figures: dict[str, Any]) -> str:
    """The figures as a table, and below it the comparison."""
    lines = [f"{'backward':<10}{'first call':>12}{'median step':>14}{'loss':>9}{'train':>10}{'test':>10}"]
    for name, run in figures["runs"].items():
        times = f"{run['first_call_s']:>10.2f} s{run['median_step_ms']:>11.1f} ms"
        lines.append(f"{name:<10}{times}{run['loss']:>9.3f}{run['train_accuracy']:>10.1%}{run['test_accuracy']:>10.1%}")
    if both := figures.get("comparison"):
        lines += [
            "",
            f"largest difference of the loss curves: {both['largest_loss_difference']:.1e}, relative to the loss"
            f" {both['largest_relative_loss_difference']:.1e};"
            f" in the first quarter of the steps {both['largest_loss_difference_in_first_quarter']:.1e}",
            f"step time, {' / '.join(run.label for run in runs)}: {both['step_time_ratio']:.2f}",
        ]
    return "\n".join(lines)


def smoothed(values: list[float], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Running means, and the steps at which their windows end."""
    window = min(window, len(values))
    return np.arange(window, len(values) + 1), np.convolve(values, np.ones(window) / window, mode="valid")


def draw(runs: list[Run], path: Path) -> None:
    """Learning curves: the loss of the batches, and the accuracy on all examples of both halves."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for run in runs:
        colour, dashes, thickness = STYLES[run.name]
        style = {"color": colour, "linestyle": dashes, "linewidth": thickness}
        loss.plot(*smoothed(run.losses, 25), label=run.label, **style)
        steps, *fractions = zip(*run.accuracies, strict=True)
        for marker, fill, split, values in zip("os", (colour, "white"), ("train", "test"), fractions, strict=True):
            points = {"marker": marker, "markersize": 7, "markerfacecolor": fill, "markeredgewidth": 1.5}
            accuracy.plot(steps, 100 * np.array(values), label=f"{run.name}, {split}", **points, **style)
    accuracy.axhline(100 / CLASSES, color="#555555", linestyle=":", linewidth=2)
    accuracy.annotate("chance", (1, 100 / CLASSES), (-4, 5), ("axes fraction", "data"), "offset points", ha="right", fontsize=13)
    accuracy.set_ylim(0, 105)
    finish(loss, "cross-entropy (nats)", title="mean of 25 batches")
    starts_high = runs[0].accuracies[0][1] > 0.6
    finish(accuracy, "accuracy (%)", ncols=len(runs), loc="center right" if starts_high else "upper left")
    figure.savefig(path, dpi=150)


def finish(axes: Axes, quantity: str, **legend: Any) -> None:
    """Labels and a legend large enough for a figure shown at half its width."""
    axes.set_xlabel("optimiser steps", fontsize=15)
    axes.set_ylabel(quantity, fontsize=15)
    axes.tick_params(labelsize=14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=13, title_fontsize=13, frameon=False, **legend)


def publish(runs: list[Run], settings: dict[str, Any], curves: Path, numbers: Path, *others: Path) -> None:
    """Prints the figures, writes them and the learning curves, and names all files."""
    settings = settings | {"out": str(curves.parent), "platform": jax.default_backend()}
    figures: dict[str, Any] = {"settings": settings, "runs": {run.name: summary(run) for run in runs}}
    if len(runs) == 2:
        figures["comparison"] = comparison(*runs)
    click.echo(report(runs, figures))
    draw(runs, curves)
    numbers.write_text(json.dumps(figures, indent=2) + "\n")
    click.echo(f"\nwrote {', '.join(map(str, [curves, *others]))} and {numbers}")


def make_folder(path: Path) -> None:
    """Before training, lest its figures find no place."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--out: {error}") from None
