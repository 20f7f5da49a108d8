"""What the benchmarks time: cells as people write them, their weights, states and inputs, a draw of them over all axes, and a residual network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

INPUTS = 4
Weights = dict[str, jax.Array]


class Problem(NamedTuple):
    """A cell (weights, state, input) -> state, its weights, if any, the initial states and the inputs of all steps: (B, n), (T, B, 4) for most."""

    cell: Callable[[Any, Any, jax.Array], Any]
    weights: Weights
    start: Any
    inputs: jax.Array


def rnn(weights: Weights, h: jax.Array, x: jax.Array) -> jax.Array:
    """h' = tanh(h W + x U + b)."""
    return jnp.tanh(h @ weights["W"] + x @ weights["U"] + weights["b"])


def gru(weights: Weights, h: jax.Array, x: jax.Array) -> jax.Array:
    """A gated recurrent unit, its three products with h fused into one."""
    n = h.shape[-1]
    from_x, from_h = x @ weights["U"] + weights["b"], h @ weights["W"]
    z, r = jnp.split(jax.nn.sigmoid(from_x[..., : 2 * n] + from_h[..., : 2 * n]), 2, axis=-1)
    c = jnp.tanh(from_x[..., 2 * n :] + r * from_h[..., 2 * n :])
    return z * h + (1 - z) * c


