"""Recurrences whose products of Jacobians leave what a precision can hold, although every vector and every single Jacobian is held.

Of each, the gradient in the initial state and in the inputs, and the tangent of the last state: by every method, beside `lax.scan`. Single precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from support import LOG_DEPTH

import parscan

METHODS = {**LOG_DEPTH, "walk": parscan.Walk()}
MODES = ("grad", "jvp")


class Case(NamedTuple):
    """(step, inputs, start, which is the tangent, too, what is read of the last state).

    chaotic: two ways to round have no digit in common, and only finiteness is compared.
    """

    step: Callable[[Any, Any], Any]
    xs: Any
    start: Any
    read: Any
    chaotic: bool = False


def single(x: Any) -> Any:
    return jnp.asarray(x, jnp.float32)


# --- linear: one step for all, so that cases of one shape are one compilation ------------------------------------------------


def times(h: Any, m: Any) -> Any:
    return m @ h


def product(matrices: Any, start: tuple[float, ...], read: tuple[float, ...]) -> Case:
    return Case(times, single(np.asarray(matrices)), single(start), single(read))


def repeated(matrix: Any, count: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(matrix, float), (count, *np.shape(matrix)))


def in_turn(one: Any, other: Any, count: int) -> np.ndarray:
    return np.stack([np.asarray((one, other)[i % 2], float) for i in range(count)])


def turned(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


EXPANSION = 2 * np.linalg.qr(np.random.default_rng(0).standard_normal((120, 3, 3)))[0]
SLANTED = [[1.269110083580017, 0.09942018985748291], [0.2691100835800171, 1.099420189857483]]  # (1, -1) times it is (1, -1), (1, 1) grows
FAR_APART = np.diag([1e15, 1e-15]) @ turned(0.3) @ np.diag([1e-15, 1e15])
LINEAR = {
    "growth into one axis, read on the other": product(repeated([[16, 1], [0, 1]], 128), (0.0, 0.0), (0.0, 1.0)),
    "growth out of one axis": product(repeated([[16, 0], [1, 1]], 128), (0.0, 1.0), (1.0, 1.0)),
    "growth along one axis": product(repeated(np.diag([16, 1]), 128), (0.0, 1.0), (0.0, 1.0)),
    "steps of 1e20 and 1e-20": product(in_turn(np.diag([1e20, 1e-20]), np.diag([1e-20, 1e20]), 128), (1.0, 1.0), (1.0, 1.0)),
    "the same, an odd number": product(in_turn(np.diag([1e20, 1e-20]), np.diag([1e-20, 1e20]), 127), (1.0, 1.0), (1e-10, 1e-10)),
    "steps of 1e30 and 1e-30": product(in_turn(1e30 * turned(1.0), 1e-30 * turned(0.3), 128), (1.0, 1.0), (1.0, 1.0)),
    "coordinates of 1e30 and 1": product(repeated(FAR_APART, 128), (1e15, 1e-15), (1e-15, 1e15)),
    "a vector of 1e30": product(repeated(turned(0.3), 128), (1e30, -1e30), (1e-30, 1e-30)),
    "a vector of 1e-30": product(repeated(turned(0.3), 128), (1e-30, -1e-30), (1e30, 1e30)),
    "denormal steps": product(in_turn(2e-39 * turned(0.3), 3e38 * turned(1.0) / 2, 128), (1e20, 1e20), (1e-20, 1e-20)),
    "a denormal vector": product(repeated(turned(0.3), 128), (1e-40, 1e-39), (1e-40, 1e-42)),
    "contraction to nothing": product(repeated(np.diag([1e-3, 0.25]), 128), (1.0, 1.0), (1.0, 1.0)),
    "expansion of a tiny vector": product(EXPANSION, (1e-30, 1e-31, -1e-30), (1e-30, 1e-30, 1e-31)),
    "exactly singular": product(repeated([[1, 1], [1, 1]], 127), (1.0, -1.0), (1.0, -1.0)),
    "zero": product(repeated(np.zeros((2, 2)), 128), (1.0, 1.0), (1.0, 1.0)),
    "growth along no axis": product(repeated(SLANTED, 64), (1.0, -1.0), (1.0, -1.0)),
    "permutation": product(repeated(np.roll(np.eye(5), 1, 0), 101), (1.0, 2.0, 3.0, 4.0, 5.0), (1.0, 0.0, 0.0, 0.0, 7.0)),
}

# --- others --------------------------------------------------------------------------------------------------------------------


def lorenz(h: Any, x: Any) -> Any:
    """One step of Runge and Kutta's, 0.01 long."""
    slope = lambda v: jnp.stack([10 * (v[1] - v[0]), v[0] * (28 - v[2]) - v[1], v[0] * v[1] - single(8 / 3) * v[2]])
    a = slope(h)
    b = slope(h + single(0.005) * a)
    c = slope(h + single(0.005) * b)
    return h + single(0.01 / 6) * (a + 2 * b + 2 * c + slope(h + single(0.01) * c)) + x


