"""Which axes of a linear program never mix, proved equation by equation, and which equation mixes those that do.

The program is the *derivative* of a step, linear in some of its inputs (the tangent leaves); everything else, array constants
included, is an unknown value. For every variable we keep, for every tangent leaf that it depends on, where each axis of that
leaf went:

    {leaf: (d_0, d_1, …)}    axis a of the leaf is dimension d_a of the variable: an entry at index k along that
                             dimension depends only on entries at index k along that axis.

Where that cannot be said, the equation at which it was lost stands in its place (`MIXED` in the result). A leaf that is missing is not
depended on. The cost is the number of equations, whatever the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from parscan.jaxprs.flow import Flow
from parscan.jaxprs.moves import MOVES
from parscan.jaxprs.program import AnyJaxpr, equations, open_jaxpr, sub_jaxprs
from parscan.jaxprs.sources import where

MIXED = None
Dependence = dict[int, tuple[int | None, ...]]


@dataclass(frozen=True)
class Mixing:
    """An equation that mixes entries along an axis.

    eqn: the equation as the user would look for it, "`dot_general` at model.py:31". leaf, axis: which tangent leaf, which axis of it.
    moves: whether it only moves them, so that others mix them.
    """

    eqn: str
    leaf: int
    axis: int
    moves: bool = False


def dependence(jaxpr: AnyJaxpr, tangents: Sequence[int]) -> list[Dependence]:
    """What each output of a linear program depends on.

    Args:
        jaxpr: closed jaxpr, linear in the inputs numbered `tangents`.
        tangents: positions of the tangent leaves among the inputs; leaf i of the result is `tangents[i]`.
    """
    return [{leaf: tuple(MIXED if isinstance(d, _Lost) else d for d in dims) for leaf, dims in out.items()} for out in _follow(jaxpr, tangents)]


def influenced_by(jaxpr: AnyJaxpr, outputs: Sequence[int], inputs: Sequence[int]) -> bool:
    """Whether any of these outputs may depend on any of these inputs, given by position; the program need not be linear in them.

    Of a derivative, asked about everything but its tangents: whether it is another linear map for other values of those.
    """
    found = _follow(jaxpr, inputs)
    return any(found[i] for i in outputs)


def mixings(jaxpr: AnyJaxpr, tangents: Sequence[int]) -> list[Mixing]:
    """The first equation at which each axis is lost that some output depends on, but not index by index; in the order of leaves and axes.

    An axis that comes out in different places (a state and its transpose, in two outputs) is not lost in any equation, and not listed.
    """
    place: dict[int, int] = {}
    callers: dict[int, Any] = {}
    for eqn in equations(jaxpr):  # a body that is called twice is there twice
        place.setdefault(id(eqn), len(place))
        for inner in sub_jaxprs(list(eqn.params.values())):
            for own in open_jaxpr(inner).eqns:
                callers.setdefault(id(own), eqn)
    first: dict[tuple[int, int], Any] = {}
    for out in _follow(jaxpr, tangents):
        for leaf, dims in out.items():
            for axis, d in enumerate(dims):
                if isinstance(d, _Lost) and ((leaf, axis) not in first or place[id(d.eqn)] < place[id(first[leaf, axis])]):
                    first[leaf, axis] = d.eqn
    ordered = sorted(first.items(), key=lambda item: item[0])
    return [Mixing(where(eqn, callers), leaf, axis, eqn.primitive.name in MOVES) for (leaf, axis), eqn in ordered]


# --- following --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Lost:
    """An axis that is followed no further: each the equal of itself alone."""

    eqn: Any


_Followed = dict[int, tuple[int | _Lost, ...]]


def _follow(jaxpr: AnyJaxpr, tangents: Sequence[int]) -> list[_Followed]:
    inputs: list[_Followed] = [{} for _ in open_jaxpr(jaxpr).invars]
    for leaf, position in enumerate(tangents):
        inputs[position] = {leaf: tuple(range(len(open_jaxpr(jaxpr).invars[position].aval.shape)))}
    return _Dependences().evaluate(jaxpr, inputs)


class _Dependences(Flow[_Followed]):
    def unknown(self, aval: Any) -> _Followed:
        return {}

    def join(self, eqn: Any, facts: Iterable[_Followed]) -> _Followed:
        joined: _Followed = {}
        for fact in facts:
            for leaf, dims in fact.items():
                joined[leaf] = tuple(_both(eqn, a, b) for a, b in zip(joined.get(leaf, dims), dims, strict=True))
        return joined

    def moved(self, eqn: Any, fact: _Followed, move: Callable[[int], int | None]) -> _Followed:
        def each(d):
            to = d if isinstance(d, _Lost) else move(d)
            return _Lost(eqn) if to is None else to

        return {leaf: tuple(map(each, dims)) for leaf, dims in fact.items()}

    def trimmed(self, fact: _Followed, shape: tuple[int, ...]) -> _Followed:
        return {} if 0 in shape else fact

    def equation(self, eqn: Any, ins: list[_Followed], loops: int) -> list[_Followed]:
        return super().equation(eqn, ins, loops) if any(ins) else [{} for _ in eqn.outvars]


def _both(eqn: Any, a: int | _Lost, b: int | _Lost) -> int | _Lost:
    """Where an axis is in a sum of two terms: what is lost once, stays lost."""
    if isinstance(a, _Lost) or a == b:
        return a
    return b if isinstance(b, _Lost) else _Lost(eqn)
