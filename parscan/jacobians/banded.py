"""Maps whose entries lie near the diagonal: convolutions along a line, one-dimensional simulators. Bandwidths add in products."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from parscan.jacobians.base import Evidence, Form, Index, Jacobian, entries_balanced, kind
from parscan.jacobians.dense import Dense
from parscan.jacobians.diagonal import Diagonal

_GROUP = 16  # terms of a product in one trip of a loop; twice as many are still summed without one, which is faster, but not three times


@kind(static=("bandwidths",))
class Banded(Jacobian):
    """J[i, j] is zero where i - j is not within -upper … lower. Held column by column, so that a column's entries stay together.

    A product whose bytes are not below those of the full matrix is a `Dense`.

    Args:
        diagonals: floating-point array of shape (..., lower + upper + 1, n), with diagonals[k, j] = J[j + k - upper, j], and zero where there is no such row.
        bandwidths: (lower, upper), how many diagonals below and above the main one.

    Example:
        >>> parscan.Banded(jnp.ones((100, 3, 8)), (2, 0)).size
        8
    """

    pays_below: ClassVar[float] = 0.5
    diagonals: Array
    bandwidths: tuple[int, int]

    @property
    def size(self) -> int:
        return self.diagonals.shape[-1]

    def apply(self, vector: Array) -> Array:
        images, upper = self.diagonals * vector[..., None, :], self.bandwidths[1]
        moved = [_padded(images[..., k, :], -1, k - upper, upper - k) for k in range(images.shape[-2])]
        return sum(moved[1:], moved[0])

    def transpose(self) -> Banded:
        lower, upper = self.bandwidths
        return Banded(_sheared(self.diagonals[..., ::-1, :], lower, self.size), (upper, lower))

    def after(self, first: Banded) -> Banded | Dense:
        count, more, n = self.diagonals.shape[-2], first.diagonals.shape[-2], self.size
        if count + more - 1 >= n:
            return Dense(self.to_dense()).after(Dense(first.to_dense()))
        return Banded(_convolved(self, first), (self.bandwidths[0] + first.bandwidths[0], self.bandwidths[1] + first.bandwidths[1]))

    def balanced(self) -> tuple[Banded, Array]:
        mantissa, exponent = entries_balanced(self.diagonals, None)
        return Banded(mantissa, self.bandwidths), exponent

    def shifted(self, rows: Array) -> tuple[Banded, Array]:
        along = jnp.broadcast_to(rows[..., None, :], (*rows.shape[:-1], *self.diagonals.shape[-2:]))
        mantissa, exponent = entries_balanced(self.diagonals, _sheared(along, self.bandwidths[1], self.size))
        return Banded(mantissa, self.bandwidths), exponent

    def to_dense(self) -> Array:
        last_first = self.diagonals[..., ::-1].swapaxes(-1, -2)
        return _sheared(last_first, self.size - 1 - self.bandwidths[1], self.size)[..., ::-1, :].swapaxes(-1, -2)

    @property
    def product_flops(self) -> int:
        return 2 * math.prod(self.diagonals.shape) * self.diagonals.shape[-2]

    @classmethod
    def of(cls, other: Diagonal) -> Banded:
        return cls(other.diagonal[..., None, :], (0, 0))

    @classmethod
    def recognised(cls, evidence: Evidence) -> Form | None:
        p, n = evidence.shape
        if evidence.pattern is None or p != n:
            return None
        lower, upper = evidence.pattern.bandwidths
        count = lower + upper + 1  # columns so far apart have no row in common
        return Form(cls, evidence.shape, Index(np.arange(n) % count), (lower, upper)) if count < n else None

    @classmethod
    def from_images(cls, images: Array, form: Form) -> Banded:
        (lower, upper), columns = form.static, np.arange(form.shape[1])
        rows = columns + np.arange(-upper, lower + 1)[:, None]
        inside = (rows >= 0) & (rows < len(columns))
        assert form.colours is not None
        return cls(jnp.where(inside, images[..., form.colours.values, np.where(inside, rows, 0)], 0), form.static)


def _convolved(second: Banded, first: Banded) -> Array:
    """The diagonals of second · first.

    With A, B and C the diagonals of second, first and the product, C[c, j] = Σ_k A[c - k, j + k - upper] B[k, j]: each term is B's k-th diagonal times
    one window of A, which has zeros all around.
    """
    (lower, upper), more, n = first.bandwidths, first.diagonals.shape[-2], first.size
    count = second.diagonals.shape[-2] + more - 1
    group = more if more <= 2 * _GROUP else _GROUP
    groups = -(-more // group)
    spare = groups * group - more
    weights = _padded(first.diagonals, -2, 0, spare)
    around = _padded(_padded(second.diagonals, -2, more + spare - 1, more - 1), -1, upper, lower + spare)

    def added(g: Any, total: Array) -> Array:
        some = lax.dynamic_slice_in_dim(weights, g * group, group, -2)
        near = lax.dynamic_slice_in_dim(around, (groups - 1 - g) * group, count + group - 1, -2)
        near = lax.dynamic_slice_in_dim(near, g * group, n + group - 1, -1)
        for k in range(group):
            total = total + near[..., group - 1 - k : group - 1 - k + count, k : k + n] * some[..., k : k + 1, :]
        return total

    lead = jnp.broadcast_shapes(second.diagonals.shape[:-2], first.diagonals.shape[:-2])
    nothing = jnp.zeros((*lead, count, n), jnp.result_type(second.diagonals, first.diagonals))
    return added(0, nothing) if groups == 1 else lax.fori_loop(0, groups, added, nothing)


def _padded(x: Array, axis: int, low: int, high: int) -> Array:
    """Zeros before and after; cut off where negative."""
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (low, high, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


def _sheared(x: Array, left: int, width: int) -> Array:
    """Row k moved to the left by k - left: out[k, j] = x[k, j + k - left], zero where there is none; x (..., count, w), the result (..., count, width).

    Read with rows one longer than they are, an array is sheared: nothing is gathered.
    """
    *lead, count, w = x.shape
    length = width + count - 1
    flat = _padded(x, -1, left, length - left - w).reshape(*lead, count * length)
    return _padded(flat, -1, 0, count).reshape(*lead, count, length + 1)[..., :width]
