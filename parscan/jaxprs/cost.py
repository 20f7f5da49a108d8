"""Arithmetic of a program, read off its equations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core

from parscan.jaxprs.program import AnyJaxpr, equations, open_jaxpr, sub_jaxprs


def flops(jaxpr: AnyJaxpr) -> int:
    """Floating-point operations: two for each multiply-add of a product, one for each element of anything else that computes."""
    return sum(_of(eqn) for eqn in open_jaxpr(jaxpr).eqns)


def flops_on(jaxpr: AnyJaxpr, inputs: Sequence[int]) -> int:
    """As `flops`, of the equations alone that depend on the inputs at these positions; a loop or branch that does counts whole.

    Of a derivative, asked about its tangents: what pushing one more vector costs, all else being at hand.
    """
    total = 0
    for eqn, touched in _touched(jaxpr, inputs):
        inner = list(sub_jaxprs(list(eqn.params.values())))
        called = len(inner) == 1 and eqn.primitive.name in ("jit", "pjit", "closed_call", "remat", "remat2", "checkpoint")
        total += flops_on(inner[0], touched) if called else _of(eqn)
    return total


def _touched(jaxpr: AnyJaxpr, inputs: Sequence[int]) -> Iterator[tuple[Any, list[int]]]:
    """The equations that depend on these inputs, and which of their operands do."""
    body = open_jaxpr(jaxpr)
    reached = {body.invars[i] for i in inputs}
    for eqn in body.eqns:
        touched = [i for i, a in enumerate(eqn.invars) if isinstance(a, core.Var) and a in reached]
        if touched:
            reached.update(eqn.outvars)
            yield eqn, touched


_MOVES = frozenset("broadcast_in_dim reshape transpose squeeze slice concatenate convert_element_type copy copy_p pad rev iota".split())


def _of(eqn: Any) -> int:
    inner = list(sub_jaxprs(list(eqn.params.values())))
    if inner:
        return max(map(flops, inner)) * eqn.params.get("length", 1)
    size = sum(math.prod(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * size * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        return 2 * size * math.prod(kernel) // max(kernel[eqn.params["dimension_numbers"].rhs_spec[0]], 1)
    return 0 if eqn.primitive.name in _MOVES else size


def has_products(jaxpr: AnyJaxpr) -> bool:
    """Whether there is a matrix product or a convolution in it."""
    return any(eqn.primitive.name in ("dot_general", "conv_general_dilated") for eqn in equations(jaxpr))


def bytes_of_variables(jaxpr: AnyJaxpr) -> int:
    """Of everything that a program is given and computes, inside of what it calls, too; of branches the largest, of a loop every round."""
    body = open_jaxpr(jaxpr)
    inner = ((list(sub_jaxprs(list(eqn.params.values()))), eqn.params.get("length", 1)) for eqn in body.eqns)
    called = sum(length * max(bytes_of_variables(one) - _bytes_of(open_jaxpr(one).invars) for one in some) for some, length in inner if some)
    return _bytes_of([*body.invars, *(v for eqn in body.eqns for v in eqn.outvars), *body.outvars]) + called


def _bytes_of(variables: Sequence[Any]) -> int:
    avals = [v.aval for v in variables]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals if hasattr(aval, "shape"))


_LINEAR = _MOVES | frozenset("add add_any sub neg mul div dot_general reduce_sum split stack unstack conv_general_dilated rev jit pjit".split())


def masks_nothing(jaxpr: AnyJaxpr, inputs: Sequence[int] | None = None) -> bool:
    """Whether a linear program only adds, multiplies and moves: no part of it decides what may pass. With `inputs`: what becomes of these."""
    touched = open_jaxpr(jaxpr).eqns if inputs is None else [eqn for eqn, _ in _touched(jaxpr, inputs)]
    every = [one for eqn in touched for one in (eqn, *(e for inner in sub_jaxprs(list(eqn.params.values())) for e in equations(inner)))]
    return all(eqn.primitive.name in _LINEAR for eqn in every)


_PLACES = _MOVES - {"pad", "iota", "convert_element_type"} | {"gather", "split", "stack", "unstack", "expand_dims"}


def moves_only(jaxpr: AnyJaxpr, inputs: Sequence[int]) -> bool:
    """Whether these inputs are only moved and copied on their way to the outputs."""
    for eqn, touched in _touched(jaxpr, inputs):
        inner = list(sub_jaxprs(list(eqn.params.values())))
        called = len(inner) == 1 and eqn.primitive.name in ("jit", "pjit") and moves_only(inner[0], touched)
        by_value = eqn.primitive.name == "gather" and touched != [0]
        if by_value or not (called or eqn.primitive.name in _PLACES):
            return False
    return True
