"""Trains a recurrent classifier on real power-consumption series (ACSF1), with `jax.lax.scan` and with `parscan.scan`.

Both runs start from the same weights and see the same batches; `logits` is where one scan takes the other's place.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import parscan
from parscan.methods import BY_NAME

INSTALL = "install with pip install -e '.[train]'"

try:
    import click
    import optax
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    raise SystemExit(f"Error: {missing.name} is missing: {INSTALL}") from None

SERIES, CLASSES = 100, 10  # of each half of ACSF1
CLIP = 1.0  # gradients of a chain this long explode now and then: their global norm is cut to this
EVALUATIONS = 20
# Okabe and Ito's colours, told apart by every kind of colour vision; dashes and widths differ too.
STYLES = {"lax": ("#E69F00", "-", 5.0), "parscan": ("#0072B2", "--", 2.0)}

Params = dict[str, Array]
Scan = Callable[..., tuple[Any, Any]]


# --- data ----------------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Time-major features (1460, series, 2) and the class of each series."""

    features: Array
    labels: Array


def load(split: str) -> Split:
    """`"train"` or `"test"`: each series standardised, with its differences; `arcsinh` tames the spikes of switching on and off."""
    try:
        from aeon.datasets import load_acsf1
    except ImportError:
        raise click.ClickException(f"ACSF1 comes with aeon>=1.6,<1.7, which is missing: {INSTALL}") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*load_acsf1", category=FutureWarning)
        loaded: Any = load_acsf1(split)
    series, labels = loaded[0][:, 0], loaded[1]
    series = (series - series.mean(axis=1, keepdims=True)) / series.std(axis=1, keepdims=True)
    features = np.arcsinh(np.stack([series, np.diff(series, axis=1, prepend=series[:, :1])], axis=-1))
    return Split(jnp.asarray(features.swapaxes(0, 1), jnp.float32), jnp.asarray(labels.astype(np.int32)))


def batches(data: Split, size: int, steps: int, seed: int) -> Iterator[Split]:
    """`steps` batches of `size` series; each epoch in a new order, its incomplete last batch left out."""
    shuffle = np.random.default_rng(seed).permutation
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = shuffle(len(data.labels))
        chosen, order = order[:size], order[size:]
        yield Split(data.features[:, chosen], data.labels[chosen])


# --- model ---------------------------------------------------------------------------------------------------------------


def gru(h: Array, x: Array, recurrent: Array) -> Array:
    """One step of a GRU: `x` holds the input's share of all gates, a single product that of the state."""
    n = h.shape[-1]
    own = h @ recurrent
    keep, reset = jnp.split(jax.nn.sigmoid(x[..., : 2 * n] + own[..., : 2 * n]), 2, axis=-1)
    candidate = jnp.tanh(x[..., 2 * n :] + reset * own[..., 2 * n :])
    return keep * h + (1 - keep) * candidate


def rnn(h: Array, x: Array, recurrent: Array) -> Array:
    """One step of an Elman network."""
    return jnp.tanh(x + h @ recurrent)


CELLS: dict[str, tuple[Callable[[Array, Array, Array], Array], int]] = {"gru": (gru, 3), "rnn": (rnn, 1)}  # step, gates


def initial(key: Array, cell: str, inputs: int, width: int) -> Params:
    """Contracting at first: half an orthogonal matrix a gate; a GRU's update gate starts off forgetful."""
    gates = CELLS[cell][1]
    keys = jax.random.split(key, gates + 2)
    orthogonal = jax.nn.initializers.orthogonal(0.5)
    return {
        "recurrent": jnp.concatenate([orthogonal(k, (width, width)) for k in keys[2:]], axis=1),
        "inputs": jax.random.normal(keys[0], (inputs, gates * width)) / 2,
        "bias": jnp.zeros(gates * width).at[:width].set(-2.0 if cell == "gru" else 0.0),
        "readout": jax.random.normal(keys[1], (3 * width, CLASSES)) / np.sqrt(width),
        "offset": jnp.zeros(CLASSES),
    }


def logits(scan: Scan, cell: str, params: Params, features: Array) -> Array:
    """Scores (series, classes) from the mean, largest and smallest state over time. `scan` is `lax.scan` or `parscan.scan`."""
    advance, _ = CELLS[cell]

    def step(h: Array, x: Array) -> tuple[Array, Array]:
        h = advance(h, x, params["recurrent"])
        return h, h

    start = jnp.zeros((features.shape[1], params["recurrent"].shape[0]))
    _, states = scan(step, start, features @ params["inputs"] + params["bias"])
    pooled = jnp.concatenate([states.mean(axis=0), states.max(axis=0), states.min(axis=0)], axis=-1)
    return pooled @ params["readout"] + params["offset"]


# --- training ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Training with one scan: its weights and what was measured.

    Attributes:
        losses: cross-entropy of each batch before its update, nats.
        seconds: how long each update took; the first includes compilation.
        accuracies: (step, of the training series, of the test series), fractions.
    """

    name: str
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
        def loss_of(params: Params) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(self.scores(params, batch.features), batch.labels).mean()

        loss, gradient = jax.value_and_grad(loss_of)(params)
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
        """Notes the accuracy on all series of both halves."""
        self.accuracies.append((len(self.losses), float(self._accuracy(self.params, train)), float(self._accuracy(self.params, test))))


def train(runs: list[Run], data: Split, unseen: Split, batch: int, steps: int, seed: int) -> None:
    """Feeds every run the same batches, turn by turn, so that a busy machine slows all of them alike."""
    every = max(1, steps // EVALUATIONS)
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        for count, chosen in enumerate(batches(data, batch, steps, seed), start=1):
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


def report(figures: dict[str, Any]) -> str:
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
            f"step time, lax.scan / parscan.scan: {both['step_time_ratio']:.2f}",
        ]
    return "\n".join(lines)


def smoothed(values: list[float], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Running means, and the steps at which their windows end."""
    window = min(window, len(values))
    return np.arange(window, len(values) + 1), np.convolve(values, np.ones(window) / window, mode="valid")


