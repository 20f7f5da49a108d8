"""Along which dimensions a linear program is the same at every index, proved equation by equation.

`dependence` says that the entry of an output at index k along a dimension depends on the entries of a tangent at index k alone: there is one
Jacobian block for each k. Here it is proved that those blocks are all equal: the columns of a matrix state under A @ S, the rows of a batch
under a linear layer.

For every variable we keep the dimensions along which it may vary. Of a value: entries at different indices may differ. Of what is linear in the
tangents: for each tangent leaf, of which one axis is that dimension (as `dependence` follows it), the map from that leaf's entries at index k to
the variable's entries at index k may differ from one k to the next. Tangents themselves vary nowhere, literals neither; other inputs and array
constants, unknown as they are, vary along all dimensions.

Why every equation keeps this true. Where its primitive works evenly (see `axes`), out[k] = F(operands at k, all of the operands that have no
such dimension), with one F for all k. If no operand at k varies with k, then for values all out[k] are equal; and for tangents F maps t[k] to
out[k] by the same linear map for all k. For a leaf of which no axis is that dimension nothing is claimed, here or later: what `dependence` has
lost stays lost. Along every other dimension of the output it may vary, unless it holds copies there.

Loops: a carry may differ from trip to trip, and so may all rows that are computed from it. How many trips there are, or which branch is taken,
is decided by a scalar, for all indices alike; or, in a loop that was batched, index by index. A dimension of size 1 has one index: nothing varies along it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from parscan.jaxprs.axes import axes
from parscan.jaxprs.flow import Flow
from parscan.jaxprs.program import AnyJaxpr, open_jaxpr

_Dims = frozenset[int]


def variation(jaxpr: AnyJaxpr, tangents: Sequence[int]) -> list[frozenset[int]]:
    """For each output of a linear program: its dimensions along which the coefficients may vary.

    If a dimension is absent and nothing mixes along it (see `dependence`), the Jacobian's block is the same at every index.

    Args:
        jaxpr: closed jaxpr, linear in the inputs numbered `tangents`.
        tangents: positions of the tangent leaves among the inputs.
    """
    flow = _Variation()
    inputs = [frozenset() if i in set(tangents) else flow.unknown(v.aval) for i, v in enumerate(open_jaxpr(jaxpr).invars)]
    return flow.evaluate(jaxpr, inputs)


class _Variation(Flow[_Dims]):
    def unknown(self, aval: Any) -> _Dims:
        return frozenset(d for d, size in enumerate(getattr(aval, "shape", ())) if size != 1)

    def join(self, eqn: Any, facts: Sequence[_Dims]) -> _Dims:
        return frozenset().union(*facts)

    def moved(self, eqn: Any, fact: _Dims, move: Callable[[int], int | None]) -> _Dims:
        return frozenset(to for d in fact if (to := move(d)) is not None)

    def through(self, eqn: Any, ins: list[_Dims]) -> list[_Dims]:
        places, copied, uneven = axes(eqn)
        even = copied.union(*(place.values() for place in places)) - uneven
        return [out | (self.unknown(v.aval) - even) for out, v in zip(super().through(eqn, ins), eqn.outvars, strict=True)]

    def in_trip(self, fact: _Dims, loop: int) -> _Dims:
        return fact | {loop}
