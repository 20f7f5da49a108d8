"""Trains on real data, once by JAX's own backward pass and once by parscan's, from the same weights on the same batches.

Two tasks: `sequence`, a recurrent classifier of power-consumption series (ACSF1), where `parscan.scan` takes the place of `jax.lax.scan`
(`logits`), and `deep`, a residual classifier of images (digits) with one layer after another through `parscan.chain` (`class_scores`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any, NoReturn

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
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from training import CLASSES, STYLES, Params, Run, Split, cross_entropy, make_folder, publish, train
except ModuleNotFoundError as missing:
    raise SystemExit(f"Error: {missing.name} is missing: {INSTALL}") from None

SERIES = 100  # of each half of ACSF1
PIXELS, SEEN = 64, 1437  # of 1797 images; the other 360 are to test with
CLIP = 1.0  # gradients of a chain this long explode now and then: their global norm is cut to this
GLANCES = 100  # how often in a run the norms of the gradients are taken

Scan = Callable[..., tuple[Any, Any]]


# --- data ----------------------------------------------------------------------------------------------------------------


def load_series(split: str) -> Split:
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


def load_images() -> tuple[Split, Split]:
    """Training and test images, pixels from -1 to 1; always the same shuffle."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise click.ClickException(f"digits comes with scikit-learn, which is missing: {INSTALL}") from None
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    features = jnp.asarray(pixels[order] / 8 - 1, jnp.float32)
    classes = jnp.asarray(labels[order].astype(np.int32))
    return Split(features[:SEEN], classes[:SEEN]), Split(features[SEEN:], classes[SEEN:])


# --- sequence: the model -------------------------------------------------------------------------------------------------


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


# --- deep: the model -----------------------------------------------------------------------------------------------------


def affine(p: Params, h: Array) -> Array:
    """The first layer, from the pixels to the width, and the last, to the classes."""
    return h @ p["w"] + p["b"]


def block(scale: float, p: Params, h: Array) -> Array:
    """A residual layer."""
    return h + scale * jnp.tanh(h @ p["w"] + p["b"])


def network(count: int) -> list[Callable[[Params, Array], Array]]:
    """All layers: `count` - 2 blocks between the embedding and the head. The branches are scaled so that their random sum does not grow with depth."""
    return [affine, *[partial(block, (count - 2) ** -0.5)] * (count - 2), affine]


def initial_network(key: Array, count: int, width: int) -> Params:
    """The blocks' weights stacked: an optimiser of a few large arrays compiles in seconds, one of 512 small ones in minutes."""
    first, between, last = jax.random.split(key, 3)
    return {
        "embed": {"w": jax.random.normal(first, (PIXELS, width)) / np.sqrt(PIXELS), "b": jnp.zeros(width)},
        "blocks": {"w": jax.random.normal(between, (count - 2, width, width)) / np.sqrt(width), "b": jnp.zeros((count - 2, width))},
        "head": {"w": jax.random.normal(last, (width, CLASSES)) / np.sqrt(width), "b": jnp.zeros(CLASSES)},
    }


def one_by_one(params: Params) -> list[Params]:
    """One entry a layer, as `parscan.chain` takes them."""
    weights, biases = (jnp.unstack(params["blocks"][name]) for name in "wb")
    return [params["embed"], *({"w": w, "b": b} for w, b in zip(weights, biases, strict=True)), params["head"]]


def class_scores(backward: str, method: str, count: int, params: Params, features: Array) -> Array:
    """Scores (images, classes), by a loop over the stacked blocks or by a chain of all layers."""
    layers = network(count)
    if backward == "parscan":
        return parscan.chain(layers, method=method)(one_by_one(params), features)
    h, _ = lax.scan(lambda h, p: (layers[1](p, h), None), affine(params["embed"], features), params["blocks"])
    return affine(params["head"], h)


