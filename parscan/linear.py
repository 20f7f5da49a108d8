"""`linear_scan`: the recurrence whose matrices are given."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from parscan import checks, guard, prefix
from parscan.jacobians import BlockDiagonal, Dense, Diagonal, Jacobian
from parscan.maps import Chain
from parscan.methods import Chunked, Lax, Method, Sequential, Travelling, Tree, Walk, parse_method
from parscan.structure import forms_of
from parscan.sweep import judged, sweep, sweep_on

logger = logging.getLogger("parscan")

_RANK = {Dense: 2, Diagonal: 1, BlockDiagonal: 3}


def linear_scan(A: Jacobian, b: Array, h0: Array, *, reverse: bool = False, method: Method | str = "auto") -> Array:
    """h_i = A_i h_{i-1} + b_i, all i in parallel; differentiable in A, b and h0, in parallel again.

    Args:
        A: real floating-point `Dense` of (L, n, n), `Diagonal` of (L, n) or `BlockDiagonal` of (L, b, m, m) with b·m = n; without the leading L,
            one map shared by all steps.
        b: real floating-point (L, n).
        h0: real floating-point (n,), the value before the first step (after the last one if `reverse`).
        reverse: h_i = A_i h_{i+1} + b_i instead.
        method: `"auto"` (a walk on a CPU, a tree elsewhere), or as for `scan`.

    Returns:
        h_1 … h_L (h_0 … h_{L-1} in reverse, where h_L is the start), (L, n) in the dtype that A, b and h0 promote to, half precision being
        computed in float32.

    Raises:
        TypeError: A is no Jacobian kind; complex or integer arrays.
        ValueError: shapes that do not fit; an unknown method.

    Source: E. Martin, C. Cundy, Parallelizing linear recurrent neural nets over sequence length (ICLR 2018).

    Example:
        >>> parscan.linear_scan(parscan.Diagonal(jnp.full((4, 1), 0.5)), jnp.ones((4, 1)), jnp.zeros(1)).ravel()
        Array([1.   , 1.5  , 1.75 , 1.875], dtype=float32)
    """
    parsed = parse_method(method)
    A, b, h0 = _checked(A, b, h0)
    if b.shape[0] == 0:
        return b
    if b.dtype.itemsize < 4:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (A, b, h0))
        return linear_scan(*wide, reverse=reverse, method=method).astype(b.dtype)
    if isinstance(parsed, Lax):
        data, cross = _entries(A, b.shape[0])
        return prefix.walk((data, b), h0, lambda step, h: cross(step[0], h) + step[1], reverse=reverse)
    assert parsed is None or isinstance(parsed, Travelling)
    sizes = _sized(parsed)
    logger.debug("%s for %d steps of linear_scan, %s: %s", sizes, b.shape[0], type(A).__name__, "asked for" if parsed else "what is given has its structure")
    return _solved(sizes, reverse, A, b, h0)


@partial(jax.jit, static_argnums=(0, 1))
def _solved(method: Travelling, reverse: bool, A: Jacobian, b: Array, h0: Array) -> Array:
    count = b.shape[0]

    def apply(h):
        data, cross = _entries(A, count)
        new = jax.vmap(cross)(data, prefix.entering(h, reverse))
        return prefix.boundaries(prefix.first(h, reverse), prefix.leaving(h, reverse) - new, reverse)

    def solve(transposed, r):
        back = reverse != transposed
        maps, start = A.transpose() if transposed else A, prefix.first(r, back)

        def cross(carry, steps, count):
            (entering, check), offsets = carry, steps[1]
            chain = _chain(maps if _is_shared(A) else steps[0], count)

            def by(method):
                return sweep([chain], entering, [offsets], method, reverse=back)[0]

            if check is None:
                values = by(method)
            else:
                values, check = guard.either(
                    check.again, lambda: sweep_on(chain, entering, offsets, method, check, reverse=back), lambda: (by(Sequential()), check)
                )
            return (prefix.last(values, back), check), values

        def journey(check):
            (_, check), values = prefix.by_segments(cross, (start, check), steps, count, method.segment, reverse=back)
            return values, check

        steps = (None if _is_shared(A) else maps, prefix.leaving(r, back))
        values = judged(method, start, steps[1], journey) if method.cuts([count]) else journey(None)[0]
        return prefix.boundaries(start, values, back)

    h = lax.custom_linear_solve(apply, prefix.boundaries(h0, b, reverse), lambda _, r: solve(False, r), transpose_solve=lambda _, c: solve(True, c))
    return prefix.leaving(h, reverse)


def _entries(A: Jacobian, count: int) -> tuple[Any, Any]:
    """The maps one by one: (data with leading axis L, (one entry, vector) -> vector)."""
    if _is_shared(A):
        return jnp.zeros((count, 0)), lambda _, v: A.apply(v)
    return A, lambda one, v: one.apply(v)


def _chain(A: Jacobian, count: int) -> Chain:
    def forming():
        if _is_shared(A):
            return jnp.zeros((count, 0)), lambda data: jax.tree.map(lambda x: x[None], A)
        return A, lambda some: some

    info = jnp.finfo(jax.tree.leaves(A)[0].dtype)
    rounding = guard.Rounding(float(info.eps), 64 * float(info.tiny))
    return Chain(lambda: _entries(A, count), lambda: _entries(A, count), forming, forms_of(A), _is_shared(A), rounding)


def _is_shared(A: Jacobian) -> bool:
    return jax.tree.leaves(A)[0].ndim == _RANK[type(A)]


def _sized(method: Travelling | None) -> Travelling:
    """There is nothing to form, so a walk needs no segments; and it is the sequential pass itself, so it needs no guard."""
    match method:
        case None if jax.default_backend() != "cpu":
            return Tree()
        case None:
            return Walk(guard=False)
        case Sequential(segment=segment) | Walk(segment=segment):
            return Walk(segment, guard=False)
        case Chunked(size=None):
            return replace(method, size=8)
    return method


def _checked(A: Any, b: Any, h0: Any) -> tuple[Jacobian, Array, Array]:
    if type(A) not in _RANK:
        raise TypeError(
            f"`A` must be parscan.Dense(...), parscan.Diagonal(...) or parscan.BlockDiagonal(...); got {type(A).__name__}. "
            "Wrap the array, e.g. parscan.Dense(A)."
        )
    leaf, *others = jax.tree.leaves(A) or [None]
    if others or not all(map(checks.is_array, (leaf, b, h0))):
        raise TypeError("`A`, `b`, `h0` must be arrays (`A` a kind of Jacobian that holds one); got a list or another object. Use jnp.asarray.")
    for name, x in (("A", leaf), ("b", b), ("h0", h0)):
        if not checks.is_inexact(x) or checks.is_complex(x):
            raise TypeError(
                f"`{name}` must be real floating-point; got {checks.describe(x)}. Cast integers; split complex numbers into real and imaginary parts."
            )
    rank, shape = _RANK[type(A)], checks.shape_of(leaf)
    n = A.size if len(shape) in (rank, rank + 1) else None
    square = rank == 1 or shape[-1:] == shape[-2:-1]
    fits = (
        n is not None
        and square
        and checks.shape_of(b)[1:] == (n,)
        and checks.shape_of(h0) == (n,)
        and (len(shape) == rank or shape[:1] == checks.shape_of(b)[:1])
    )
    if not fits:
        needs = {Dense: "(L, n, n) or (n, n)", Diagonal: "(L, n) or (n,)", BlockDiagonal: "(L, b, m, m) or (b, m, m), n = b·m"}[type(A)]
        raise ValueError(
            f"`A`, `b`, `h0` must have the shapes {needs}, (L, n), (n,); got {shape}, {checks.shape_of(b)}, {checks.shape_of(h0)}. For a batch, use jax.vmap."
        )
    dtype = jnp.result_type(leaf, b, h0)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), A), jnp.asarray(b, dtype), jnp.asarray(h0, dtype)
