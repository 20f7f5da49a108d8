"""A full matrix: the kind that everything can be written as."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from parscan.jacobians.base import Evidence, Form, Index, Jacobian, balanced_columns, dot, kind


@kind()
class Dense(Jacobian):
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
        return self.matrix.shape[-1]

    @property
    def rows(self) -> int:
        return self.matrix.shape[-2]

    def apply(self, vector: Array) -> Array:
        return dot(self.matrix, vector)

    def transpose(self) -> Dense:
        return Dense(self.matrix.swapaxes(-1, -2))

    def after(self, first: Dense) -> Dense:
        return Dense(jnp.matmul(self.matrix, first.matrix, precision=lax.Precision.HIGHEST))

    def balanced(self) -> tuple[Dense, Array]:
        mantissa, exponent = balanced_columns(self.matrix, None)
        return Dense(mantissa), exponent

    def shifted(self, rows: Array) -> tuple[Dense, Array]:
        mantissa, exponent = balanced_columns(self.matrix, rows)
        return Dense(mantissa), exponent

    def to_dense(self) -> Array:
        return self.matrix

    @property
    def product_flops(self) -> int:
        return 2 * math.prod(self.matrix.shape) * self.rows

    @classmethod
    def recognised(cls, evidence: Evidence) -> Form:
        return Form(cls, evidence.shape, Index(np.arange(evidence.shape[1])))

    @classmethod
    def from_images(cls, images: Array, form: Form) -> Dense:
        return cls(images.swapaxes(-1, -2))
