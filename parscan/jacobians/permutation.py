"""Maps with at most one entry in every row and column: coordinates are moved and scaled."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from parscan import exponents
from parscan.jacobians.base import Evidence, Form, Index, Jacobian, kind
from parscan.jacobians.diagonal import Diagonal


@kind(static=("index",))
class Permutation(Jacobian):
    """(J v)[i] = scale[i] v[index[i]]: a permutation, times an elementwise map if there is one. Closed under product, at the cost of an elementwise map.

    Args:
        index: integers (n,), for every coordinate of the result the one it is taken from: a permutation of 0 … n - 1; held as a
            `parscan.jacobians.Index`.
        scale: floating-point array of shape (..., n), or None for ones.

    Example:
        >>> parscan.Permutation([2, 0, 1]).apply(jnp.arange(3.0))
        Array([2., 0., 1.], dtype=float32)
    """

    index: Any
    scale: Array | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.index, Index):
            object.__setattr__(self, "index", Index(self.index))

    @property
    def _back(self) -> np.ndarray:
        return np.argsort(self.index.values)

    @property
    def size(self) -> int:
        return len(self.index.values)

    def apply(self, vector: Array) -> Array:
        moved = vector[..., self.index.values]
        return moved if self.scale is None else self.scale * moved

    def transpose(self) -> Permutation:
        return Permutation(self._back, None if self.scale is None else self.scale[..., self._back])

    def after(self, first: Permutation) -> Permutation:
        inner = None if first.scale is None else first.scale[..., self.index.values]
        scales = [scale for scale in (self.scale, inner) if scale is not None]
        return Permutation(first.index.values[self.index.values], scales[0] * scales[1] if len(scales) == 2 else scales[0] if scales else None)

    def balanced(self) -> tuple[Permutation, Array]:
        if self.scale is None:
            return self, jnp.zeros(self.size, jnp.int32)
        top = jnp.where(self.scale == 0, 0, exponents.exponent(self.scale))
        return Permutation(self.index, exponents.scaled(self.scale, -top)), top[..., self._back]

    def shifted(self, rows: Array) -> tuple[Permutation, Array]:
        kept = rows if self.scale is None else jnp.where(self.scale == 0, 0, rows)
        return self, kept[..., self._back]

    def to_dense(self) -> Array:
        matrix = jnp.eye(self.size, dtype=jnp.float32)[self.index.values]
        return matrix if self.scale is None else self.scale[..., :, None] * matrix.astype(self.scale.dtype)

    @property
    def product_flops(self) -> int:
        return 0 if self.scale is None else self.scale.size

    @property
    def apply_flops(self) -> int:
        return self.product_flops

    @classmethod
    def of(cls, other: Diagonal) -> Permutation:
        return cls(np.arange(other.size), other.diagonal)

    @classmethod
    def recognised(cls, evidence: Evidence) -> Form | None:
        pattern, (p, n) = evidence.pattern, evidence.shape
        if pattern is None or p != n or len(set(pattern.rows)) < pattern.count or len(set(pattern.columns)) < pattern.count:
            return None
        if evidence.moves and pattern.count == n:
            return Form(cls, evidence.shape, None, Index(pattern.columns))
        index = np.full(n, -1)
        index[pattern.rows] = pattern.columns
        index[index < 0] = np.setdiff1d(np.arange(n), index)  # rows and columns without an entry: paired, scaled by the zeros that are found
        return Form(cls, evidence.shape, Index(np.zeros(n)), Index(index))

    @classmethod
    def from_images(cls, images: Array, form: Form) -> Permutation:
        return cls(form.static, None if form.colours is None else images[..., 0, :])