@dataclass
class Norms:
    """The norm of the gradient accumulated at each of h_0 … h_L, the pixels to the scores, for a run's weights and batches.

    Attributes:
        steps: the optimiser steps before whose update they were taken.
        values: for each of these steps (L + 1,), the batch and the width taken together.
    """

    run: Run
    every: int
    of: Callable[[Params, Split], Array]
    steps: list[int] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    def __call__(self, count: int, batch: Split) -> None:
        """Notes the first step's, then every so many."""
        if count % self.every == 0 or count == 1:
            self.steps.append(count)
            self.values.append(np.asarray(self.of(self.run.params, batch)))


def gradient_norms(method: str, count: int, params: Params, batch: Split) -> Array:
    """‖∂loss/∂h_i‖ for i = 0 … L, from stored activations."""
    layers, entries = network(count), one_by_one(params)
    scores, activations = parscan.forward(layers, entries, batch.features, method=method)
    grads = parscan.parallel_backward(layers, entries, activations, jax.grad(cross_entropy)(scores, batch.labels), method=method)
    return jnp.stack([jnp.linalg.norm(g) for g in grads.activations])


def draw_norms(norms: Norms, path: Path) -> None:
    """Every layer at every step that was noted: the norms, and how they grow or shrink on the way back from the scores."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    values = np.array(norms.values).T
    colour(left, norms.steps, values, "‖gradient at layer‖")
    colour(right, norms.steps, values / np.maximum(values[-1], np.finfo(np.float32).tiny), "‖gradient at layer‖ / ‖at the scores‖")
    left.set_ylabel(f"layer (0: pixels, {len(values) - 1}: scores)", fontsize=18)
    figure.savefig(path, dpi=150)


def colour(axes: Axes, steps: list[int], values: np.ndarray, quantity: str) -> None:
    """Layers upwards, steps to the right; the colours a logarithm, but for the smallest half per cent."""
    positive = values[values > 0]
    low, high = np.quantile(positive, (0.005, 1)) if positive.size else (0.5, 1)
    scale = LogNorm(min(low, high / 10), high)
    edges = np.append(steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1)
    picture = axes.pcolormesh(edges, np.arange(len(values) + 1) - 0.5, values, norm=scale, cmap="viridis", rasterized=True)
    bar = axes.figure.colorbar(picture, ax=axes, location="top", extend="min")
    bar.set_label(quantity, fontsize=18, labelpad=12)
    for some in (axes, bar.ax):
        some.tick_params(labelsize=17)
    axes.set_xlabel("optimiser steps", fontsize=18)


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


class Tasks(click.Group):
    """Options without a task are those of the first one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["sequence", *args]
        if not args[0].startswith("-") and args[0] not in self.commands:
            raise OutOfRange(f"no task {args[0]!r}; there are {' and '.join(self.commands)}")
        return super().parse_args(ctx, args)


