"""The element every algorithm combines: one affine map, scaled so that long products stay finite.

    v  ->  P (2^e ∘ v) + b

P is a Jacobian kind, b the offset, e an integer exponent for each *contracted* coordinate, i.e. each column of P. The matrices of a long
chain overflow or underflow long before the vectors they are applied to do; with one exponent a column, whatever growth or decay is
aligned with the coordinates is held, every entry down to 2^-126 of its column's largest (2^-1022 in double precision).
A single exponent a matrix is not enough: diag(16, 1)^100 applied to (0, 1) is (0, 1), but scaled by its largest entry the 1 is
flushed to zero. Columns are the right side since `v` enters there; cotangents travel through transposed maps, whose columns are
the rows of the Jacobians.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from parscan import exponents, jacobians, prefix


class Affine(NamedTuple):
    """How a vector crosses one stretch of the chain, in the order of travel."""

    matrix: Any  # a `Jacobian`, or while a chunk is folded, its columns
    exponent: Array | None  # int32 (..., n), or None: all zero, the matrix is a single step's own
    offset: Array  # (..., n)


def apply(crossing: Affine, vector: Array) -> Array:
    """The vector on the other side; vector (..., n)."""
    inner = vector if crossing.exponent is None else exponents.scaled(vector, crossing.exponent)
    return crossing.matrix.apply(inner) + crossing.offset


def then(second: Affine, first: Affine) -> Affine:
    """The single map that crosses `first`, then `second`.

    P₂ 2^e₂ P₁ 2^e₁: 2^e₂ P₁ is rescaled by column before it meets P₂, so nothing overflows on the way, and so is the product.
    """
    outer: Any = scaled(second)
    inner: Any = scaled(first)
    left, right = jacobians.matched(outer.matrix, inner.matrix)
    right, carried = right.shifted_before(left, outer.exponent)
    matrix, exponent = renormalised(jacobians.product(left, right), inner.exponent + carried)
    return Affine(matrix, exponent, apply(second, first.offset))


def renewed(joined: Affine, second: Affine, first: Affine) -> Affine:
    """`then` where only the offsets are others than when the two were joined."""
    return joined._replace(offset=apply(second, first.offset))


def renormalised(matrix: Any, exponent: Array) -> tuple[Any, Array]:
    """The same scaled matrix with every column's largest entry in [1/2, 1)."""
    matrix, grown = matrix.balanced()
    return matrix, exponent + grown


def scaled(crossing: Affine) -> Affine:
    """The same map with its exponents written out."""
    if crossing.exponent is not None:
        return crossing
    matrix, exponent = crossing.matrix.balanced()
    missing = crossing.offset.ndim - exponent.ndim  # leading axes along which all maps are the same
    return Affine(matrix, exponent.reshape((1,) * missing + exponent.shape), crossing.offset)


def one_after_another(first: Affine, second: Affine) -> Affine:
    """Two stacks of maps as one, whatever kinds they are of."""
    a, b = jacobians.alike(first.matrix, second.matrix)
    first, second = prefix.expanded(first._replace(matrix=a)), prefix.expanded(second._replace(matrix=b))
    return jax.tree.map(_stacked, first, second)


def _stacked(a: Array, b: Array) -> Array:
    shape = jnp.broadcast_shapes(a.shape[1:], b.shape[1:])
    return jnp.concatenate([jnp.broadcast_to(a, (a.shape[0], *shape)), jnp.broadcast_to(b, (b.shape[0], *shape))])
