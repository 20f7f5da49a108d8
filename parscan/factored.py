"""Blocks that are formed from factors: what is found in the equations of a derivative, as blocks of a layout.

A bottleneck, J = diag(d) + U V: the images of the basis of what passes through it give U, its gradients V. A matrix state acted on from the left and
from the right, J = diag(s) (A ⊗ B). Neither takes a push of the state's own basis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core

from parscan.jacobians import Kronecker, LowRank
from parscan.jaxprs import Cut, Separable, cuts, dependence, masks_nothing, separable
from parscan.layout import ByAxes, Order
from parscan.proof import Derivative

Inputs = Sequence[Any]  # of the derivative, its tangents left out: constants, carry, x


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """All of a single group's Jacobian but a diagonal passes through `rank` numbers a block.

    along, against: the cut to be used in either direction of travel. before, through, after: the order of coordinates of the state, of what passes,
    and of the new state. shapes: their leaves'.
    """

    along: Cut
    against: Cut
    before: ByAxes
    through: ByAxes
    after: ByAxes
    shapes: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def rank(self) -> int:
        return sum(self.through.widths)

    def formed(self, inputs: Inputs, like: Sequence[Any], *, transposed: bool, dtype: Any) -> LowRank:
        """The Jacobian of one step, or its transpose: blocks along leading axes, as many as the layout counts.

        U is pushed and V is pulled; one of the two goes against the direction of travel, through a part of the program that masks nothing. The
        diagonal goes with it.
        """
        cut = self.against if transposed else self.along
        states = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in like]
        inner = lambda t: core.jaxpr_as_fun(cut.inner)(*t, *inputs)  # noqa: E731
        outer = lambda v: core.jaxpr_as_fun(cut.outer)(*v, *inputs)  # noqa: E731
        rest = lambda t: core.jaxpr_as_fun(cut.rest)(*t, *inputs)  # noqa: E731
        seeds = self._seeds(dtype)
        left = jax.vmap(lambda s: self.after.to_vector(outer(self._leaves(s, cut.avals)), self.shapes[2]))(seeds)
        back = jax.linear_transpose(inner, states)
        right = jax.vmap(lambda s: self.before.to_vector(back(self._leaves(s, cut.avals))[0], self.shapes[0]))(seeds)
        ones = [jnp.ones(a.shape, a.dtype) for a in states]
        diagonal = self.after.to_vector(jax.linear_transpose(rest, states)(ones)[0] if transposed else rest(ones), self.shapes[2])
        counts = self.before.counts
        split = lambda x: jnp.moveaxis(x.reshape(self.rank, *counts, -1), 0, -2).astype(dtype)  # noqa: E731
        one = LowRank.from_factors(diagonal.reshape(*counts, -1).astype(dtype), split(left), split(right))
        return one.transpose() if transposed else one

    def _seeds(self, dtype: Any) -> Array:
        return jnp.asarray(np.tile(np.eye(self.rank), (1, math.prod(self.before.counts))), dtype)

    def _leaves(self, vector: Array, avals: Sequence[Any]) -> list[Array]:
        found = self.through.from_vector(vector, self.shapes[1])
        return [found[i].astype(aval.dtype) for i, aval in enumerate(avals)]


def bottleneck(proof: Derivative, before: Order, after: Order) -> Bottleneck | None:
    """The bottleneck of a derivative whose states are one group of blocks, counted by axes."""
    found = list(cuts(proof.closed, proof.tangents)) if _single(before) and _single(after) else []
    one, other = (before[0][0], after[0][0]) if found else (None, None)
    if one != other or not isinstance(one, ByAxes) or not isinstance(other, ByAxes):
        return None
    usable = [cut for cut in found if _is_diagonal(dependence(cut.rest, proof.tangents))]
    along = next((cut for cut in usable if masks_nothing(cut.inner, proof.tangents)), None)
    against = next((cut for cut in usable if masks_nothing(cut.outer, range(len(cut.avals)))), None)
    if along is None or against is None or [a.shape for a in along.avals] != [a.shape for a in against.avals]:
        return None
    placed = [_through(cut, proof, one, other) for cut in (along, against)]
    if placed[0] is None or placed[0] != placed[1]:
        return None
    states, leaving = ([v.aval for v in some] for some in (proof.closed.jaxpr.invars[: len(proof.tangents)], proof.closed.jaxpr.outvars))
    shapes = tuple(tuple(tuple(aval.shape) for aval in some) for some in (states, along.avals, leaving))
    return Bottleneck(along, against, one, placed[0], other, shapes)


def _single(order: Order) -> bool:
    parts, groups = order
    return len(parts) == len(groups) == 1 and isinstance(parts[0], ByAxes) and not groups[0].elementwise


def _is_diagonal(depends: Sequence[dict[int, tuple[int | None, ...]]]) -> bool:
    """Whether every leaf depends on its own entries alone."""
    return all(leaf == i and dims == tuple(range(len(dims))) for i, out in enumerate(depends) for leaf, dims in out.items())


def _through(cut: Cut, proof: Derivative, before: ByAxes, after: ByAxes) -> ByAxes | None:
    """The order of the coordinates of what passes: blocks are counted along the axes that the group's have become."""
    entering, leaving = dependence(cut.inner, proof.tangents), dependence(cut.outer, range(len(cut.avals)))
    lead, orders, widths = len(before.counts), [], []
    for k, aval in enumerate(cut.avals):
        into = {
            tuple(entering[k][leaf][axis] for axis in order[:lead]) for leaf, order in zip(before.leaves, before.orders, strict=True) if leaf in entering[k]
        }
        axes = tuple(axis for axis in into.pop() if axis is not None) if len(into) == 1 else ()
        if len(axes) != lead or len(into) > 1:
            return None
        for leaf, order in zip(after.leaves, after.orders, strict=True):
            if k in leaving[leaf] and tuple(leaving[leaf][k][axis] for axis in axes) != order[:lead]:
                return None
        rest = [axis for axis in range(len(aval.shape)) if axis not in axes]
        orders.append((*axes, *rest))
        widths.append(math.prod(aval.shape[axis] for axis in rest))
    return ByAxes(tuple(range(len(cut.avals))), tuple(orders), before.counts, tuple(widths))


