"""An elementwise map and one through a bottleneck: residual layers with few hidden units, rank-one updates of a memory. Ranks add in products."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from parscan import exponents
from parscan.jacobians.base import Evidence, Form, Jacobian, balanced_columns, dot, entries_balanced, kind
from parscan.jacobians.dense import Dense
from parscan.jacobians.diagonal import Diagonal


@kind()
class LowRank(Jacobian):
    """diag(d) + U V, with U (..., p, r) and V (..., r, n). The rows of V are held as such, so that a column of J is d_j e_j + U V[:, j].

    Ranks add in products, and a product whose numbers are not fewer than those of the full matrix is a `Dense`. Without d the rank of a product is the
    smaller of the two: a bottleneck that nothing passes by.

    Scaling is exact but for parts that are 2^126 below the largest *part* of their column: d_j, or a column of U times its factor in V. Where large
    parts cancel, what is left is known to their rounding, as in the layer itself.

    Args:
        diagonal: d, floating-point array of shape (..., n), or None for zero; then the map need not be square.
        left: U, floating-point array of shape (..., p, r).
        right: V, floating-point array of shape (..., r, n).

    Example:
        >>> parscan.LowRank(jnp.ones((100, 8)), jnp.ones((100, 8, 2)), jnp.ones((100, 2, 8))).size
        8
    """

    pays_below: ClassVar[float] = 0.75
    must_last: ClassVar[int] = 2
    diagonal: Array | None
    left: Array
    right: Array

    @property
    def rank(self) -> int:
        """r, the width of the bottleneck."""
        return self.left.shape[-1]

    @property
    def size(self) -> int:
        return self.right.shape[-1]

    @property
    def rows(self) -> int:
        return self.left.shape[-2]

    def apply(self, vector: Array) -> Array:
        through = dot(self.left, dot(self.right, vector))
        return through if self.diagonal is None else self.diagonal * vector + through

    def transpose(self) -> LowRank:
        return LowRank(self.diagonal, self.right.swapaxes(-1, -2), self.left.swapaxes(-1, -2))

    def after(self, first: LowRank) -> LowRank | Dense:
        """(D₁ + U₁V₁)(D₂ + U₂V₂) = D₁D₂ + [(D₁ + U₁V₁) U₂, U₁] [V₂; V₁D₂]; without D₁ it is U₁ (V₁ (D₂ + U₂V₂)), without D₂ ((D₁ + U₁V₁) U₂) V₂."""
        if self.diagonal is None and (first.diagonal is not None or self.rank <= first.rank):
            found = LowRank(None, self.left, first.transpose()._columns(self.right.swapaxes(-1, -2)).swapaxes(-1, -2))
        elif first.diagonal is None:
            found = LowRank(None, self._columns(first.left), first.right)
        else:
            assert self.diagonal is not None
            left = _joined(self._columns(first.left), self.left, axis=-1)
            right = _joined(first.right, self.right * first.diagonal[..., None, :], axis=-2)
            found = LowRank(self.diagonal * first.diagonal, left, right)
        return Dense(found.to_dense()) if _fills(found.rank, found.rows, found.size, found.diagonal is not None) else found

    def stackable(self, other: LowRank) -> tuple[LowRank, LowRank] | None:
        """The narrower of two bottlenecks is widened by zeros."""
        if (self.diagonal is None) != (other.diagonal is None):
            return None
        rank = max(self.rank, other.rank)
        return self._widened(rank), other._widened(rank)

    def _widened(self, rank: int) -> LowRank:
        if rank == self.rank:
            return self
        columns, rows = (jnp.zeros(shape, self.left.dtype) for shape in ((self.rows, rank - self.rank), (rank - self.rank, self.size)))
        return LowRank(self.diagonal, _joined(self.left, columns, axis=-1), _joined(self.right, rows, axis=-2))

    def _columns(self, matrix: Array) -> Array:
        """J · matrix."""
        through = _matmul(self.left, _matmul(self.right, matrix))
        return through if self.diagonal is None else self.diagonal[..., :, None] * matrix + through

    def balanced(self) -> tuple[LowRank, Array]:
        return self.shifted(jnp.zeros(self.rows, jnp.int32))

    def shifted(self, rows: Array) -> tuple[LowRank, Array]:
        left, moved = balanced_columns(self.left, rows)
        moved = jnp.where((left == 0).all(-2), exponents.NONE, moved)  # what meets zeros alone has no say in how large its column is
        if self.diagonal is None:
            right, exponent = balanced_columns(self.right, moved)
            return LowRank(None, left, right), exponent
        shift = jnp.broadcast_to(moved[..., :, None], (*moved.shape, self.size))
        parts = _joined(self.right, self.diagonal[..., None, :], axis=-2)
        parts, exponent = entries_balanced(parts, _joined(shift, rows[..., None, :], axis=-2))
        return LowRank(parts[..., -1, :], left, parts[..., :-1, :]), exponent

    def to_dense(self) -> Array:
        through = _matmul(self.left, self.right)
        return through if self.diagonal is None else Diagonal(self.diagonal).to_dense() + through

    @property
    def _stacked(self) -> int:
        """How many maps."""
        leads = [self.left.shape[:-2], self.right.shape[:-2], *([] if self.diagonal is None else [self.diagonal.shape[:-1]])]
        return math.prod(jnp.broadcast_shapes(*leads))

    @property
    def product_flops(self) -> int:
        return self.rank * self.apply_flops + (0 if self.diagonal is None else self._stacked * (self.rank + 1) * self.size)

    @property
    def apply_flops(self) -> int:
        return 2 * self._stacked * _numbers(self.rank, self.rows, self.size, self.diagonal is not None)

    @classmethod
    def of(cls, other: Diagonal) -> LowRank:
        *lead, n = other.diagonal.shape
        return cls(other.diagonal, jnp.zeros((*lead, n, 0), other.diagonal.dtype), jnp.zeros((*lead, 0, n), other.diagonal.dtype))

    @classmethod
    def recognised(cls, evidence: Evidence) -> Form | None:
        p, n = evidence.shape
        return None if evidence.rank is None or _fills(evidence.rank, p, n, p == n) else Form(cls, evidence.shape, None, evidence.rank)

    @classmethod
    def from_factors(cls, diagonal: Array | None, left: Array, right: Array) -> LowRank:
        """From `diagonal` (..., n) and what is pushed and pulled through the bottleneck.

        That is, left (..., r, p) are the images of its basis, right (..., r, n) the gradients of its values.
        """
        return cls(diagonal, left.swapaxes(-1, -2), right)

    @classmethod
    def abstract(cls, form: Form, dtype: Any) -> Any:
        p, n = form.shape
        shapes = [(n,), (form.static, p), (form.static, n)]
        diagonal, left, right = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
        return jax.eval_shape(cls.from_factors, diagonal if p == n else None, left, right)


def _numbers(rank: int, p: int, n: int, diagonal: bool) -> int:
    return rank * (p + n) + (n if diagonal else 0)


def _fills(rank: int, p: int, n: int, diagonal: bool) -> bool:
    """Whether the full matrix has no more numbers."""
    return _numbers(rank, p, n, diagonal) >= p * n


def _matmul(one: Array, other: Array) -> Array:
    return jnp.matmul(one, other, precision=lax.Precision.HIGHEST)


def _joined(one: Array, other: Array, axis: int) -> Array:
    """One beside or above the other; leading axes broadcast."""
    lead = jnp.broadcast_shapes(one.shape[:-2], other.shape[:-2])
    return jnp.concatenate([jnp.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (one, other)], axis=axis)
