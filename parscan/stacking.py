"""Parameters of a chain of equal layers: stacked on a leading axis, or shared by all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from parscan.checks import describe, dtype_of, integer, named_leaves, not_arrays, shape_of, structure_difference

STACK_THEM = "Stack them with jax.tree.map(lambda *p: jnp.stack(p), *layers), or mark what all layers share by None in `params_axes`"


@dataclass
class Stacked:
    """A pytree of parameters taken apart: `leaves` have the leading axis `length`, `shared` do not."""

    leaves: list[Any]
    shared: list[Any]
    length: int
    axes: tuple[int | None, ...]
    tree: Any

    def join(self, stacked: list[Any], shared: list[Any] | None = None) -> Any:
        """The parameters of one layer, or any pytree like `params`, from its stacked and shared leaves."""
        rest, all_ = iter(stacked), iter(self.shared if shared is None else shared)
        return jax.tree.unflatten(self.tree, [next(all_) if axis is None else next(rest) for axis in self.axes])


def split_params(params: Any, params_axes: Any, length: int | None, *, source: str = "`length`") -> Stacked:
    """Takes parameters apart.

    Args:
        params: pytree of arrays.
        params_axes: prefix of it, 0 (stacked) or None (shared).
        length: L if known otherwise; `source` says from where.

    Raises:
        ValueError: a leaf without the leading axis, lengths that disagree, an axis other than 0 and None, no length at all. TypeError: a
            leaf that is no array.
    """
    leaves, tree = jax.tree.flatten(params)
    axes = _axes(params, params_axes)
    named = named_leaves("params", params)
    strange = not_arrays(named)
    if strange:
        raise TypeError(f"`params` must hold arrays alone; got {strange}. Let the layer close over what is no array.")
    length = None if length is None else integer("length", length, 0)
    stacked = [(name, leaf) for (name, leaf), axis in zip(named, axes, strict=True) if axis is not None]
    bad = [f"{name}: {describe(leaf)}" for name, leaf in stacked if not shape_of(leaf)]
    if bad:
        raise ValueError(f"`params` must be stacked, one leading layer axis a leaf; got {', '.join(bad)}. {STACK_THEM}.")
    lengths = {shape_of(leaf)[0] for _, leaf in stacked}
    if len(lengths) > 1:
        listed = ", ".join(f"{name}: {describe(leaf)}" for name, leaf in stacked)
        raise ValueError(f"`params` must be stacked, the leading layer axis being equally long in every leaf; got {listed}. {STACK_THEM}.")
    if length is None and not lengths:
        raise ValueError("The number of layers is unknown, since no leaf of `params` is stacked: give `length`.")
    if lengths and length is not None and lengths != {length}:
        (got,) = lengths
        raise ValueError(f"`params` are stacked for {got} layers, but {source} says {length}. {STACK_THEM}.")
    count = length if length is not None else next(iter(lengths))
    return Stacked([leaf for _, leaf in stacked], [leaf for leaf, axis in zip(leaves, axes, strict=True) if axis is None], count, tuple(axes), tree)


def _axes(params: Any, params_axes: Any) -> list[int | None]:
    try:
        full = jax.tree.map(lambda axis, part: [axis] * len(jax.tree.leaves(part)), params_axes, params, is_leaf=lambda axis: axis is None)
    except ValueError as error:
        raise ValueError(f"`params_axes` must be a prefix of `params`, as vmap's in_axes: {error}") from None
    axes = jax.tree.leaves(full, is_leaf=lambda axis: axis is None)
    if any(axis is not None and (isinstance(axis, bool) or axis != 0) for axis in axes):
        raise ValueError(f"`params_axes` may hold 0 (stacked) and None (shared); got {params_axes!r}.")
    return axes


def check_layer(layer: Any) -> None:
    """Raises TypeError if it is not callable."""
    if not callable(layer):
        raise TypeError(f"`layer` must be a callable (params_i, h) -> h; got {layer!r}.")


def check_state(old: Any, new: Any) -> Any:
    """The new state, if it has the old one's structure, shapes and dtypes.

    Raises:
        TypeError: it has not; the leaf is named.
    """
    difference = structure_difference("the layer's output", new, old)
    if difference is not None:
        raise TypeError(f"A layer must return a state like the one it was given: {difference}.")
    strange = not_arrays(named_leaves("h", new))
    if strange:
        raise TypeError(f"A layer must return a state like the one it was given, made of arrays; got {strange}.")
    pairs = zip(named_leaves("h", old), jax.tree.leaves(new), strict=True)
    wrong = [
        f"{name} was {describe(a)} and became {describe(b)}"
        for (name, a), b in pairs
        if shape_of(a) != shape_of(b) or (dtype_of(a) != dtype_of(b) and not getattr(jax.typeof(a), "weak_type", False))
    ]
    if wrong:
        raise TypeError(f"A layer must return a state like the one it was given: {'; '.join(wrong)}.")
    return new
