"""Random steps of a recurrence, drawn by Hypothesis from `operations`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from operations import NARROW, WIDE, Constant, Operation, Picker, Shape, Unfit

LARGEST = 60  # elements of a value
STATES: list[list[Shape]] = [[(3, 4)], [(2, 3, 2)], [(4, 3)], [(3, 3)], [(6,)], [(3, 4), (3,)], [(2, 3), (2, 2)], [(3, 2), (2, 3)], [(2, 2, 2), (2, 2)]]


class RandomProgram:
    """A step `(constants, state) -> state`, both lists of arrays."""

    def __init__(self, shapes: list[Shape], operations: list[tuple[str, list, Operation]], outputs: list[int], constants: list[Constant], narrow: bool):
        self.shapes, self.operations, self.outputs, self.constants, self.narrow = shapes, operations, outputs, constants, narrow

    def __repr__(self) -> str:
        return f"state {self.shapes}; " + "; ".join(f"{name}{tuple(log)}" for name, log, _ in self.operations) + f"; outputs {self.outputs}"

    def __call__(self, constants: Sequence[Any], state: Sequence[Any]) -> list[Any]:
        values = list(state)
        for _, _, operation in self.operations:
            values.append(operation(values, constants))
        return [fitted(values[i], shape, self.narrow) for i, shape in zip(self.outputs, self.shapes, strict=True)]

    def point(self, random: np.random.Generator) -> tuple[list[Any], list[Any]]:
        """Random constants and a random state."""
        return [jnp.asarray(c.value(random)) for c in self.constants], [jnp.asarray(random.standard_normal(shape)) for shape in self.shapes]


def fitted(x: Any, shape: Shape, narrow: bool) -> Any:
    """x in another shape: by reductions and broadcasts, or, unless `narrow`, cut and padded in raveled order."""
    if x.shape == shape:
        return x
    if not narrow:
        flat = x.ravel()[: int(np.prod(shape))]
        return jnp.pad(flat, (0, int(np.prod(shape)) - flat.size)).reshape(shape)
    x = x.sum(tuple(range(x.ndim - len(shape)))) if x.ndim > len(shape) else x
    x = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    x = x.sum([d for d in range(x.ndim) if x.shape[d] != shape[d]], keepdims=True)
    return jnp.broadcast_to(x, shape)


def drawn_operations(draw, table: Sequence[Any], shapes: list[Shape], constants: list[Any], most: int, dtype: Any = float) -> list[tuple[str, list, Operation]]:
    """Up to `most` operations out of a table, with what was drawn for each; their values join `shapes`, their constants `constants`."""
    operations = []
    for _ in range(draw(st.integers(1, most))):
        operation = draw(st.sampled_from(table))
        picker = Picker(draw, shapes, list(constants))
        try:
            run = operation(picker)
        except Unfit:
            continue
        like = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]
        shape = jax.eval_shape(run, like, [c.spec(dtype) for c in picker.constants]).shape
        if 0 < int(np.prod(shape)) <= LARGEST:
            operations.append((operation.__name__, picker.log, run))
            shapes.append(shape)
            constants[:] = picker.constants
    return operations


@st.composite
def programs(draw, narrow: bool, most: int = 6) -> RandomProgram:
    """Programs of up to `most` operations, of all kinds or only of elementwise operations, broadcast, transpose, reduce and dot."""
    states = list(draw(st.sampled_from(STATES)))
    shapes, constants = list(states), []
    operations = drawn_operations(draw, NARROW if narrow else WIDE, shapes, constants, most)
    outputs = []
    for shape in states:
        fits = [i for i, other in enumerate(shapes) if other == shape]
        outputs.append(len(shapes) - 1 if draw(st.integers(0, 3)) == 3 else fits[-1 - max(0, draw(st.integers(0, 2 * len(fits))) - len(fits) - 1)])
    return RandomProgram(states, operations, outputs, constants, narrow)
