"""Small questions about pytrees and dtypes, and the words in which errors name them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

Tree = Any


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf (array, tracer or abstract value) is floating-point or complex, hence differentiable."""
    return dtypes.issubdtype(dtype_of(leaf), jnp.inexact)


def is_complex(leaf: Any) -> bool:
    """Whether a leaf is complex."""
    return dtypes.issubdtype(dtype_of(leaf), jnp.complexfloating)


def dtype_of(leaf: Any) -> Any:
    """The dtype JAX would give a leaf: Python scalars, NumPy's double precision and float0 arrays included."""
    own = getattr(leaf, "dtype", None)
    wide = isinstance(leaf, (np.ndarray, np.generic)) and own in (np.float64, np.int64, np.uint64, np.complex128)
    return dtypes.result_type(leaf) if own is None or wide else own


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of a leaf, `()` for a Python scalar."""
    return tuple(jnp.shape(leaf))


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, a tracer, an abstract value or a number."""
    return (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or isinstance(leaf, (bool, int, float, complex))


def integer(name: str, value: Any, least: int, otherwise: str = "") -> int:
    """The value as a Python integer.

    Raises:
        ValueError: it is none, or below `least`; `otherwise` says what else is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}{otherwise}; got {value!r}.")
    return int(value)


def describe(leaf: Any) -> str:
    """A leaf as error messages name it: `float32[4,8]`."""
    return f"{dtype_of(leaf)}[{','.join(map(str, shape_of(leaf)))}]"


def named_leaves(name: str, tree: Tree) -> list[tuple[str, Any]]:
    """Every leaf with its path as a user would write it: `params['w']`, `h[0]`."""
    return [(name + jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def coordinate(names: Sequence[str], shapes: Sequence[tuple[int, ...]], index: int) -> str:
    """One entry of a pytree's leaves, raveled one after another, as a user would write it: `h['c'][3, 1]`."""
    for name, shape in zip(names, shapes, strict=True):
        size = math.prod(shape)
        if index < size:
            return name + (f"[{', '.join(str(i) for i in np.unravel_index(index, shape))}]" if shape else "")
        index -= size
    raise IndexError(index)


def not_arrays(named: list[tuple[str, Any]]) -> str:
    """Of named leaves those that are no arrays, in words; empty if there are none."""
    return ", ".join(f"{name}: {leaf!r}" for name, leaf in named if not is_array(leaf))


def structure_difference(name: str, got: Tree, want: Tree) -> str | None:
    """What differs between two pytrees' structures, in words, or `None`."""
    got_def, want_def = jax.tree.structure(got), jax.tree.structure(want)
    return None if got_def == want_def else f"{name} has the structure {got_def}, where {want_def} is needed"


def float0_zeros(shape: tuple[int, ...]) -> Any:
    """The cotangent JAX gives an integer, boolean or key array of this shape."""
    return np.zeros(shape, dtypes.float0)
