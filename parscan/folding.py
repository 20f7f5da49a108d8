"""How the map of a chunk of steps grows, step by step: its columns are pushed through the next, and rescaled every time."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from parscan import exponents, prefix
from parscan.affine import Affine
from parscan.jacobians import split
from parscan.maps import Chain, stepped


class Folding(NamedTuple):
    """The maps of all chunks while they grow.

    rows: (chunks, pushes + 1, n), the images of the vectors that are e_k in every block at once, and last that of the offsets:
        one array, which is pushed through a step as one. Yet to be scaled and added to; see `Fold`.
    exponent: (chunks, n), of the contracted coordinates, once the images are scaled. highest: the largest that each has been.
    pending: (chunks, pushes, blocks) of every group, the powers of two by which the images of its blocks are to be divided.
    offset: (chunks, n), of the last step, to be added.
    """

    rows: Array
    exponent: Array
    highest: Array
    pending: tuple[Array, ...]
    offset: Array


class Fold:
    """How a chunk's map grows: its columns are pushed through the next step, and rescaled every time. The chain's maps are square.

    What is to be done to the rows after a step waits for the next: then it is one pass over memory with what that does first.
    """

    def __init__(self, chain: Chain, dtype: Any):
        self.data, self.one = chain.crossing()
        self.forms, self.dtype = chain.forms.closed(), dtype
        self.blocks = tuple((group.blocks, group.side) for group in chain.forms.before)

    def identity(self, chunks: int) -> Folding:
        seeds = self.forms.seeds(self.dtype)
        pushes, n = seeds.shape
        rows = jnp.broadcast_to(jnp.concatenate([seeds, jnp.zeros((1, n), self.dtype)]), (chunks, pushes + 1, n))
        none = jnp.zeros((chunks, n), jnp.int32)
        pending = tuple(jnp.zeros((chunks, pushes, count), jnp.int32) for count, _ in self.blocks)
        return Folding(rows, none, none, pending, jnp.zeros((chunks, n), self.dtype))

    def extend(self, step: tuple[Any, Array], folded: Folding) -> Folding:
        data, offset = step
        rows = jax.vmap(jax.vmap(self.one, (None, 0)))(data, jnp.concatenate(self._done(folded), axis=-2))
        pending, grown = self._grown(rows[..., :-1, :])
        exponent = folded.exponent + grown
        return Folding(rows, exponent, jnp.maximum(folded.highest, exponent), pending, offset)

    def cross(self, step: tuple[Any, Array], vector: Array) -> Array:
        return stepped(self.one, step, vector)

    def follow(self, steps: tuple[Any, Array], before: Array, size: int, reverse: bool) -> Array:
        """What leaves every step, were there no offsets, from the vector that enters each chunk of `size` steps."""
        data, offsets = steps
        return prefix.unfold((data, jnp.zeros_like(offsets)), before, size=size, cross=self.cross, reverse=reverse)

    def explicit(self, folded: Folding) -> Affine:
        columns, offset = self._done(folded)
        return Affine(self.forms.jacobian(columns), folded.exponent, offset[..., 0, :])

    def _by_group(self, columns: Array) -> list[Array]:
        """(..., n) -> of each group (..., blocks, side)."""
        parts = split(columns, [count * side for count, side in self.blocks])
        return [own.reshape(*own.shape[:-1], *blocks) for own, blocks in zip(parts, self.blocks, strict=True)]

    def _done(self, folded: Folding) -> tuple[Array, Array]:
        """The images, scaled, and the offsets: (chunks, pushes, n), (chunks, 1, n)."""
        parts = zip(self._by_group(folded.rows[..., :-1, :]), folded.pending, strict=True)
        scaled = [exponents.scaled(blocks, -top[..., None]) for blocks, top in parts]
        columns = jnp.concatenate([some.reshape(*some.shape[:-2], -1) for some in scaled], axis=-1)
        return columns, folded.rows[..., -1:, :] + folded.offset[..., None, :]

    def _grown(self, columns: Array) -> tuple[tuple[Array, ...], Array]:
        """By which powers of two every column is to be divided: of each group (chunks, pushes, blocks), and by coordinate (chunks, n)."""
        tops, grown, pushes = [], [], columns.shape[-2]
        for blocks, (count, side) in zip(self._by_group(columns), self.blocks, strict=True):
            largest = jnp.abs(blocks).max(-1, initial=0)
            tops.append(jnp.where(largest == 0, 0, exponents.exponent(largest)))
            own = tops[-1][..., : min(side, pushes), :].swapaxes(-1, -2)
            grown.append(own.reshape(*own.shape[:-2], count * side))
        return tuple(tops), jnp.concatenate(grown, axis=-1)
