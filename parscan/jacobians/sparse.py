"""Maps with few entries at known places: stencils in several dimensions, pooling, graphs. Products have more entries, until most are there."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from parscan import exponents
from parscan.jacobians.banded import Banded
from parscan.jacobians.base import Evidence, Form, Index, Jacobian, Pattern, kind
from parscan.jacobians.dense import Dense
from parscan.jacobians.diagonal import Diagonal
from parscan.jacobians.permutation import Permutation

_INDEX = 4  # bytes of the int32 column that a sparse format holds with every value


@kind(static=("pattern",))
class Sparse(Jacobian):
    """Values at the entries of a pattern, which is the same for all leading axes.

    A product is a `Dense` where its values, with an int32 index for each, would take as many bytes as the full matrix.

    Sums over entries in a row are sorted segment sums: on a CPU as fast as gathers from rows padded to the longest, and one long row does no harm.

    Args:
        values: floating-point array of shape (..., pattern.count), in the pattern's order.
        pattern: the integers that say where they are, in a (p, n) matrix.

    Example:
        >>> parscan.Sparse(jnp.ones((100, 3)), parscan.Pattern((2, 4), [0, 0, 1], [1, 3, 2])).apply(jnp.ones((100, 4))).shape
        (100, 2)
    """

    pays_below: ClassVar[float] = 1.0
    values: Array
    pattern: Pattern

    @property
    def size(self) -> int:
        return self.pattern.shape[1]

    @property
    def rows(self) -> int:
        return self.pattern.shape[0]

    def apply(self, vector: Array) -> Array:
        return _reduced(jax.ops.segment_sum, self.values * vector[..., self.pattern.columns], self.pattern.rows, self.rows)

    def transpose(self) -> Sparse:
        order, pattern = _transposed(self.pattern)
        return Sparse(self.values[..., order], pattern)

    def after(self, first: Sparse) -> Sparse | Dense:
        pattern, (p, n) = _pattern_after(self.pattern, first.pattern), (self.rows, first.size)
        item = jnp.result_type(self.values, first.values).itemsize
        if pattern.count * (item + _INDEX) >= p * n * item:
            return Dense(self.to_dense()).after(Dense(first.to_dense()))
        mine, others, entries = _pairs(self.pattern, first.pattern)
        return Sparse(_reduced(jax.ops.segment_sum, self.values[..., mine] * first.values[..., others], entries, pattern.count), pattern)

    def balanced(self) -> tuple[Sparse, Array]:
        return self.shifted(jnp.zeros(self.rows, jnp.int32))

    def shifted(self, rows: Array) -> tuple[Sparse, Array]:
        order, by_column = _transposed(self.pattern)
        moved = rows[..., self.pattern.rows]
        top = _reduced(jax.ops.segment_max, (exponents.exponent(self.values) + moved)[..., order], by_column.rows, self.size)
        top = jnp.where(top < exponents.NONE // 2, 0, top)
        return Sparse(exponents.scaled(self.values, moved - top[..., self.pattern.columns]), self.pattern), top

    def to_dense(self) -> Array:
        zeros = jnp.zeros((*self.values.shape[:-1], *self.pattern.shape), self.values.dtype)
        return zeros.at[..., self.pattern.rows, self.pattern.columns].set(self.values, indices_are_sorted=True, unique_indices=True)

    @property
    def nbytes(self) -> int:
        """Bytes of its values, and of an index for each, as `after` weighs them."""
        return math.prod(self.values.shape) * (self.values.dtype.itemsize + _INDEX)

    @property
    def product_flops(self) -> int:
        longest = max(self.pattern.shape)
        pairs = np.bincount(self.pattern.columns, minlength=longest) @ np.bincount(self.pattern.rows, minlength=longest)
        return 2 * math.prod(self.values.shape[:-1]) * int(pairs)

    @classmethod
    def of(cls, other: Diagonal | Permutation | Banded) -> Sparse:
        n, order = other.size, np.arange(other.size)
        if isinstance(other, Diagonal):
            return cls(other.diagonal, Pattern((n, n), order, order))
        if isinstance(other, Permutation):
            return cls(jnp.ones(n, jnp.float32) if other.scale is None else other.scale, Pattern((n, n), order, other.index.values))
        pattern, upper = _band(n, other.bandwidths), other.bandwidths[1]
        return cls(other.diagonals[..., pattern.rows - pattern.columns + upper, pattern.columns], pattern)

    @classmethod
    def recognised(cls, evidence: Evidence) -> Form | None:
        pattern, (p, n) = evidence.pattern, evidence.shape
        if pattern is None or 2 * pattern.count >= p * n:
            return None
        return Form(cls, evidence.shape, Index(pattern.colours), pattern)

    @classmethod
    def from_images(cls, images: Array, form: Form) -> Sparse:
        assert form.colours is not None
        return cls(images[..., form.colours.values[form.static.columns], form.static.rows], form.static)


def _reduced(how: Callable[..., Array], terms: Array, segments: Any, count: int) -> Array:
    """Sums or maxima over runs of equal segments, which are sorted; terms (..., k), the result (..., count)."""
    return jnp.moveaxis(how(jnp.moveaxis(terms, -1, 0), segments.astype(np.int32), count, indices_are_sorted=True), 0, -1)


# --- what follows from the patterns alone -----------------------------------------------------------------------------


_pattern_after = functools.lru_cache(maxsize=1024)(Pattern.after)


@functools.lru_cache(maxsize=1024)
def _transposed(pattern: Pattern) -> tuple[np.ndarray, Pattern]:
    """The entries column by column, and the pattern of the transpose."""
    return np.lexsort((pattern.rows, pattern.columns)), pattern.transpose()


@functools.lru_cache(maxsize=1024)
def _pairs(second: Pattern, first: Pattern) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The terms of a product: an entry of second, one of first, and the entry of the product that theirs is added to. Sorted by the last."""
    starts = np.searchsorted(first.rows, np.arange(second.shape[1] + 1))
    length = np.diff(starts)[second.columns]  # how many entries of first each one of second meets
    mine = np.repeat(np.arange(second.count), length)
    others = np.arange(len(mine)) + np.repeat(starts[second.columns] - (np.cumsum(length) - length), length)
    entries = np.unique(second.rows[mine] * first.shape[1] + first.columns[others], return_inverse=True)[1]
    order = np.argsort(entries, kind="stable")
    return mine[order].astype(np.int32), others[order].astype(np.int32), entries[order].astype(np.int32)


@functools.lru_cache(maxsize=1024)
def _band(n: int, bandwidths: tuple[int, int]) -> Pattern:
    rows, columns = np.indices((n, sum(bandwidths) + 1)).reshape(2, -1)
    columns = rows + columns - bandwidths[0]
    inside = (columns >= 0) & (columns < n)
    return Pattern((n, n), rows[inside], columns[inside])
