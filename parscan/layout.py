"""The order of a state's coordinates in which the Jacobians of a chain fall into blocks.

A `Layout` turns the leaves of a state into one vector and back. The vector is cut into *groups*: equal blocks that never mix. Batch axes, heads
and elementwise recurrences are all such blocks. Where layers change the state, every state between two of them has a layout of
its own, with the same groups, of blocks of another width; a group may have no coordinate there.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from parscan.jacobians import Index


@dataclass(frozen=True)
class Group:
    """Consecutive coordinates: blocks along axes of `counts`, each of `width` coordinates.

    elementwise: inside a block nothing mixes, either. Then `counts` are only the axes along which all that happens is the same.
    """

    counts: tuple[int, ...]
    width: int
    elementwise: bool = False

    @property
    def size(self) -> int:
        """How many coordinates."""
        return math.prod(self.counts) * self.width

    @property
    def blocks(self) -> int:
        """How many blocks."""
        return self.size if self.elementwise else math.prod(self.counts)

    @property
    def side(self) -> int:
        """Side of a block."""
        return min(1, self.width) if self.elementwise else self.width


def in_words(blocks: Mapping[Any, int], between: str = " and ") -> str:
    """From block size to how many, as `32 blocks of 8`."""
    return between.join(f"{count} block{'s' if count != 1 else ''} of {size}" for size, count in blocks.items())


def blocks_in_words(before: Sequence[Group], after: Sequence[Group]) -> str:
    """The blocks of a map from one vector to another: `32 blocks of 8`, or `32 blocks of 4 × 8` where the width changes."""
    found: Counter[str] = Counter()
    for a, b in zip(before, after, strict=True):
        if a.size or b.size:
            found[str(a.side) if a.side == b.side else f"{b.side} × {a.side}"] += max(a.blocks, b.blocks)
    return in_words(found)


@dataclass(frozen=True)
class ByAxes:
    """Leaves whose first axes, after a permutation, count blocks: leaf `leaves[i]`, its axes in the order `orders[i]`, is (*counts, widths[i])."""

    leaves: tuple[int, ...]
    orders: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.counts) * sum(self.widths)

    def to_vector(self, leaves: Sequence[Any], shapes: Sequence[tuple[int, ...]], xp: Any = jnp) -> Any:
        """State leaves (..., *shape) as (..., size)."""
        columns = []
        for leaf, order, width in zip(self.leaves, self.orders, self.widths, strict=True):
            x = leaves[leaf]
            lead = x.ndim - len(shapes[leaf])
            x = x.transpose(*range(lead), *(lead + axis for axis in order))
            columns.append(x.reshape(*x.shape[:lead], *self.counts, width))
        whole = columns[0] if len(columns) == 1 else xp.concatenate(columns, axis=-1)
        return whole.reshape(*whole.shape[: whole.ndim - len(self.counts) - 1], self.size)

    def from_vector(self, vector: Array, shapes: Sequence[tuple[int, ...]]) -> dict[int, Array]:
        """(..., size) as state leaves."""
        lead, start, found = vector.shape[:-1], 0, {}
        whole = vector.reshape(*lead, *self.counts, sum(self.widths))
        for leaf, order, width in zip(self.leaves, self.orders, self.widths, strict=True):
            x = whole[..., start : start + width].reshape(*lead, *(shapes[leaf][axis] for axis in order))
            back = sorted(range(len(order)), key=order.__getitem__)
            found[leaf] = x.transpose(*range(len(lead)), *(len(lead) + axis for axis in back))
            start += width
        return found


@dataclass(frozen=True)
class Raveled:
    """Leaves raveled one after another; entry i of the vector is entry `index[i]` of that, if there is an index."""

    leaves: tuple[int, ...]
    index: Index | None = None

    def to_vector(self, leaves: Sequence[Any], shapes: Sequence[tuple[int, ...]], xp: Any = jnp) -> Any:
        """State leaves (..., *shape) as (..., size)."""
        flat = []
        for leaf in self.leaves:
            x, shape = leaves[leaf], shapes[leaf]
            flat.append(x.reshape(*x.shape[: x.ndim - len(shape)], math.prod(shape)))
        whole = flat[0] if len(flat) == 1 else xp.concatenate(flat, axis=-1)
        return whole if self.index is None else whole[..., self.index.values]

    def from_vector(self, vector: Array, shapes: Sequence[tuple[int, ...]]) -> dict[int, Array]:
        """(..., size) as state leaves."""
        whole = vector if self.index is None else vector[..., np.argsort(self.index.values)]
        bounds = list(itertools.accumulate((math.prod(shapes[leaf]) for leaf in self.leaves), initial=0))
        return {
            leaf: whole[..., lo:hi].reshape(*vector.shape[:-1], *shapes[leaf]) for leaf, (lo, hi) in zip(self.leaves, itertools.pairwise(bounds), strict=True)
        }


Order = tuple[tuple[ByAxes | Raveled, ...], tuple[Group, ...]]  # of a state's coordinates: its parts, and the groups that these are seen as


@dataclass(frozen=True)
class Layout:
    """An order of coordinates: parts one after another, seen as groups.

    shapes, dtypes: the leaves. dtype: the one floating-point dtype in which vectors are held, at least float32.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    dtype: Any
    parts: tuple[ByAxes | Raveled, ...]
    groups: tuple[Group, ...]

    @property
    def size(self) -> int:
        """Length of a vector."""
        return sum(group.size for group in self.groups)

    @property
    def blocks(self) -> dict[int, int]:
        """From block size to how many."""
        found: Counter[int] = Counter()
        for group in self.groups:
            if group.size:
                found[group.side] += group.blocks
        return dict(sorted(found.items()))

    def to_vector(self, leaves: Sequence[Array]) -> Array:
        """State leaves (..., *shape) as vectors (..., n); at least one leaf."""
        lead = leaves[0].shape[: leaves[0].ndim - len(self.shapes[0])]
        pieces = [part.to_vector([leaf.astype(self.dtype) for leaf in leaves], self.shapes) for part in self.parts]
        return jnp.zeros((*lead, 0), self.dtype) if not pieces else pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)

    def from_vector(self, vector: Array) -> list[Array]:
        """Vectors (..., n) as state leaves (..., *shape), each in its own dtype."""
        found: dict[int, Any] = {}
        at = 0
        for part in self.parts:
            size = sum(math.prod(self.shapes[leaf]) for leaf in part.leaves)
            found |= part.from_vector(vector[..., at : at + size], self.shapes)
            at += size
        return [
            found[i].astype(dtype) if i in found else jnp.zeros((*vector.shape[:-1], *shape), dtype)
            for i, (shape, dtype) in enumerate(zip(self.shapes, self.dtypes, strict=True))
        ]

    def order(self) -> np.ndarray:
        """For every entry of a vector, which coordinate it is of the leaves raveled one after another."""
        bounds = list(itertools.accumulate((math.prod(shape) for shape in self.shapes), initial=0))
        leaves = [np.arange(lo, hi).reshape(shape) for (lo, hi), shape in zip(itertools.pairwise(bounds), self.shapes, strict=True)]
        return np.concatenate([part.to_vector(leaves, self.shapes, np) for part in self.parts]) if self.parts else np.zeros(0, int)
