"""A grid of recurrences, and how far each method's gradients are from those in double precision.

A problem is a tanh RNN, h' = tanh(h W + x + b), a batch of two states, W scaled to a spectral radius, every state carrying a cotangent.

*At stored states*: a forward pass in the problem's precision stores the states, and there gradients are taken by every method, and in double precision
by a loop of `jax.vjp`, in which nothing of parscan takes part. *Whole*: `jax.grad` through the forward pass, beside the one in double precision. What
separates the two is the *drift*: how far the stored states are from those in double precision. Where it is above `CHAOTIC` no whole gradient means anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import parscan
from parscan import guard

LENGTHS, WIDTHS, RADII, DTYPES = (16, 101, 512, 2048), (1, 2, 5, 8, 16), (0.3, 0.9, 1.0, 1.2, 2.0, 4.0), ("float32", "bfloat16")
BATCH = 2
PARALLEL = ("walk", "tree", "chunked", "associative")
METHODS = ("sequential", *PARALLEL, "auto", "lax")
WHOLE = ("sequential", "walk", "tree", "lax")
PARTS = ("input", "activations", "parameters")
MEDIAN, WORST, ROUNDINGS = 3.0, 10.0, 8.0  # what is asked for: see `violations`
CHAOTIC = 0.1  # a drift beyond which the state has no digit in common with the one in double precision
ORDINARY = 1.2  # radii up to which no guard should find anything


class Shape(NamedTuple):
    """What a compiled program depends on: radii are data."""

    length: int
    width: int
    dtype: str


def layer(p: dict[str, Any], h: Any) -> Any:
    return jnp.tanh(h @ p["W"] + p["x"] + p["b"])


AXES = {"W": None, "b": None, "x": 0}


def problem(shape: Shape, radius: float, seed: int) -> tuple[dict[str, Any], Any, Any]:
    """(parameters, start, the cotangent of every state), in the precision of the problem."""
    length, n, dtype = shape
    random = np.random.default_rng([seed, length, n])
    matrix = random.standard_normal((n, n))
    matrix *= radius / np.abs(np.linalg.eigvals(matrix)).max()
    params = {"W": matrix, "b": 0.1 * random.standard_normal(n), "x": 0.1 * random.standard_normal((length, BATCH, n))}
    rest = 0.5 * random.standard_normal((BATCH, n)), random.standard_normal((length + 1, BATCH, n))
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, *rest))


def double(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


def loop(params: dict[str, Any], start: Any) -> Any:
    """h_0 … h_L."""

    def step(h, x):
        h = layer({**params, "x": x}, h)
        return h, h

    return jnp.concatenate([start[None], lax.scan(step, start, params["x"])[1]])


@jax.jit
def exact(params: dict[str, Any], states: Any, cotangents: Any) -> dict[str, Any]:
    """Gradients at the given states, by one VJP after another in double precision."""
    params, states, cotangents = double((params, states, cotangents))
    shared = {name: params[name] for name in ("W", "b")}

    def back(carry, one):
        g, total = carry
        x, h, c = one
        of_shared, of_x, g = jax.vjp(lambda shared, x, h: layer({**shared, "x": x}, h), shared, x, h)[1](g)
        return (g + c, jax.tree.map(jnp.add, total, of_shared)), (g + c, of_x)

    zero = jax.tree.map(jnp.zeros_like, shared)
    (first, total), (before, of_x) = lax.scan(back, (cotangents[-1], zero), (params["x"], states[:-1], cotangents[:-1]), reverse=True)
    return parts(first, jnp.concatenate([before, cotangents[-1:]]), {**total, "x": of_x})


def parts(of_input: Any, of_activations: Any, of_params: Any) -> dict[str, Any]:
    return dict(zip(PARTS, (of_input, of_activations, of_params), strict=True))


def backward(method: Any) -> Any:
    """Gradients of (parameters, states, cotangents); not compiled."""

    def run(params, states, cotangents):
        found = parscan.parallel_backward(layer, params, states, None, layer_cotangents=cotangents, params_axes=AXES, method=method)
        return parts(found.input, found.activations, found.params)

    return run


def chosen(params: Any, states: Any, cotangents: Any) -> parscan.Method:
    """What `"auto"` takes."""
    some = jax.eval_shape(
        lambda *given: parscan.parallel_backward(layer, *given[:2], None, layer_cotangents=given[2], params_axes=AXES), params, states, cotangents
    )
    return some.plan.method


def probing(run: Any) -> Any:
    """The same with NaN where a guard would apply the steps one after another: bits do not tell, since with and without a guard XLA may round differently."""

    def guarded(values, good, otherwise):
        del otherwise
        return jax.tree.map(lambda value: jnp.where(good, value, jnp.nan), values)

    def repeated(journey, like):
        del like
        return guarded(*journey(jnp.zeros((), bool)), None)

    def probe(*given):
        with mock.patch.multiple(guard, guarded=guarded, repeated=repeated):
            return run(*given)

    return probe


def whole(method: Any) -> Any:
    """Gradients in (parameters, start) through the forward pass, by a method, or with None by `jax.grad` of `lax.scan`; not compiled."""
    states = loop if method is None else lambda params, start: parscan.chain(layer, params_axes=AXES, method=method, return_activations=True)(params, start)[1]
    return jax.grad(lambda params, start, cotangents: jnp.sum((states(params, start) * cotangents).astype(jnp.float64)), (0, 1))


# --- figures ------------------------------------------------------------------------------------------------------------------


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree))))


def distance(got: Any, want: Any) -> float:
    return norm(jax.tree.map(lambda g, w: np.asarray(g, np.float64) - np.asarray(w, np.float64), got, want))


@jax.jit
def _states_in_double(params: Any, start: Any) -> Any:
    return loop(*double((params, start)))


def drift(params: Any, states: Any) -> float:
    """The largest distance of a stored state from the one in double precision, as a share of the largest state's norm."""
    want = np.asarray(_states_in_double(params, states[0]))
    far = np.linalg.norm(np.asarray(states, np.float64) - want, axis=(1, 2))
    return float(far.max() / np.linalg.norm(want, axis=(1, 2)).max())