def options(width: int, batch: int, examples: int, steps: int, learning_rate: float, files: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What every task takes, with its own defaults."""
    every = [
        click.option("--width", type=Whole(min=1), default=width, help="Size of the hidden state: the Jacobians are width × width."),
        click.option("--batch", type=Whole(1, examples), default=batch, help=f"Examples in a batch, out of {examples}."),
        click.option("--steps", type=Whole(min=1), default=steps, help="Optimiser steps."),
        click.option("--learning-rate", type=Real(min=0, min_open=True), default=learning_rate, help="Adam's, at the start; it decays to 0 along a cosine."),
        click.option("--seed", type=Whole(0, 2**31 - 1), default=0, help="Draws the initial weights and the batches."),
        click.option("--backward", type=click.Choice([*STYLES, "both"]), default="both", help="Whose backward pass to train with; both take turns."),
        click.option("--method", type=click.Choice(["auto", *BY_NAME]), default="auto", help="parscan's method for the backward pass."),
        click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out/train"), help=f"Folder of {files}."),
    ]
    return lambda command: reduce(lambda inner, option: option(inner), reversed(every), command)


@click.group(cls=Tasks, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train a network twice from the same weights, by JAX's own backward pass and by parscan's.

    \b
    sequence   a recurrent network on power-consumption series (ACSF1), a chain of 1460
               time steps: jax.lax.scan against parscan.scan. The task if none is named.
    deep       a residual network of 512 narrow layers on images of handwritten digits:
               jax.lax.scan over stacked blocks against parscan.chain over a list of
               layers, the first and the last of other widths.

    Either prints loss, accuracy, the time of the first call (compilation included), the median time of a step after it
    and how far apart the two learning curves are, and writes figures and pictures to --out. Each task has a --help.

    \b
    Examples:
      python scripts/train.py                         # sequence, about a minute on two CPU cores
      python scripts/train.py --steps 50 --cell rnn   # sequence
      python scripts/train.py deep                    # about a minute too
      python scripts/train.py deep --layers 1000 --steps 300
    """


@main.command(short_help="Power-consumption series, a recurrent network.")
@click.option("--cell", type=click.Choice(list(CELLS)), default="gru", help="Recurrent cell.")
@options(8, 16, SERIES, 300, 0.01, "train.png, train.json")
def sequence(cell: str, width: int, batch: int, steps: int, learning_rate: float, seed: int, backward: str, method: str, out: Path) -> None:
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
    seen, unseen = load_series("train"), load_series("test")
    make_folder(out)
    params = initial(jax.random.key(seed), cell, seen.features.shape[-1], width)
    scans: dict[str, Scan] = {"lax": lax.scan, "parscan": partial(parscan.scan, method=method)}
    labels = {"lax": "lax.scan", "parscan": "parscan.scan"}
    runs = [Run(name, labels[name], partial(logits, scans[name], cell), adam(learning_rate, steps), params) for name in chosen(backward)]
    train(runs, seen, unseen, batch, steps, seed)
    publish(runs, click.get_current_context().params, out / "train.png", out / "train.json")


@main.command(short_help="Handwritten digits, a deep residual network.")
@click.option("--layers", type=Whole(min=3), default=512, help="Layers, among them the embedding and the head.")
@options(16, 4, SEEN, 2000, 0.001, "deep.png, deep_gradients.png, deep.json")
def deep(layers: int, width: int, batch: int, steps: int, learning_rate: float, seed: int, backward: str, method: str, out: Path) -> None:
    """Train a very deep and narrow residual network to read handwritten digits.

    The data are scikit-learn's digits: 1797 images of 8 × 8 pixels, 1437 to train on and 360 to test with. An embedding
    takes the 64 pixels to the width, residual blocks follow, a head gives scores for ten classes: 512 layers in all.
    The network is trained by jax.lax.scan over the stacked blocks, by parscan.chain over the list of all layers, or by
    both from the same weights. The learning curves are drawn to deep.png, the figures go to deep.json. The norm of the
    gradient that is accumulated at every layer, by parscan.parallel_backward, is drawn over the steps to
    deep_gradients.png.

    \b
    Examples:
      python scripts/train.py deep                    # both, about a minute on two CPU cores
      python scripts/train.py deep --layers 1000 --steps 300
      python scripts/train.py deep --backward parscan --method chunked
    """
    seen, unseen = load_images()
    make_folder(out)
    params = initial_network(jax.random.key(seed), layers, width)
    labels = {"lax": "lax.scan", "parscan": "parscan.chain"}
    runs = [Run(name, labels[name], partial(class_scores, name, method, layers), adam(learning_rate, steps), params) for name in chosen(backward)]
    norms = Norms(runs[-1], max(1, steps // GLANCES), jax.jit(partial(gradient_norms, method, layers)))
    train(runs, seen, unseen, batch, steps, seed, norms)
    draw_norms(norms, out / "deep_gradients.png")
    publish(runs, click.get_current_context().params, out / "deep.png", out / "deep.json", out / "deep_gradients.png")


def adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(optax.cosine_decay_schedule(learning_rate, steps)))


def chosen(backward: str) -> list[str]:
    return list(STYLES) if backward == "both" else [backward]


if __name__ == "__main__":
    main()