@dataclass(frozen=True, eq=False)
class Sides:
    """A matrix state acted on from two sides: its axes (first, second) by a matrix each, what comes out scaled elementwise.

    before, after: the order of coordinates of the state and of the new one; the two axes stand last, in that order. factors: the shapes of the matrices.
    scaled: whether what comes out is.
    """

    program: Separable
    axes: tuple[int, int]
    before: ByAxes
    after: ByAxes
    shape: tuple[int, ...]
    factors: tuple[tuple[int, int], tuple[int, int]]
    scaled: bool

    def formed(self, inputs: Inputs, like: Sequence[Any], *, transposed: bool, dtype: Any) -> Kronecker:
        """The Jacobian of one step, or its transpose; leading axes of length 1: the matrices are the same for all blocks, unless there is a scale."""
        matrices, scale = self.program.factors(*inputs)
        lead = (1,) * len(self.before.counts)
        left, right = (jnp.asarray(matrices[axis], dtype).reshape(*lead, *shape) for axis, shape in zip(self.axes, self.factors, strict=True))
        rows = None if scale is None else self.after.to_vector([scale], [self.shape]).reshape(*self.after.counts, -1).astype(dtype)
        one = Kronecker(left, right, rows)
        return one.transpose() if transposed else one


def sides(proof: Derivative, before: Order, after: Order) -> Sides | None:
    """The two sides of a derivative whose state is one matrix, or a batch of them."""
    if not (_single(before) and _single(after) and len(proof.tangents) == len(proof.closed.jaxpr.outvars) == 1):
        return None
    found = separable(proof.closed, proof.tangents)
    one, other = before[0][0], after[0][0]
    assert isinstance(one, ByAxes) and isinstance(other, ByAxes)
    order, lead = one.orders[0], len(one.counts)
    if found is None or len(order) != lead + 2 or tuple(found.axes[axis] for axis in order) != other.orders[0]:
        return None
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in proof.closed.jaxpr.invars[1:]]
    matrices, scale = jax.eval_shape(lambda *some: found.factors(*some), *avals)
    if any(matrices[axis] is not None for axis in order[:lead]) or any(matrices[axis] is None for axis in order[lead:]):
        return None
    left, right = (matrices[axis].shape for axis in order[lead:])
    shape = tuple(proof.closed.jaxpr.outvars[0].aval.shape)
    return Sides(found, (order[lead], order[lead + 1]), one, other, shape, (left, right), scale is not None)