def measured(shape: Shape, radii: Sequence[float], seed: int = 0, methods: Any = METHODS, whole_by: Sequence[str] = WHOLE) -> list[dict[str, Any]]:
    """For every radius, the errors of every method and what else is to be known of the problem.

    methods: their names, or a dict from a name to a function (parameters, states, cotangents) -> gradients.
    """
    forward, found = jax.jit(loop), []
    run = methods if isinstance(methods, dict) else {name: jax.jit(backward(name)) for name in methods}
    probes = {name: jax.jit(probing(backward(name))) for name in run if name in PARALLEL}
    through = {name: jax.jit(whole(None if name == "lax" else name)) for name in whole_by}
    for radius in radii:
        params, start, cotangents = problem(shape, radius, seed)
        states = forward(params, start)
        given = params, states, cotangents
        want, got = exact(*given), {name: of(*given) for name, of in run.items()}
        errors = {name: {part: distance(got[name][part], want[part]) for part in PARTS} for name in run}
        norms = {part: norm(want[part]) for part in PARTS}
        if through:
            want = jax.jit(whole(None))(*double((params, start, cotangents)))
            norms["whole"] = norm(want)
            for name, of in through.items():
                errors[name]["whole"] = distance(of(params, start, cotangents), want)
        found.append(
            {
                **shape._asdict(),
                "radius": radius,
                "drift": drift(params, states),
                "norms": norms,
                "errors": errors,
                "fell_back": [name for name, of in probes.items() if np.isnan(norm(of(*given)["activations"]))],
                "auto": repr(chosen(*given)),
            }
        )
    return found


def ratios(problems: Iterable[dict[str, Any]], method: str, part: str) -> list[float]:
    """The error of a method over that of the sequential pass, where that one is finite."""
    pairs = [(one["errors"][method][part], one["errors"]["sequential"][part]) for one in problems if np.isfinite(one["errors"]["sequential"][part])]
    return [error / least if least else (1.0 if error == 0 else np.inf) for error, least in pairs]


def excess(one: dict[str, Any], method: str, part: str) -> float:
    """The error of a method as a share of the most that it may be; NaN where the sequential pass itself is not finite."""
    least, size = one["errors"]["sequential"][part], one["norms"][part]
    most = WORST * least + ROUNDINGS * float(jnp.finfo(one["dtype"]).eps) * size
    error = one["errors"][method][part]
    return np.nan if not np.isfinite(least) else np.inf if not np.isfinite(error) else error / most if most else float(error > 0)


def violations(problems: Sequence[dict[str, Any]], method: str, part: str) -> list[str]:
    """Where a method is less exact than asked for: at most 3 times the sequential pass' error in the median, 10 times and 8 roundings at worst."""
    found = [
        f"{method}, {part}: {excess(one, method, part):.1f} of what is allowed at {[one[key] for key in ('length', 'width', 'dtype', 'radius')]}"
        for one in problems
        if excess(one, method, part) > 1
    ]
    median = float(np.median(ratios(problems, method, part)))
    return found + [f"{method}, {part}: {median:.1f} times the sequential error in the median"] * (not median <= MEDIAN)