def draw(runs: list[Run], path: Path) -> None:
    """Learning curves: the loss of the batches, and the accuracy on all series of both halves."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for run in runs:
        colour, dashes, thickness = STYLES[run.name]
        style = {"color": colour, "linestyle": dashes, "linewidth": thickness}
        loss.plot(*smoothed(run.losses, 25), label=f"{run.name}.scan", **style)
        steps, *fractions = zip(*run.accuracies, strict=True)
        for marker, fill, split, values in zip("os", (colour, "white"), ("train", "test"), fractions, strict=True):
            points = {"marker": marker, "markersize": 7, "markerfacecolor": fill, "markeredgewidth": 1.5}
            accuracy.plot(steps, 100 * np.array(values), label=f"{run.name}, {split}", **points, **style)
    accuracy.axhline(100 / CLASSES, color="#555555", linestyle=":", linewidth=2)
    accuracy.annotate("chance", (1, 100 / CLASSES), (-4, 5), ("axes fraction", "data"), "offset points", ha="right", fontsize=13)
    accuracy.set_ylim(0, 105)
    finish(loss, "cross-entropy (nats)", title="mean of 25 batches")
    finish(accuracy, "accuracy (%)", ncols=len(runs), loc="upper left")
    figure.savefig(path, dpi=150)


def finish(axes: Axes, quantity: str, **legend: Any) -> None:
    """Labels and a legend large enough for a figure shown at half its width."""
    axes.set_xlabel("optimiser steps", fontsize=15)
    axes.set_ylabel(quantity, fontsize=15)
    axes.tick_params(labelsize=14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=13, title_fontsize=13, frameon=False, **legend)


# --- command line --------------------------------------------------------------------------------------------------------


class OutOfRange(click.ClickException):
    """Said in one line: Click's own error repeats the usage."""

    exit_code = 2


class OneLine(click.ParamType):
    """A parameter that complains in one line."""

    def fail(self, message: str, param: click.Parameter | None = None, ctx: click.Context | None = None) -> NoReturn:
        raise OutOfRange(f"{param.opts[0] if param else 'value'}: {message}")


class Whole(OneLine, click.IntRange):
    """An integer in a range."""


class Real(OneLine, click.FloatRange):
    """A number in a range."""


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--cell", type=click.Choice(list(CELLS)), default="gru", help="Recurrent cell.")
@click.option("--width", type=Whole(min=1), default=8, help="Size of the hidden state: the Jacobians are width × width.")
@click.option("--batch", type=Whole(1, SERIES), default=16, help="Series in a batch, out of 100.")
@click.option("--steps", type=Whole(min=1), default=400, help="Optimiser steps.")
@click.option("--learning-rate", type=Real(min=0, min_open=True), default=0.01, help="Adam's, at the start; it decays to 0 along a cosine.")
@click.option("--seed", type=Whole(0, 2**31 - 1), default=0, help="Draws the initial weights and the batches.")
@click.option("--backward", type=click.Choice([*STYLES, "both"]), default="both", help="The scan to train with; both take turns.")
@click.option("--method", type=click.Choice(["auto", *BY_NAME]), default="auto", help="parscan.scan's method for the backward pass.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out/train"), help="Folder of train.png, train.json.")
def main(cell: str, width: int, batch: int, steps: int, learning_rate: float, seed: int, backward: str, method: str, out: Path) -> None:
    """Train a recurrent network to tell apart ten kinds of household appliances by their power consumption.

    The data are ACSF1: 100 series to train on and 100 to test with, each a chain of 1460 time steps. The network is
    trained with jax.lax.scan, with parscan.scan, or with both from the same weights; printed are loss, accuracy, the
    time of the first call (compilation included) and the median time of a step after it. The learning curves are
    drawn to train.png, the figures go to train.json.

    \b
    Examples:
      python scripts/train.py                         # both, about a minute on two CPU cores
      python scripts/train.py --steps 50 --cell rnn
      python scripts/train.py --backward parscan --method chunked --width 16
    """
    train_split, test_split = load("train"), load("test")
    make_folder(out)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(optax.cosine_decay_schedule(learning_rate, steps)))
    params = initial(jax.random.key(seed), cell, train_split.features.shape[-1], width)
    scans: dict[str, Scan] = {"lax": lax.scan, "parscan": partial(parscan.scan, method=method)}
    names = list(scans) if backward == "both" else [backward]
    runs = [Run(name, partial(logits, scans[name], cell), optimizer, params) for name in names]
    train(runs, train_split, test_split, batch, steps, seed)

    figures: dict[str, Any] = {"settings": click.get_current_context().params | {"out": str(out), "platform": jax.default_backend()}}
    figures["runs"] = {run.name: summary(run) for run in runs}
    if len(runs) == 2:
        figures["comparison"] = comparison(*runs)
    click.echo(report(figures))
    draw(runs, out / "train.png")
    (out / "train.json").write_text(json.dumps(figures, indent=2) + "\n")
    click.echo(f"\nwrote {out / 'train.png'} and {out / 'train.json'}")


def make_folder(path: Path) -> None:
    """Before training, lest its figures find no place."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--out: {error}") from None


if __name__ == "__main__":
    main()
