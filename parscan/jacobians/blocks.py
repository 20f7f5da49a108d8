"""Maps that fall apart: into blocks of one kind and size, and into parts of several kinds and sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from parscan.jacobians.base import Jacobian, kind
from parscan.jacobians.dense import Dense
from parscan.jacobians.diagonal import Diagonal
from parscan.jacobians.products import matched, product


@kind(static=("counts",))
class BlockDiagonal(Jacobian):
    """Equal blocks along the diagonal: a batch of states that do not mix.

    Args:
        blocks: floating-point array of shape (..., b, m, m), or (..., b, q, m); it acts on vectors of length n = b·m, block after block. Or blocks of
            another kind, stacked along its last leading axes.
        counts: how many blocks, along each of those axes; an axis of length 1 in `blocks` is one block for all of them. From the array, if not given.

    Example:
        >>> parscan.BlockDiagonal(jnp.ones((100, 4, 3, 3))).size
        12
    """

    blocks: Any
    counts: tuple[int, ...] | None = None

    @property
    def inner(self) -> Any:
        """One block, the others being along leading axes."""
        return self.blocks if isinstance(self.blocks, Jacobian) else Dense(self.blocks)

    @property
    def along(self) -> tuple[int, ...]:
        """How many blocks along each of the axes of blocks."""
        return (self.blocks.shape[-3],) if self.counts is None else self.counts

    @property
    def held(self) -> tuple[int, ...]:
        """How many blocks there are numbers for along each of these axes; 1, if one stands for all."""
        image = jax.eval_shape(lambda inner, vector: inner.apply(vector), self.inner, jax.ShapeDtypeStruct((self.inner.size,), jnp.float32))
        lead = image.shape[max(image.ndim - 1 - len(self.along), 0) : -1]
        return (1,) * (len(self.along) - len(lead)) + lead

    def like(self, inner: Any) -> BlockDiagonal:
        """As many blocks, of another kind or with other numbers; inner is one of them."""
        plain = isinstance(inner, Dense) and self.counts is None
        return BlockDiagonal(inner.matrix if plain else inner, None if plain else self.along)

    @property
    def size(self) -> int:
        return math.prod(self.along) * self.inner.size

    @property
    def rows(self) -> int:
        return math.prod(self.along) * self.inner.rows

    def split(self, vector: Array) -> Array:
        """A vector (..., n) as (..., b, m), with one axis for each of `along`."""
        return vector.reshape(*vector.shape[:-1], *self.along, vector.shape[-1] // math.prod(self.along))

    def _joined(self, vector: Array, width: int) -> Array:
        """(..., *counts, m) as (..., n); axes of length 1, or none at all, stand for any number."""
        lead = vector.shape[: max(vector.ndim - 1 - len(self.along), 0)]
        return jnp.broadcast_to(vector, (*lead, *self.along, width)).reshape(*lead, math.prod(self.along) * width)

    def apply(self, vector: Array) -> Array:
        return self._joined(self.inner.apply(self.split(vector)), self.inner.rows)

    def transpose(self) -> BlockDiagonal:
        return self.like(self.inner.transpose())

    def paired(self, first: BlockDiagonal) -> tuple[Any, Any]:
        if self.along != first.along:
            return Dense(self.to_dense()), Dense(first.to_dense())
        second, inner = matched(self.inner, first.inner)
        return self.like(second), first.like(inner)

    def after(self, first: BlockDiagonal) -> BlockDiagonal:
        return self.like(product(self.inner, first.inner))

    def balanced(self) -> tuple[BlockDiagonal, Array]:
        mantissa, exponent = self.inner.balanced()
        return self.like(mantissa), self._joined(exponent, self.inner.size)

    def shifted(self, rows: Array) -> tuple[BlockDiagonal, Array]:
        mantissa, exponent = self.inner.shifted(self.split(rows))
        return self.like(mantissa), self._joined(exponent, self.inner.size)

    def shifted_before(self, second: Any, rows: Array) -> tuple[BlockDiagonal, Array]:
        if not isinstance(second, BlockDiagonal) or second.along != self.along:
            return self.shifted(rows)
        places = (slice(0, 1) if a == b == 1 else slice(None) for a, b in zip(self.held, second.held, strict=True))
        mantissa, exponent = self.inner.shifted_before(second.inner, self.split(rows)[(..., *places, slice(None))])
        return self.like(mantissa), self._joined(exponent, self.inner.size)

    def to_dense(self) -> Array:
        dense = self.inner.to_dense()
        q, m = dense.shape[-2:]
        lead = dense.shape[: max(dense.ndim - 2 - len(self.along), 0)]
        b = math.prod(self.along)
        blocks = jnp.broadcast_to(dense, (*lead, *self.along, q, m)).reshape(*lead, b, q, m)
        full = jnp.eye(b, dtype=dense.dtype)[:, None, :, None] * blocks[..., :, :, None, :]
        return full.reshape(*lead, b * q, b * m)

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def product_flops(self) -> int:
        return self.inner.product_flops

    @property
    def apply_flops(self) -> int:
        """A block that stands for several is applied several times."""
        return self.inner.apply_flops * math.prod(self.along) // max(math.prod(self.held), 1)


@kind()
class DirectSum(Jacobian):
    """Several maps side by side, each on coordinates of its own: blocks of several sizes, or kinds.

    Args:
        parts: Jacobians; vectors are those of the parts, one after another.

    Example:
        >>> parscan.DirectSum((parscan.Diagonal(jnp.ones(4)), parscan.Dense(jnp.ones((3, 3))))).size
        7
    """

    parts: tuple[Any, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    def apply(self, vector: Array) -> Array:
        some = split(vector, [part.size for part in self.parts])
        return _beside([part.apply(v) for part, v in zip(self.parts, some, strict=True)])

    def transpose(self) -> DirectSum:
        return DirectSum(tuple(part.transpose() for part in self.parts))

    def paired(self, first: DirectSum) -> tuple[DirectSum, DirectSum]:
        seconds, firsts = zip(*(matched(a, b) for a, b in zip(self.parts, first.parts, strict=True)), strict=True)
        return DirectSum(seconds), DirectSum(firsts)

    def after(self, first: DirectSum) -> DirectSum:
        return DirectSum(tuple(product(a, b) for a, b in zip(self.parts, first.parts, strict=True)))

    def balanced(self) -> tuple[DirectSum, Array]:
        return _gathered([part.balanced() for part in self.parts])

    def shifted(self, rows: Array) -> tuple[DirectSum, Array]:
        some = split(rows, [part.rows for part in self.parts])
        return _gathered([part.shifted(r) for part, r in zip(self.parts, some, strict=True)])

    def shifted_before(self, second: Any, rows: Array) -> tuple[DirectSum, Array]:
        if not isinstance(second, DirectSum):
            return self.shifted(rows)
        some = split(rows, [part.rows for part in self.parts])
        return _gathered([part.shifted_before(other, r) for part, other, r in zip(self.parts, second.parts, some, strict=True)])

    def to_dense(self) -> Array:
        dense = [part.to_dense() for part in self.parts]
        lead = jnp.broadcast_shapes(*(d.shape[:-2] for d in dense))
        rows, at = [], 0
        for d in dense:
            row = jnp.zeros((*lead, d.shape[-2], self.size), d.dtype)
            rows.append(row.at[..., at : at + d.shape[-1]].set(d))
            at += d.shape[-1]
        return jnp.concatenate(rows, axis=-2)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def product_flops(self) -> int:
        return sum(part.product_flops for part in self.parts)

    @property
    def apply_flops(self) -> int:
        return sum(part.apply_flops for part in self.parts)


def alike(a: Any, b: Any, lead: int = 1) -> tuple[Any, Any]:
    """Both maps written as one kind with equal static fields, so that their arrays may be put one after the other; they have so many leading axes."""
    if isinstance(a, BlockDiagonal) and isinstance(b, BlockDiagonal) and a.along == b.along:
        a_inner, b_inner = alike(a.inner, b.inner, lead + len(a.along))
        return BlockDiagonal(a_inner, a.along), BlockDiagonal(b_inner, b.along)
    if isinstance(a, DirectSum) and isinstance(b, DirectSum):
        pairs = [alike(x, y, lead) for x, y in zip(a.parts, b.parts, strict=True)]
        return DirectSum(tuple(x for x, _ in pairs)), DirectSum(tuple(y for _, y in pairs))
    found = a.stackable(b) if type(a) is type(b) else None
    return found or (_dense(a, lead), _dense(b, lead))


def closed(one: Any, lead: int = 1) -> Any:
    """Stacked maps as a kind whose products are of that kind and shape: what does not grow stays, all else becomes dense, block by block, none shared."""
    if isinstance(one, BlockDiagonal):
        inner = closed(one.inner, lead + len(one.along))
        return one.like(jax.tree.map(lambda x: jnp.broadcast_to(x, (*x.shape[:lead], *one.along, *x.shape[lead + len(one.along) :])), inner))
    if isinstance(one, DirectSum):
        return DirectSum(tuple(closed(part, lead) for part in one.parts))
    return _dense(one, lead) if grows(one) else one


def grows(one: Any) -> bool:
    """Whether a product of two such maps may be of another kind or of other shapes than they."""
    if isinstance(one, BlockDiagonal):
        return grows(one.inner)
    if isinstance(one, DirectSum):
        return any(map(grows, one.parts))
    return not isinstance(one, (Dense, Diagonal))


def _dense(one: Any, lead: int) -> Dense:
    """Full matrices with so many leading axes, also of a map that has no numbers: of length 1, for any number of maps."""
    matrix = one.to_dense()
    return Dense(matrix.reshape((1,) * (lead + 2 - matrix.ndim) + matrix.shape))


def split(vector: Array, sizes: Sequence[int]) -> list[Array]:
    """(..., n) in consecutive pieces."""
    bounds = list(itertools.accumulate(sizes, initial=0))
    return [vector[..., lo:hi] for lo, hi in itertools.pairwise(bounds)]


def _gathered(pairs: Sequence[tuple[Any, Array]]) -> tuple[DirectSum, Array]:
    """Mantissas side by side, and their exponents."""
    return DirectSum(tuple(mantissa for mantissa, _ in pairs)), _beside([exponent for _, exponent in pairs])


def _beside(vectors: Sequence[Array]) -> Array:
    """One vector after another; leading axes broadcast."""
    lead = jnp.broadcast_shapes(*(vector.shape[:-1] for vector in vectors))
    return jnp.concatenate([jnp.broadcast_to(vector, (*lead, vector.shape[-1])) for vector in vectors], axis=-1)
