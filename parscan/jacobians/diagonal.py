"""Elementwise maps, and the map that does nothing."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from parscan import exponents
from parscan.jacobians.base import Evidence, Form, Index, Jacobian, kind


@kind()
class Diagonal(Jacobian):
    """An elementwise map: each coordinate is scaled by itself.

    Args:
        diagonal: floating-point array of shape (..., n).

    Example:
        >>> parscan.Diagonal(jnp.ones((100, 8))).size
        8
    """

    diagonal: Array

    @property
    def size(self) -> int:
        return self.diagonal.shape[-1]

    def apply(self, vector: Array) -> Array:
        return self.diagonal * vector

    def transpose(self) -> Diagonal:
        return self

    def after(self, first: Diagonal) -> Diagonal:
        return Diagonal(self.diagonal * first.diagonal)

    def balanced(self) -> tuple[Diagonal, Array]:
        top = jnp.where(self.diagonal == 0, 0, exponents.exponent(self.diagonal))
        return Diagonal(exponents.scaled(self.diagonal, -top)), top

    def shifted(self, rows: Array) -> tuple[Diagonal, Array]:
        return self, jnp.where(self.diagonal == 0, 0, rows)  # a zero must meet no infinity, whatever follows it has grown to

    def to_dense(self) -> Array:
        return jnp.eye(self.size, dtype=self.diagonal.dtype) * self.diagonal[..., None, :]

    @property
    def product_flops(self) -> int:
        return math.prod(self.diagonal.shape)

    @property
    def apply_flops(self) -> int:
        return math.prod(self.diagonal.shape)

    @classmethod
    def recognised(cls, evidence: Evidence) -> Form | None:
        if evidence.pattern is None or not evidence.pattern.is_diagonal:
            return None
        return Form(cls, evidence.shape, Index(np.zeros(evidence.shape[1])))

    @classmethod
    def from_images(cls, images: Array, form: Form) -> Diagonal:
        return cls(images[..., 0, :])


@kind(static=("n",))
class Identity(Jacobian):
    """The map that changes nothing: it has no numbers, and its products cost none.

    Args:
        n: length of the vectors.

    Example:
        >>> parscan.Identity(3).apply(jnp.ones((100, 3))).shape
        (100, 3)
    """

    n: int

    @property
    def size(self) -> int:
        return self.n

    def apply(self, vector: Array) -> Array:
        return vector

    def transpose(self) -> Identity:
        return self

    def after(self, first: Identity) -> Identity:
        return self

    def balanced(self) -> tuple[Identity, Array]:
        return self, jnp.zeros(self.n, jnp.int32)

    def shifted(self, rows: Array) -> tuple[Identity, Array]:
        return self, rows

    def to_dense(self) -> Array:
        return jnp.eye(self.n, dtype=jnp.float32)

    @property
    def product_flops(self) -> int:
        return 0

    @classmethod
    def recognised(cls, evidence: Evidence) -> Form | None:
        p, n = evidence.shape
        whole = evidence.pattern is not None and evidence.pattern.is_diagonal and evidence.pattern.count == n == p
        return Form(cls, evidence.shape, None) if evidence.moves and whole else None

    @classmethod
    def from_images(cls, images: Array, form: Form) -> Identity:
        return cls(form.shape[1])
