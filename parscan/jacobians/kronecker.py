"""Maps that act on a matrix from its left and its right."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from parscan.jacobians.base import UNROLLED, Evidence, Form, Jacobian, balanced_columns, kind
from parscan.jacobians.dense import Dense

_DEAD = -(2**20)  # exponent of a factor's column of zeros: whatever the other factor's column has grown to, no infinity is to meet these zeros


@kind()
class Kronecker(Jacobian):
    """H -> R ∘ (A (C ∘ H) Bᵀ) on raveled matrices: diag(R) (A ⊗ B) diag(C). With σ' in the place of R it is the derivative of σ(A H Bᵀ).

    Two with no scale in between multiply factor by factor; any other product is a `Dense`.

    Args:
        left: A, floating-point array of shape (..., p₁, q₁).
        right: B, floating-point array of shape (..., p₂, q₂); it acts on vectors of length n = q₁ q₂, which are H row by row.
        row_scale: R, raveled, floating-point of shape (..., p₁ p₂), or None for ones.
        column_scale: C, raveled, floating-point of shape (..., n), or None for ones.

    Example:
        >>> parscan.Kronecker(jnp.ones((100, 3, 3)), jnp.ones((100, 4, 4))).size
        12
    """

    shifts_freely: ClassVar[bool] = False
    pays_below: ClassVar[float] = 0.25
    left: Array
    right: Array
    row_scale: Array | None = None
    column_scale: Array | None = None

    @property
    def size(self) -> int:
        return self.left.shape[-1] * self.right.shape[-1]

    @property
    def rows(self) -> int:
        return self.left.shape[-2] * self.right.shape[-2]

    def apply(self, vector: Array) -> Array:
        vector = vector if self.column_scale is None else self.column_scale * vector
        matrix = vector.reshape(*vector.shape[:-1], self.left.shape[-1], self.right.shape[-1])
        matrix = _matmul(_matmul(self.left, matrix), self.right.swapaxes(-1, -2))
        image = matrix.reshape(*matrix.shape[:-2], self.rows)
        return image if self.row_scale is None else self.row_scale * image

    def transpose(self) -> Kronecker:
        return Kronecker(self.left.swapaxes(-1, -2), self.right.swapaxes(-1, -2), self.column_scale, self.row_scale)

    def paired(self, first: Kronecker) -> tuple[Any, Any]:
        """With a scale in between, or matrices that are cut otherwise, the product is no Kronecker product, nor are the exponents in between separable.

        Full matrices are multiplied faster than many small ones, whatever the arithmetic.
        """
        fit = self.column_scale is None and first.row_scale is None and self.left.shape[-1] == first.left.shape[-2]
        return (self, first) if fit else (Dense(self.to_dense()), Dense(first.to_dense()))

    def after(self, first: Kronecker) -> Kronecker | Dense:
        own, other = self.paired(first)
        if isinstance(other, Dense):
            return own.after(other)
        return Kronecker(_matmul(self.left, first.left), _matmul(self.right, first.right), self.row_scale, first.column_scale)

    def stackable(self, other: Kronecker) -> tuple[Kronecker, Kronecker] | None:
        """If the matrices are of the same sizes."""
        own, others = ((one.left.shape[-2:], one.right.shape[-2:]) for one in (self, other))
        return super().stackable(other) if own == others else None

    def balanced(self) -> tuple[Kronecker, Array]:
        """Separable exponents, e[i] + f[j], but for the scale of the columns, which no `shifted` meets. The scale of the rows is balanced as a whole."""
        return self._balanced(None, None)

    def shifted(self, rows: Array) -> tuple[Kronecker, Array]:
        """For rows that are separable: the exponents of another, between which and this one there is no scale."""
        apart = rows.reshape(*rows.shape[:-1], self.left.shape[-2], self.right.shape[-2])
        return self._balanced(apart[..., :, 0], apart[..., 0, :] - apart[..., 0, :1])

    def _balanced(self, left_rows: Array | None, right_rows: Array | None) -> tuple[Kronecker, Array]:
        left, e = _columns(self.left, left_rows)
        right, f = _columns(self.right, right_rows)
        exponent = (e[..., :, None] + f[..., None, :]).reshape(*jnp.broadcast_shapes(e.shape[:-1], f.shape[:-1]), self.size)
        row_scale, column_scale = self.row_scale, self.column_scale
        if row_scale is not None:
            whole, top = balanced_columns(row_scale[..., :, None], None)
            row_scale, exponent = whole[..., 0], exponent + top
        if column_scale is not None:
            each, tops = _columns(column_scale[..., None, :], None)
            column_scale, exponent = each[..., 0, :], exponent + tops
        return Kronecker(left, right, row_scale, column_scale), exponent

    def to_dense(self) -> Array:
        # By products with an identity: as A[i, k] B[j, l], reshaped, it would be fused into what reads it, index by index, and take several times as long.
        q, s = self.left.shape[-1], self.right.shape[-1]
        half = jnp.matmul(self.left, jnp.eye(q * s, dtype=self.left.dtype).reshape(q, s * q * s), precision=lax.Precision.HIGHEST)
        half = half.reshape(*half.shape[:-1], s, q * s)
        matrix = jnp.matmul(self.right[..., None, :, :], half, precision=lax.Precision.HIGHEST)
        matrix = matrix.reshape(*matrix.shape[:-3], self.rows, self.size)
        matrix = matrix if self.row_scale is None else self.row_scale[..., :, None] * matrix
        return matrix if self.column_scale is None else matrix * self.column_scale[..., None, :]

    @property
    def product_flops(self) -> int:
        if self.row_scale is not None or self.column_scale is not None:
            return 2 * self._stacked * self.rows**2 * self.size
        return sum(2 * math.prod(factor.shape) * factor.shape[-2] for factor in (self.left, self.right))

    @property
    def _scales(self) -> list[Array]:
        return [scale for scale in (self.row_scale, self.column_scale) if scale is not None]

    @property
    def _stacked(self) -> int:
        """How many maps."""
        return math.prod(jnp.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2], *(scale.shape[:-1] for scale in self._scales)))

    @property
    def apply_flops(self) -> int:
        (p, q), (r, s) = self.left.shape[-2:], self.right.shape[-2:]
        return self._stacked * (2 * p * q * s + 2 * p * s * r + sum(scale.shape[-1] for scale in self._scales))

    @classmethod
    def recognised(cls, evidence: Evidence) -> Form | None:
        return None if evidence.factors is None else Form(cls, evidence.shape, None, (evidence.factors, evidence.scaled))

    @classmethod
    def abstract(cls, form: Form, dtype: Any) -> Kronecker:
        (left, right), scaled = form.static
        shapes = [left, right, *([(form.shape[0],)] if scaled else [])]
        return cls(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))  # pyright: ignore[reportArgumentType]


def _matmul(one: Array, other: Array) -> Array:
    if one.shape[-1] <= UNROLLED and other.shape[-1] <= UNROLLED:
        return (one[..., :, :, None] * other[..., None, :, :]).sum(-2)
    return jnp.matmul(one, other, precision=lax.Precision.HIGHEST)


def _columns(factor: Array, rows: Array | None) -> tuple[Array, Array]:
    mantissa, top = balanced_columns(factor, rows)
    return mantissa, jnp.where((mantissa == 0).all(-2), _DEAD, top)