def lstm(weights: Weights, state: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A long short-term memory; its state is the cell and the output."""
    c, h = state
    i, f, g, o = jnp.split(x @ weights["U"] + h @ weights["W"] + weights["b"], 4, axis=-1)
    c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return c, jax.nn.sigmoid(o) * jnp.tanh(c)


def residual(weights: Weights, h: jax.Array, x: jax.Array) -> jax.Array:
    """h' = h + relu(h W + x U + b) V / 8: a layer of a deep network whose layers share their weights."""
    return h + jax.nn.relu(h @ weights["W"] + x @ weights["U"] + weights["b"]) @ weights["V"] / 8


def ode(weights: Weights, h: jax.Array, x: jax.Array) -> jax.Array:
    """A step of the midpoint method for dh/dt = tanh(h W + x U + b) - h."""
    field = lambda h: rnn(weights, h, x) - h  # noqa: E731
    return h + 0.1 * field(h + 0.05 * field(h))


def linear(weights: Weights, h: jax.Array, x: jax.Array) -> jax.Array:
    """h' = h W + x U: a linear system with one matrix for all steps."""
    return h @ weights["W"] + x @ weights["U"]


def elementwise(weights: Weights, h: jax.Array, x: jax.Array) -> jax.Array:
    """h' = tanh(a h + x U + b)."""
    return jnp.tanh(weights["W"] * h + x @ weights["U"] + weights["b"])


def gated(weights: Weights, h: jax.Array, x: jax.Array) -> jax.Array:
    """A real-gated linear recurrent unit: h' = a h + √(1 - a²) i v, where a, i and v depend on the input alone (De et al. 2024)."""
    r, i, v = jnp.split(x @ weights["U"] + weights["b"], 3, axis=-1)
    a = jnp.exp(-8 * jax.nn.softplus(weights["W"]) * jax.nn.sigmoid(r))
    return a * h + jnp.sqrt(1 - a**2) * jax.nn.sigmoid(i) * v


def pairs(weights: Weights, h: jax.Array, x: jax.Array) -> jax.Array:
    """Coordinates that turn in pairs, by angles that depend on the input; h (..., n) holds the first halves, then the second ones."""
    p, q = jnp.split(h, 2, axis=-1)
    drive = x @ weights["U"] + weights["b"]
    angle, force = jnp.split(drive, 2, axis=-1)
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.tanh(jnp.concatenate([c * p - s * q + force, s * p + c * q], axis=-1))


def decay(weights: Weights, h: jax.Array, x: jax.Array) -> jax.Array:
    """h' = a h + √(1 - a²) b, where a and b have been computed for all steps before, as in a state-space layer."""
    a = jax.nn.sigmoid(x[0])
    return a * h + jnp.sqrt(1 - a**2) * x[1]


def rotation(weights: Weights, h: jax.Array, x: jax.Array) -> jax.Array:
    """Coordinates that turn in pairs and are damped, angles and forces having been computed before; h (B, 2, n / 2)."""
    p, q = h[:, 0], h[:, 1]
    c, s = jnp.cos(x[0]), jnp.sin(x[0])
    return jnp.tanh(jnp.stack([c * p - s * q + x[1], s * p + c * q], axis=1))


def delta(weights: Weights, h: jax.Array, x: jax.Array) -> jax.Array:
    """The delta rule: h' = h - k kᵀ h / kᵀk + v; h (n, B) is a memory of B numbers a key."""
    k, v = x[:, 0], x[:, 1:]
    return h - jnp.outer(k, k @ h) / (k @ k) + v


class Cell(NamedTuple):
    """A step; the columns of its products, in widths; its state and its input for B and n, where they are no (B, n) and (B, 4); whether n is even."""

    step: Callable[[Any, Any, jax.Array], Any]
    columns: int = 0
    state: Callable[[int, int], tuple[int, ...]] = lambda b, n: (b, n)
    input: Callable[[int, int], tuple[int, ...]] = lambda b, n: (b, INPUTS)
    even: bool = False


CELLS = {
    "rnn": Cell(rnn, 1),
    "gru": Cell(gru, 3),
    "lstm": Cell(lstm, 4),
    "residual": Cell(residual, 2),
    "ode": Cell(ode, 2),
    "linear": Cell(linear, 1),
    "elementwise": Cell(elementwise, 1),
    "gated": Cell(gated, 3),
    "pairs": Cell(pairs, 1, even=True),
    "decay": Cell(decay, input=lambda b, n: (2, b, n)),
    "rotation": Cell(rotation, state=lambda b, n: (b, 2, n // 2), input=lambda b, n: (2, b, n // 2), even=True),
    "delta": Cell(delta, state=lambda b, n: (n, b), input=lambda b, n: (n, b + 1)),
}
FEW = ("elementwise", "gated", "pairs", "decay", "rotation", "delta")  # of a few operations a coordinate


def parse(row: str, length: int) -> tuple[str, int, int, int]:
    """Cell, B, n, T of a row such as `gru:16:8` or `gru:16:8:1000`.

    Raises:
        ValueError: it is no such row.
    """
    parts = row.split(":")
    if len(parts) not in (3, 4) or parts[0] not in CELLS or not all(p.isdigit() and int(p) for p in parts[1:]):
        raise ValueError(f"{row!r} is not CELL:B:N[:T] with CELL one of {', '.join(CELLS)} and B, N, T positive integers")
    if CELLS[parts[0]].even and int(parts[2]) % 2:
        raise ValueError(f"{row!r}: coordinates that turn in pairs are even in number")
    return parts[0], int(parts[1]), int(parts[2]), int(parts[3]) if len(parts) == 4 else length


def make(row: str, length: int, seed: int) -> Problem:
    """The problem of a row."""
    name, b, n, length = parse(row, length)
    cell, columns, state, given, _ = CELLS[name]
    keys, weights = jax.random.split(jax.random.key(seed), 5), {}
    if columns:
        wide = {"residual": 1, "ode": 1}.get(name, columns) * n
        weights = {
            "W": 0.9 * jax.random.normal(keys[0], (n,) if name in FEW else (n, wide)) / (1 if name in FEW else n**0.5),
            "U": 0.5 * jax.random.normal(keys[1], (INPUTS, wide)),
            "b": jnp.zeros(wide),
        }
    if name == "pairs":
        del weights["W"]
    if name == "residual":
        weights["V"] = 0.9 * jax.random.normal(keys[4], (n, n)) / n**0.5
    start = jax.random.normal(keys[2], state(b, n))
    return Problem(cell, weights, (start, start) if name == "lstm" else start, jax.random.normal(keys[3], (length, *given(b, n))))


def layer(params: Weights, h: jax.Array) -> jax.Array:
    """A layer of a residual network: h + relu(h W + b) V."""
    return h + jax.nn.relu(h @ params["W"] + params["b"]) @ params["V"]


def network(layers: int, width: int, batch: int, seed: int) -> tuple[Weights, jax.Array]:
    """Stacked parameters of a residual network, so scaled that its states keep their size, and its inputs."""
    keys = jax.random.split(jax.random.key(seed), 3)
    w, v = (jax.random.normal(key, (layers, width, width)) / width**0.5 for key in keys[:2])
    return {"W": w, "b": jnp.zeros((layers, width)), "V": v / layers**0.5}, jax.random.normal(keys[2], (batch, width))


def draw(seed: int, count: int, *, most: float = 1e8) -> list[str]:
    """Rows drawn at random: the cell, B from 1 to 256, n from 2 to 64, T from 64 to 32768, each evenly over powers of two.

    Args:
        most: multiply-adds of a forward pass, about, a tanh counting as 20, above which a row is drawn again.
    """
    random, rows = np.random.default_rng(seed), []
    while len(rows) < count:
        name = str(random.choice(list(CELLS)))
        b, n, length = (round(2 ** random.uniform(lo, hi)) for lo, hi in ((0, 8), (1, 6), (6, 15)))
        n += n % 2
        row, columns = f"{name}:{b}:{n}:{length}", max(CELLS[name].columns, 1)
        if length * b * n * columns * (INPUTS + 20 + (0 if name in FEW else n)) <= most and row not in rows:
            rows.append(row)
    return rows
