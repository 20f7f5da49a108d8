"""Kinds of Jacobian: how a linear map is stored, applied and multiplied.

Every kind acts on raveled vectors of shape (..., n); leading axes are independent maps (the steps of a chain). Matrices and blocks need
not be square where layers change the width: then vectors of length n become vectors of length p. Products are
taken at the highest precision the device has, since a long chain compounds what each product loses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from parscan import exponents

_UNROLLED = 8  # up to this size XLA's fused multiply-and-sum beats a call to a GEMM of tiny matrices


def _register(cls):
    (field,) = cls.__dataclass_fields__
    return jax.tree_util.register_dataclass(cls, data_fields=[field], meta_fields=[])


def _dot(matrix: Array, vector: Array) -> Array:
    """(..., p, n) times (..., n)."""
    if matrix.shape[-1] <= _UNROLLED:
        return (matrix * vector[..., None, :]).sum(-1)
    return jnp.einsum("...ij,...j->...i", matrix, vector, precision=lax.Precision.HIGHEST)


def _balanced(matrix: Array, rows: Array | None) -> tuple[Array, Array]:
    """2^rows · matrix as (mantissa, e), with mantissa · 2^e and every column's largest entry in [1/2, 1).

    matrix (..., p, n), rows int32 (..., p) or None, e int32 (..., n). Exact, but for entries 2^126 below their column's largest.
    """
    each = exponents.exponent(matrix) if rows is None else exponents.exponent(matrix) + rows[..., :, None]
    top = each.max(-2)
    top = jnp.where(top < exponents.NONE // 2, 0, top)
    shift = -top[..., None, :] if rows is None else rows[..., :, None] - top[..., None, :]
    return exponents.scaled(matrix, shift), top


@_register
@dataclass(frozen=True)
class Dense:
    """A full matrix a step.

    Args:
        matrix: floating-point array of shape (..., n, n), or (..., p, n).

    Example:
        >>> parscan.Dense(jnp.ones((100, 3, 3))).size
        3
    """

    matrix: Array

    @property
    def size(self) -> int:
        """n, the length of the vectors it acts on."""
        return self.matrix.shape[-1]

    def apply(self, vector: Array) -> Array:
        """J v; vector (..., n)."""
        return _dot(self.matrix, vector)

    def transpose(self) -> Dense:
        """Jᵀ."""
        return Dense(self.matrix.swapaxes(-1, -2))

    def after(self, first: Dense) -> Dense:
        """The product self · first: `first` is applied first."""
        return Dense(jnp.matmul(self.matrix, first.matrix, precision=lax.Precision.HIGHEST))

    def balanced(self) -> tuple[Dense, Array]:
        """J as a mantissa and one exponent a column, int32 (..., n)."""
        mantissa, exponent = _balanced(self.matrix, None)
        return Dense(mantissa), exponent

    def shifted(self, rows: Array) -> tuple[Dense, Array]:
        """2^rows · J, balanced anew; rows int32 (..., p), exponents int32 (..., n)."""
        mantissa, exponent = _balanced(self.matrix, rows)
        return Dense(mantissa), exponent

    def to_dense(self) -> Array:
        """The full matrix, (..., p, n)."""
        return self.matrix

    @classmethod
    def from_columns(cls, columns: Array, blocks: int = 1) -> Dense:
        """From the images of the basis: columns[..., k, :] = J e_k."""
        return cls(columns.swapaxes(-1, -2))


@_register
@dataclass(frozen=True)
class BlockDiagonal:
    """Equal blocks along the diagonal: a batch of states that do not mix.

    Args:
        blocks: floating-point array of shape (..., b, m, m), or (..., b, q, m); it acts on vectors of length n = b·m, block after block.

    Example:
        >>> parscan.BlockDiagonal(jnp.ones((100, 4, 3, 3))).size
        12
    """

    blocks: Array

    @property
    def size(self) -> int:
        """n = b·m, the length of the vectors it acts on."""
        return self.blocks.shape[-3] * self.blocks.shape[-1]

    def _split(self, vector: Array) -> Array:
        b = self.blocks.shape[-3]
        return vector.reshape(*vector.shape[:-1], b, vector.shape[-1] // b)

    def _joined(self, vector: Array) -> Array:
        return vector.reshape(*vector.shape[:-2], vector.shape[-2] * vector.shape[-1])

    def apply(self, vector: Array) -> Array:
        """J v; vector (..., n)."""
        return self._joined(_dot(self.blocks, self._split(vector)))

    def transpose(self) -> BlockDiagonal:
        """Jᵀ."""
        return BlockDiagonal(self.blocks.swapaxes(-1, -2))

    def after(self, first: BlockDiagonal) -> BlockDiagonal:
        """The product self · first: `first` is applied first."""
        return BlockDiagonal(jnp.matmul(self.blocks, first.blocks, precision=lax.Precision.HIGHEST))

    def balanced(self) -> tuple[BlockDiagonal, Array]:
        """J as a mantissa and one exponent a column, int32 (..., n)."""
        mantissa, exponent = _balanced(self.blocks, None)
        return BlockDiagonal(mantissa), self._joined(exponent)

    def shifted(self, rows: Array) -> tuple[BlockDiagonal, Array]:
        """2^rows · J, balanced anew; rows int32 (..., p), exponents int32 (..., n)."""
        mantissa, exponent = _balanced(self.blocks, self._split(rows))
        return BlockDiagonal(mantissa), self._joined(exponent)

    def to_dense(self) -> Array:
        """The full matrix, (..., p, n)."""
        b, q, m = self.blocks.shape[-3:]
        full = jnp.eye(b, dtype=self.blocks.dtype)[:, None, :, None] * self.blocks[..., :, :, None, :]
        return full.reshape(*self.blocks.shape[:-3], b * q, b * m)

    @classmethod
    def from_columns(cls, columns: Array, blocks: int) -> BlockDiagonal:
        """From the images of the m vectors that are e_k in every one of b blocks at once: columns (..., m, b·q)."""
        apart = columns.reshape(*columns.shape[:-1], blocks, columns.shape[-1] // blocks)
        return cls(jnp.moveaxis(apart, -3, -1))


@_register
@dataclass(frozen=True)
class Diagonal:
    """An elementwise map.

    Args:
        diagonal: floating-point array of shape (..., n).

    Example:
        >>> parscan.Diagonal(jnp.ones((100, 8))).size
        8
    """

    diagonal: Array

    @property
    def size(self) -> int:
        """n, the length of the vectors it acts on."""
        return self.diagonal.shape[-1]

    def apply(self, vector: Array) -> Array:
        """J v; vector (..., n)."""
        return self.diagonal * vector

    def transpose(self) -> Diagonal:
        """Jᵀ = J."""
        return self

    def after(self, first: Diagonal) -> Diagonal:
        """The product self · first."""
        return Diagonal(self.diagonal * first.diagonal)

    def balanced(self) -> tuple[Diagonal, Array]:
        """J as a mantissa and one exponent an entry, int32 (..., n)."""
        top = jnp.where(self.diagonal == 0, 0, exponents.exponent(self.diagonal))
        return Diagonal(exponents.scaled(self.diagonal, -top)), top

    def shifted(self, rows: Array) -> tuple[Diagonal, Array]:
        """2^rows · J for a J that is balanced: as balanced as it was; rows and exponents int32 (..., n)."""
        return self, rows

    def to_dense(self) -> Array:
        """The full matrix, (..., n, n)."""
        return jnp.eye(self.size, dtype=self.diagonal.dtype) * self.diagonal[..., None, :]

    @classmethod
    def from_columns(cls, columns: Array, blocks: int = 1) -> Diagonal:
        """From the image of the vector of ones: columns (..., 1, n)."""
        return cls(columns[..., 0, :])


Jacobian = Dense | BlockDiagonal | Diagonal


def basis(blocks: int, width: int, dtype: Any) -> Array:
    """The `width` vectors that are e_k in every block at once, (width, blocks · width): their images are a Jacobian's columns."""
    return jnp.tile(jnp.eye(width, dtype=dtype), (1, blocks))