def parting(h: Any, x: Any) -> Any:
    """Positions and velocities of four bodies after a short time. Forces cancel in pairs, and so do their slopes, exactly: the momentum stays, whatever grows."""
    apart = h[0][:, None] - h[0]
    faster = h[1] + single(0.1) * (jnp.sin(3 * apart) + apart).sum(1)
    return jnp.stack([h[0] + single(0.1) * faster, faster]) + x


MIXING = single([[0.6, -0.8], [0.8, 0.6]])
FLAGS = single(np.resize([1, 1, -1], 37))  # which steps are real; the others are padding, or take the other branch
OTHERS = {
    "Lorenz, 2000 steps": Case(lorenz, single(np.zeros((2000, 3))), single([1, 1, 1]), single([1, 1, 1]), chaotic=True),
    "momentum of bodies that part": Case(
        parting, single(np.zeros((128, 2, 1))), single([[0.1, -0.4, 0.33, 0.72], [0.1, 0.2, -0.3, 0.05]]), single([[0, 0, 0, 0], [1, 1, 1, 1]])
    ),
    "logistic map": Case(lambda h, x: 4 * h * (1 - h) + x, single(np.zeros((100, 2))), single([0.3, 0.4]), single([1, 1]), chaotic=True),
    "saturated tanh": Case(lambda h, x: jnp.tanh(200 * (MIXING @ h) + x), single(np.full((37, 2), 90.0)), single([1, 1]), single([1, 1])),
    "saturated gates": Case(
        lambda h, x: jax.nn.sigmoid(x) * (MIXING @ h) + jax.nn.sigmoid(-x) * jnp.tanh(h),
        single(np.resize([[200, 200], [-200, 200]], (37, 2))),
        single([1, 1]),
        single([1, 1]),
    ),
    "padding that holds infinities": Case(
        lambda h, x: jnp.where(x[0] > 0, jnp.tanh(MIXING @ h + x[1]), h),
        (FLAGS, single(np.where(FLAGS > 0, 0.1, np.inf))),
        single([1, 1]),
        single([1, 1]),
    ),
    "an infinite slope that is masked": Case(
        lambda h, x: jnp.where(x[0] > 0, jnp.tanh(MIXING @ h + x[1]), jnp.sqrt(h - lax.stop_gradient(h))),
        (jnp.ones(37, jnp.float32), single(np.full(37, 0.1))),
        single([1, 1]),
        single([1, 1]),
    ),
    "infinities in the branch not taken": Case(
        lambda h, x: lax.cond(
            x[0] > 0, lambda h, w: jnp.tanh(MIXING @ h + w), lambda h, w: w * jnp.sqrt(h - lax.stop_gradient(h)) + jnp.exp(1e4 * (2 + h)), h, x[1]
        ),
        (jnp.ones(37, jnp.float32), single(np.full(37, 0.1))),
        single([1, 1]),
        single([1, 1]),
    ),
}
CASES: dict[str, Case] = LINEAR | OTHERS


@functools.cache
def _compiled(step: Callable, method: str | None) -> Callable:
    """Of (inputs, start, read): once for all cases of one step and shape. `lax.scan` where there is no method."""
    scan = lax.scan if method is None else functools.partial(parscan.scan, method=METHODS[method])
    last = lambda start, xs: scan(lambda h, x: (step(h, x), None), start, xs)[0]

    def run(xs, start, read):
        still = jnp.zeros_like(start) if step is times else start  # of a linear chain the state plays no part in the derivative, and may overflow
        gradient = jax.grad(lambda start, xs: jnp.vdot(read, last(start, xs)), (0, 1))(still, xs)
        return {"grad": gradient, "jvp": jax.jvp(lambda h: last(h, xs), (still,), (start,))[1]}

    return jax.jit(run)


def derivatives(name: str, method: str | None) -> dict[str, Any]:
    """By mode; `lax.scan`'s where there is no method."""
    case = CASES[name]
    return _compiled(case.step, method)(case.xs, case.start, case.read)


def missing(name: str, method: str, mode: str) -> int:
    """How many numbers are not finite that are so in `lax.scan`."""
    pairs = zip(*(jax.tree.leaves(derivatives(name, one)[mode]) for one in (method, None)), strict=True)
    return sum(int(np.sum(np.isfinite(want) & ~np.isfinite(got))) for got, want in pairs)


def gap(name: str, method: str, mode: str) -> float:
    """The largest difference to `lax.scan`, as a share of a leaf's norm, of the numbers that are finite there; below the smallest normal number all is zero."""

    def one(got, want):
        got, want = (np.asarray(x, np.float64)[np.isfinite(want)] for x in (got, want))
        size = np.linalg.norm(want)
        far = np.linalg.norm(got - want)
        return 0.0 if far <= np.finfo(np.float32).tiny * np.sqrt(want.size) else far / size if size else np.inf

    return float(np.max(jax.tree.leaves(jax.tree.map(one, derivatives(name, method)[mode], derivatives(name, None)[mode]))))
