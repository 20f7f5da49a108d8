"""`lax.scan` and `parscan.scan` side by side: values, derivatives, dtypes, weak types, structure; and where it fails, the error and its words.

The default run takes all errors and every twelfth of the other cases; `PARSCAN_CONFORMANCE=all`, as in `scripts/conformance.py`, all of them.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import CASES, REFUSED, START, XS, cell
from jax import lax

import parscan

ALL = os.environ.get("PARSCAN_CONFORMANCE") == "all"
CHOSEN = [name for i, name in enumerate(CASES) if ALL or name.startswith("error") or i % 12 == 0]
PARALLEL = "tree"
UNSUPPORTED = {  # by a parallel method: docs/semantics.md
    "transformation: linear_transpose": (AssertionError, None),
    "transformation: out_axes=None for what is not batched": (ValueError, "got axis spec None but output was batched"),
}


class Observed(NamedTuple):
    """What a case gave: the structure of it and its leaves; or the error's type and text."""

    what: Any
    leaves: list


def observe(name: str, scan: Any) -> Observed:
    try:
        leaves, structure = jax.tree.flatten(CASES[name](scan))
    except Exception as error:
        return Observed((type(error), str(error)), [])
    return Observed(structure, [jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a for a in leaves])


by_lax = functools.cache(lambda name: observe(name, lax.scan))


def assert_same(got: Observed, want: Observed) -> None:
    assert got.what == want.what
    kinds = [[(a.shape, a.dtype, getattr(a, "weak_type", False)) for a in leaves] for leaves in (got.leaves, want.leaves)]
    assert kinds[0] == kinds[1]
    rounding = max((float(jnp.finfo(a.dtype).eps) for a in want.leaves if jnp.issubdtype(a.dtype, jnp.inexact)), default=0.0)
    for g, w in zip(got.leaves, want.leaves, strict=True):
        if not jnp.issubdtype(w.dtype, jnp.inexact):
            np.testing.assert_array_equal(g, w)
            continue
        g, w = (np.asarray(a).astype(complex) for a in (g, w))
        np.testing.assert_array_equal(np.isfinite(g), np.isfinite(w))
        g, w = (np.where(np.isfinite(a), a, 0) for a in (g, w))
        assert np.linalg.norm(g - w) <= 32 * rounding * max(np.linalg.norm(w), 1e-3)


@pytest.mark.parametrize("method", ["auto", PARALLEL])
@pytest.mark.parametrize("name", CHOSEN)
def test_like_lax_scan(name, method):
    scan = functools.partial(parscan.scan, method=method)
    if method == PARALLEL and name in REFUSED:
        with pytest.raises(ValueError, match=f"cannot be used for this function: .*{REFUSED[name]}"):
            CASES[name](scan)
    elif method == PARALLEL and name in UNSUPPORTED:
        kind, text = UNSUPPORTED[name]
        with pytest.raises(kind, match=text):
            CASES[name](scan)
    else:
        assert_same(observe(name, scan), by_lax(name))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("error")])
def test_errors_are_errors(name):
    assert isinstance(by_lax(name).what, tuple), "a case that does not fail belongs elsewhere"


def test_there_are_enough_cases_and_none_is_forgotten():
    assert len(CASES) >= 150
    assert not (set(REFUSED) | set(UNSUPPORTED)) - set(CASES)


# --- how often f is traced -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "init, method, times",
    [(START, PARALLEL, 1), (START, "sequential", 1), (START, "auto", 1), (START, "lax", 1), (0.5, PARALLEL, 2), (0.5, "auto", 2), (0.5, "lax", 2)],
)
def test_how_often_f_is_traced(init, method, times):
    """Whatever is done with the scan: derivatives are taken of its program."""
    calls = []

    def f(h, x):
        calls.append(1)
        return jnp.tanh(h * x), h

    xs = (XS if init is START else XS[:, 0]).astype(jnp.float64 if init is START else jnp.float32)
    jax.jit(jax.grad(lambda h: jax.jvp(lambda h: parscan.scan(f, h, xs, method=method)[0].sum(), (h,), (h,))[1]))(init)
    assert len(calls) == times


@pytest.mark.parametrize("run, times", [(lambda f: f, 2), (jax.jit, 1)], ids=["as it stands", "under jit"])
def test_how_often_f_is_traced_with_an_obstacle(run, times):
    calls = []
    run(lambda z: parscan.scan(lambda z, x: (calls.append(1) or z * 1j, x), z, XS)[0])(START + 0j)
    assert len(calls) == times


def test_steps_of_integers_are_traced_once_for_good():
    """As by `lax.scan` itself, which knows a function that it has seen."""
    calls = []

    def count(i, x):
        calls.append(1)
        return i + jnp.int32(1), jnp.sin(x)

    for _ in range(2):
        final, ys = parscan.scan(count, jnp.int32(0), XS)
        assert final == len(XS) and jnp.array_equal(ys, jnp.sin(XS))
    assert len(calls) == 1


# --- what is not used costs nothing ----------------------------------------------------------------------------------------------


def unused(h, x):
    """Beside what is used: an output that is dear."""
    new, (states, sums) = cell(h, x)
    return new, (states, jnp.cos(jnp.outer(new, x) @ jnp.outer(h, x)), sums)


def aside(h, x):
    """Emits what the carry has no part in."""
    new, _ = cell(h, x)
    return new, (new, jnp.sin(x))


def bare(h, x):
    new, (states, _) = cell(h, x)
    return new, (states,)


def flops_of(scan: Any, f: Any, read: Any) -> float:
    gradient = jax.jit(jax.grad(lambda h, xs: read(scan(f, h, xs)), (0, 1)))
    analysis = gradient.lower(START, jnp.concatenate([XS] * 8)).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis).get("flops", 0.0)


READS = {"some ys": lambda out: out[1][0].sum(), "the carry": lambda out: out[0].sum(), "what comes of x alone": lambda out: out[1][1].sum()}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("method", ["sequential", "walk", "tree"])
def test_what_is_not_used_costs_nothing(method, read):
    """Beside a step that never had it; and what does not depend on the carry takes no solve."""
    scan = functools.partial(parscan.scan, method=method)
    if read == "what comes of x alone":
        assert flops_of(scan, aside, READS[read]) <= flops_of(lax.scan, aside, READS[read])
    else:
        assert flops_of(scan, unused, READS[read]) == flops_of(scan, bare, READS[read])
