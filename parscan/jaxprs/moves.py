"""What equations do to whole numbers, in numpy: where they move elements, and what they compute where everything is known.

An equation that moves elements does to node numbers what it does to values. What it puts where nothing came from is an operand of it
(`pad`), and 0 among node numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

Arrays = Sequence[np.ndarray]
LARGEST = 2**20  # elements; larger arrays are not computed


# --- moves -------------------------------------------------------------------------------------------------------------------


def _broadcast_in_dim(eqn: Any, arrays: Arrays) -> list[np.ndarray]:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    ones = [1] * len(shape)
    for d, size in zip(dims, arrays[0].shape, strict=True):
        ones[d] = size
    return [np.broadcast_to(arrays[0].reshape(ones), shape)]


def _reshape(eqn: Any, arrays: Arrays) -> list[np.ndarray]:
    order = eqn.params.get("dimensions")
    return [(arrays[0] if order is None else arrays[0].transpose(order)).reshape(eqn.outvars[0].aval.shape)]


def _squeeze(eqn: Any, arrays: Arrays) -> list[np.ndarray]:
    return [arrays[0].reshape(eqn.outvars[0].aval.shape)]


def _transpose(eqn: Any, arrays: Arrays) -> list[np.ndarray]:
    return [arrays[0].transpose(eqn.params["permutation"])]


def _rev(eqn: Any, arrays: Arrays) -> list[np.ndarray]:
    return [np.flip(arrays[0], tuple(eqn.params["dimensions"]))]


def _slice(eqn: Any, arrays: Arrays) -> list[np.ndarray]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    return [arrays[0][tuple(slice(*some) for some in zip(starts, limits, strides, strict=True))]]


def _concatenate(eqn: Any, arrays: Arrays) -> list[np.ndarray]:
    return [np.concatenate(arrays, eqn.params["dimension"])]


def _pad(eqn: Any, arrays: Arrays) -> list[np.ndarray]:
    out = np.full(eqn.outvars[0].aval.shape, arrays[1], arrays[1].dtype)
    to, of = [], []
    for (low, _, interior), old, new in zip(eqn.params["padding_config"], arrays[0].shape, out.shape, strict=True):
        at = low + np.arange(old) * (interior + 1)
        of.append(np.flatnonzero((at >= 0) & (at < new)))
        to.append(at[of[-1]])
    out[np.ix_(*to)] = arrays[0][np.ix_(*of)]
    return [out]


def _split(eqn: Any, arrays: Arrays) -> list[np.ndarray]:
    return np.split(arrays[0], np.cumsum(eqn.params["sizes"])[:-1], eqn.params["axis"])


def _stack(eqn: Any, arrays: Arrays) -> list[np.ndarray]:
    return [np.stack(arrays, eqn.params["axis"])]


def _unstack(eqn: Any, arrays: Arrays) -> list[np.ndarray]:
    return list(np.moveaxis(arrays[0], eqn.params["axis"], 0))


def _tile(eqn: Any, arrays: Arrays) -> list[np.ndarray]:
    return [np.tile(arrays[0], eqn.params["reps"])]


MOVES: dict[str, Callable[[Any, Arrays], list[np.ndarray]]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
}


PER_OPERAND = frozenset("copy copy_p device_put name optimization_barrier sharding_constraint stop_gradient".split())  # output i is input i


def selected(which: np.ndarray, cases: Arrays) -> np.ndarray:
    """`select_n` with a known predicate."""
    out = cases[0]
    for number, case in enumerate(cases[1:], 1):
        out = np.where(which == number, case, out)
    return out


# --- where slices and windows lie ---------------------------------------------------------------------------------------------


def taps(size: int, windows: int, width: int, stride: int = 1, low: int = 0, base: int = 1, dilation: int = 1) -> np.ndarray:
    """What each window reads along a dimension: (windows, width), indices of the input, -1 in the padding and between dilated elements."""
    at = np.arange(windows)[:, None] * stride + np.arange(width) * dilation - low
    inside = (at >= 0) & (at % base == 0) & (at // base < size)
    return np.where(inside, at // base, -1)


def slices(
    shape: Sequence[int], starts: Mapping[int, np.ndarray], outer: tuple[int, ...], sizes: Sequence[int], windows: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Where the slices of a gather or a scatter lie in the raveled operand, shifted to lie inside, and which did so without a shift.

    Args:
        shape: of the operand. starts: dimension of the operand → where each slice begins along it, broadcasts to `outer`; 0 where left out.
        sizes: of a slice, one for every dimension. windows: those of its dimensions that are kept.

    Returns:
        (*outer, *window sizes) and the truth values (*outer, *ones).
    """
    flat, inside = np.zeros(outer, np.int64), np.ones(outer, bool)
    strides = [int(np.prod(shape[d + 1 :], dtype=np.int64)) for d in range(len(shape))]
    for d, start in starts.items():
        room = shape[d] - sizes[d]
        inside = inside & (start >= 0) & (start <= room)
        flat = flat + np.clip(start, 0, room) * strides[d]
    for d in windows:
        flat = flat[..., None] + np.arange(sizes[d]) * strides[d]
    return flat, inside.reshape((*outer, *[1] * len(windows)))


# --- known values -------------------------------------------------------------------------------------------------------------

_ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "convert_element_type": np.asarray,
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "select_n": lambda which, *cases: selected(which, cases),
    "sign": np.sign,
    "square": np.square,
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}
_BY_JAX = frozenset(  # without effects, and no collective among them
    "argmax argmin cummax cummin cumprod cumsum div dynamic_slice dynamic_update_slice gather integer_pow population_count reduce_and reduce_max reduce_min "
    "reduce_or reduce_prod reduce_sum rem scatter scatter-add scatter_add shift_left shift_right_arithmetic shift_right_logical sort".split()
)


def is_known(value: Any) -> bool:
    """Whether a value is one that is computed with: whole numbers or truth values, not too many."""
    return isinstance(value, (np.ndarray, np.generic, jax.Array)) and not isinstance(value, Tracer) and _is_computed(value.dtype, value.size)


def _is_computed(dtype: Any, size: int) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind in "iub" and size <= LARGEST


def computed(eqn: Any, arrays: Arrays) -> list[np.ndarray] | None:
    """The outputs of an equation, its inputs being known; None where they are not whole numbers or are not computed here."""
    name, avals = eqn.primitive.name, [var.aval for var in eqn.outvars]
    if not all(hasattr(aval, "shape") and _is_computed(aval.dtype, int(np.prod(aval.shape, dtype=np.int64))) for aval in avals):
        return None
    if name == "iota":
        shape, dimension = eqn.params["shape"], eqn.params["dimension"]
        outs = [np.broadcast_to(np.arange(shape[dimension]).reshape([-1 if d == dimension else 1 for d in range(len(shape))]), shape)]
    elif name in MOVES:
        outs = MOVES[name](eqn, arrays)
    elif name in _ARITHMETIC:
        with np.errstate(all="ignore"):  # they wrap around, as in XLA
            outs = [_ARITHMETIC[name](*arrays)]
    elif name in _BY_JAX:
        with jax.ensure_compile_time_eval():
            outs = eqn.primitive.bind(*map(jax.numpy.asarray, arrays), **eqn.primitive.get_bind_params(eqn.params))
        outs = outs if eqn.primitive.multiple_results else [outs]
    else:
        return None
    return [np.broadcast_to(np.asarray(out).astype(aval.dtype), aval.shape) for out, aval in zip(outs, avals, strict=True)]
