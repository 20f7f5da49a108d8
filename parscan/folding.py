"""How the map of a chunk of steps grows, step by step: its columns are pushed through the next, and rescaled every time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from parscan import affine, exponents, prefix
from parscan.affine import Affine
from parscan.jacobians import split
from parscan.maps import Chain, stepped


class Fold:
    """How a chunk's map grows: its columns are pushed through the next step, and rescaled every time. The chain's maps are square."""

    def __init__(self, chain: Chain, dtype: Any):
        self.data, self.one = chain.crossing()
        self.forms, self.dtype = chain.forms.closed(), dtype
        self.blocks = tuple((group.blocks, group.side) for group in chain.forms.before)

    def identity(self, chunks: int) -> tuple[Affine, Array]:
        """Maps, and the largest exponent that each of their columns has had: (chunks, n)."""
        seeds = self.forms.seeds(self.dtype)
        columns = jnp.broadcast_to(seeds, (chunks, *seeds.shape))
        n = seeds.shape[1]
        none = jnp.zeros((chunks, n), jnp.int32)
        return Affine(_Columns(columns, self.blocks), none, jnp.zeros((chunks, n), self.dtype)), none

    def extend(self, step: tuple[Any, Array], folded: tuple[Affine, Array]) -> tuple[Affine, Array]:
        (data, offset), (maps, highest) = step, folded
        columns = jax.vmap(jax.vmap(self.one, (None, 0)))(data, maps.matrix.columns)
        assert maps.exponent is not None  # `identity` gave it
        matrix, exponent = affine.renormalised(_Columns(columns, self.blocks), maps.exponent)
        return Affine(matrix, exponent, jax.vmap(self.one)(data, maps.offset) + offset), jnp.maximum(highest, exponent)

    def cross(self, step: tuple[Any, Array], vector: Array) -> Array:
        return stepped(self.one, step, vector)

    def follow(self, steps: tuple[Any, Array], before: Array, size: int, reverse: bool) -> Array:
        """What leaves every step, were there no offsets, from the vector that enters each chunk of `size` steps."""
        data, offsets = steps
        return prefix.unfold((data, jnp.zeros_like(offsets)), before, size=size, cross=self.cross, reverse=reverse)

    def explicit(self, folded: tuple[Affine, Array]) -> Affine:
        maps, _ = folded
        return Affine(self.forms.jacobian(maps.matrix.columns), maps.exponent, maps.offset)


@partial(jax.tree_util.register_dataclass, data_fields=["columns"], meta_fields=["blocks"])
@dataclass(frozen=True)
class _Columns:
    """A matrix in the making: the images (..., pushes, n) of the vectors that are e_k in every block at once.

    blocks: of each group, how many blocks and of what side.
    """

    columns: Array
    blocks: tuple[tuple[int, int], ...]

    def balanced(self) -> tuple[_Columns, Array]:
        pushes, mantissas, tops = self.columns.shape[-2], [], []
        for own, (count, side) in zip(split(self.columns, [count * side for count, side in self.blocks]), self.blocks, strict=True):
            blocks = own.reshape(*own.shape[:-1], count, side)
            largest = jnp.abs(blocks).max(-1, initial=0)
            top = jnp.where(largest == 0, 0, exponents.exponent(largest))
            mantissas.append(exponents.scaled(blocks, -top[..., None]).reshape(own.shape))
            columns = top[..., : min(side, pushes), :].swapaxes(-1, -2)
            tops.append(columns.reshape(*columns.shape[:-2], count * side))
        return _Columns(jnp.concatenate(mantissas, axis=-1), self.blocks), jnp.concatenate(tops, axis=-1)
