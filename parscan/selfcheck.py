"""Whether gradients agree on this machine: three small recurrences, by every method, beside `jax.grad` of `jax.lax.scan`. `python -m parscan` shows it."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from parscan.methods import Associative, Chunked, Method, Sequential, Tree, Walk
from parscan.scanning import scan

STEPS, BATCH, WIDTH = 67, 2, 3  # more than a group of a tree by loops, and no multiple of a chunk
FEW = 5  # steps for `Associative`, whose program grows with them: compiling takes most of the time
BUDGET = 10.0  # seconds after which no other gradient is begun
# Without the guard, behind whose fallback a wrong product would hide. What users meet first comes first.
METHODS: dict[str, Method | str] = {
    "auto": "auto",
    "sequential": Sequential(),
    "walk": Walk(guard=False),
    "chunked": Chunked(guard=False),
    "tree": Tree(guard=False),
    "associative": Associative(guard=False),
}
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}  # of norms, where products of matrices have all digits of their dtype


def _gru(w: Any, h: Any, x: Any) -> Any:
    gate = jax.nn.sigmoid(h @ w[0] + x)
    return gate * h + (1 - gate) * jnp.tanh((gate * h) @ w[1] - x)


RECURRENCES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "GRU": _gru,
    "elementwise": lambda w, h, x: jnp.tanh(w[0, 0] * h + x),
    "linear": lambda w, h, x: h @ w[0] + x,
}


class Finding(NamedTuple):
    """What one method gave for one recurrence.

    Attributes:
        recurrence, method: their names.
        gap: norm-relative difference of the gradients, the largest of those in the weights, the first state and the inputs; NaN if there is none.
        tolerance: what it may be at most.
        problem: what was raised; empty if nothing was.
    """

    recurrence: str
    method: str
    gap: float
    tolerance: float
    problem: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the gradients are the same but for rounding."""
        return not self.problem and self.gap <= self.tolerance


def findings(budget: float = BUDGET) -> Iterator[Finding]:
    """Differentiates the recurrences, in JAX's default precision for numbers and the highest for products, and compares as it goes.

    Args:
        budget: seconds after which no other gradient is begun: fewer findings than `len(RECURRENCES) * len(METHODS)` are given then.

    Example:
        >>> from parscan import selfcheck
        >>> [one.agrees for one in selfcheck.findings(budget=0)]
        []
    """
    begun, tolerance = time.perf_counter(), TOLERANCE[jnp.zeros(()).dtype.name]
    wanted: dict[tuple[str, int], Any] = {}
    for called, method in METHODS.items():
        count = FEW if isinstance(method, Associative) else STEPS
        for name, cell in RECURRENCES.items():
            if time.perf_counter() - begun > budget:
                return
            if (name, count) not in wanted:
                wanted[name, count] = _gradient(cell, lax.scan, count)
            try:
                got = _gradient(cell, functools.partial(scan, method=method), count)
                yield Finding(name, called, _gap(got, wanted[name, count]), tolerance)
            except Exception as error:  # a compiler's, too: it is what is looked for
                yield Finding(name, called, math.nan, tolerance, f"{type(error).__name__}: {error}")


def _gradient(cell: Callable, scanned: Callable, count: int) -> Any:
    """In the weights, the first state and the inputs."""
    random = np.random.default_rng(0)
    weights = jnp.asarray(random.standard_normal((3, WIDTH, WIDTH)) / WIDTH**0.5)
    given = weights, jnp.asarray(random.standard_normal((BATCH, WIDTH))), jnp.asarray(random.standard_normal((count, BATCH, WIDTH)))

    def loss(w, start, xs):
        final, states = scanned(lambda h, x: (cell(w, h, x),) * 2, start, xs)
        return jnp.mean(states**2) + jnp.sum(final)

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.grad(loss, (0, 1, 2)))(*given)


def _gap(got: Any, want: Any) -> float:
    gaps = [np.linalg.norm(np.asarray(g) - np.asarray(w)) / np.linalg.norm(np.asarray(w)) for g, w in zip(got, want, strict=True)]
    return float(np.max(gaps))  # NaN if one is
