"""Powers of two, exactly and in few operations: what keeps long products in range.

`jnp.frexp` and `jnp.ldexp` are right for every subnormal and cost dozens of operations; a tree has one of each at every level. Here
subnormal numbers count as having the smallest normal exponent, and what would come out below it is zero.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

NONE = -(2**30)  # "exponent" of zero: below every sum of exponents that can occur


def exponent(x: Array) -> Array:
    """int32 e with |x| in [2^(e-1), 2^e); `NONE` for zeros.  x: float32 or float64 of any shape."""
    info = jnp.finfo(x.dtype)
    whole = _integer(x.dtype)
    bits = lax.bitcast_convert_type(x, whole) >> info.nmant
    field = (bits & (2**info.nexp - 1)).astype(jnp.int32)
    return jnp.where(x == 0, NONE, field - (info.maxexp - 2))


def scaled(x: Array, e: Array) -> Array:
    """x · 2^e; 0 · 2^e is 0 whatever e.  x: float32 or float64; e: int32, of shapes that broadcast."""
    most = int(jnp.finfo(x.dtype).maxexp) - 1
    # Behind a barrier: of constant exponents XLA would make one factor, c₁ · c₂, which is zero or infinite.
    e = lax.optimization_barrier(jnp.clip(e, -2 * most, 2 * most))
    half = e >> 1
    grown = x * _power(half, x.dtype) * _power(e - half, x.dtype)
    return jnp.where(e < 4 - 2 * most, jnp.zeros_like(x), grown)


def _power(e: Array, dtype) -> Array:
    """2^e for exponents of normal numbers, from its bits."""
    info = jnp.finfo(dtype)
    biased = jnp.maximum(e + (info.maxexp - 1), 0).astype(_integer(dtype))
    return lax.bitcast_convert_type(biased << info.nmant, dtype)


def _integer(dtype):
    return jnp.int32 if jnp.dtype(dtype).itemsize == 4 else jnp.int64
