"""One journey along a chain of affine maps, by any method: the driver of every backward pass, and of every tangent.

    v_i = M_i v_{i-1} + b_i,   i = 1 … L in the order of travel

M_i is a Jacobian (tangents travel with the chain) or its transpose (cotangents travel against it). It is known through its
action on a vector; whether it is ever written down, and for how many steps at once, is the method's affair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from parscan import affine, exponents, prefix
from parscan.affine import Affine
from parscan.jacobians import Jacobian, basis, kind_of
from parscan.methods import Associative, Chunked, Method, Sequential, Tree, Walk


class Chain(NamedTuple):
    """L linear maps on vectors of length n = blocks · width.

    crossing: () -> (data with leading axis L, map of (one entry of data, vector (n,)) to vector (n,)).
    forming: () -> (data with leading axis L, map of stacked entries of data to their Jacobians, stacked).
    """

    crossing: Callable[[], tuple[Any, Callable[[Any, Array], Array]]]
    forming: Callable[[], tuple[Any, Callable[[Any], Jacobian]]]
    blocks: int
    width: int


def sweep(chain: Chain, start: Array, offsets: Array, method: Method, *, reverse: bool) -> Array:
    """The vector that leaves each map.

    Args:
        chain: the maps, in the order of their index.
        start: vector entering the first map of the journey, (n,).
        offsets: b_i, (L, n).
        method: any but `Lax`, which has no journey of its own; sizes chosen.
        reverse: travel from index L - 1 down to 0.

    Returns:
        (L, n), entry i being what leaves map i.
    """
    if offsets.shape[0] == 0 or start.shape[0] == 0:
        return offsets
    match method:
        case Sequential():
            data, cross = chain.crossing()
            return prefix.walk((data, offsets), start, lambda step, v: cross(step[0], v) + step[1], reverse=reverse)
        case Walk(segment=segment):
            return _walk(chain, start, offsets, segment or offsets.shape[0], reverse)
        case Tree():
            return prefix.tree(_formed(chain, offsets), start, affine.apply, affine.then, reverse=reverse)
        case Associative():
            return prefix.associative(affine.scaled(_formed(chain, offsets)), start, affine.apply, affine.then, reverse=reverse)
        case Chunked(size=size, levels=levels):
            return _chunked(chain, start, offsets, size or 1, levels, reverse)
    raise TypeError(f"no journey by {method!r}")


def _formed(chain: Chain, offsets: Array) -> Affine:
    data, form = chain.forming()
    return Affine(form(data), None, offsets)


def _walk(chain: Chain, start: Array, offsets: Array, segment: int, reverse: bool) -> Array:
    """Segments one after another; in each, Jacobians formed together and walked. A shorter one at the end of the chain."""
    count, (data, form) = offsets.shape[0], chain.forming()
    steps = (data, offsets)

    def cross_segment(vector, some):
        values = prefix.walk(Affine(form(some[0]), None, some[1]), vector, affine.apply, reverse=reverse)
        return values[0 if reverse else -1], values

    whole = count // segment * segment
    pieces = []
    if whole == segment:
        pieces = [(prefix.take(steps, slice(None, whole)), cross_segment)]
    elif whole:
        stacked = jax.tree.map(lambda x: x[:whole].reshape(whole // segment, segment, *x.shape[1:]), steps)
        pieces = [(stacked, lambda vector, some: lax.scan(cross_segment, vector, some, reverse=reverse))]
    if whole < count:
        pieces.append((prefix.take(steps, slice(whole, None)), cross_segment))
    values = {}
    for place, (some, go) in reversed(list(enumerate(pieces))) if reverse else enumerate(pieces):
        start, values[place] = go(start, some)
    return jnp.concatenate([values[place].reshape(-1, offsets.shape[1]) for place in sorted(values)])


def _chunked(chain: Chain, start: Array, offsets: Array, size: int, levels: int | None, reverse: bool) -> Array:
    """fold -> scan -> unfold. A chunk's map grows by pushing its columns through the next step, rescaled every time."""
    data, one = chain.crossing()
    blocks, width = chain.blocks, chain.width
    kind = kind_of(blocks, width)

    def identity(chunks: int) -> Affine:
        columns = jnp.broadcast_to(basis(blocks, width, offsets.dtype), (chunks, width, blocks * width))
        zeros = jnp.zeros((chunks, blocks * width), offsets.dtype)
        return Affine(_Columns(columns), jnp.zeros((chunks, blocks * width), jnp.int32), zeros)

    def extend(step, maps):
        data, offset = step
        columns = jax.vmap(jax.vmap(one, (None, 0)))(data, maps.matrix.columns)
        matrix, exponent = affine.renormalised(_Columns(columns), maps.exponent)
        return Affine(matrix, exponent, jax.vmap(one)(data, maps.offset) + offset)

    def cross(step, vector):
        data, offset = step
        return (jax.vmap(one) if offset.ndim == 2 else one)(data, vector) + offset

    def through(maps, start):
        explicit = Affine(kind.from_columns(maps.matrix.columns), maps.exponent, maps.offset)
        return prefix.tree(explicit, start, affine.apply, affine.then, reverse=reverse, levels=levels)

    return prefix.chunked((data, offsets), start, size=size, identity=identity, extend=extend, cross=cross, through=through, reverse=reverse)


@jax.tree_util.register_pytree_node_class
class _Columns:
    """A matrix in the making: the images (..., width, n) of the vectors that are e_k in every block at once."""

    def __init__(self, columns: Array):
        self.columns = columns

    def balanced(self) -> tuple[_Columns, Array]:
        *lead, width, n = self.columns.shape
        blocks = self.columns.reshape(*lead, width, n // width, width)
        largest = jnp.abs(blocks).max(-1)
        top = jnp.where(largest == 0, 0, exponents.exponent(largest))
        mantissa = exponents.scaled(blocks, -top[..., None]).reshape(self.columns.shape)
        return _Columns(mantissa), top.swapaxes(-1, -2).reshape(*lead, n)

    def tree_flatten(self):
        return (self.columns,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)
