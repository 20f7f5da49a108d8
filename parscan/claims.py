"""What the user claims of a chain's Jacobians. A claim holds no arrays and is taken at its word; `parscan.testing.check_structure` checks one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from parscan.checks import describe, integer
from parscan.jacobians import Evidence, Pattern
from parscan.layout import ByAxes, Group, Order, Raveled


@dataclass(frozen=True)
class Blocks:
    """A claim: the state falls into equal blocks that never mix. Taken at its word; a wrong claim is a wrong gradient.

    Args:
        axis: every leaf of the state has this axis, and an entry of the new state depends only on entries of the old one with the same
            index along it (a batch axis). Negative counts from the end.
        size: the state, raveled leaf after leaf, falls into consecutive blocks of this size.

    Raises:
        ValueError: not exactly one of the two is given, `axis` is no integer, `size` none of at least 1.

    Example:
        >>> parscan.Blocks(axis=0)
        Blocks(axis=0)
    """

    axis: int | None = None
    size: int | None = None

    def __repr__(self) -> str:
        return f"Blocks(axis={self.axis})" if self.size is None else f"Blocks(size={self.size})"

    def __post_init__(self) -> None:
        if (self.axis is None) == (self.size is None):
            raise ValueError(f"`Blocks` needs exactly one of `axis` and `size`; got axis={self.axis!r}, size={self.size!r}.")
        if self.size is not None:
            object.__setattr__(self, "size", integer("Blocks(size=...)", self.size, 1))
        else:
            _check_axis("Blocks", self.axis)


@dataclass(frozen=True)
class Band:
    """A claim: a coordinate depends only on its neighbours, as in a 1-D convolution or a finite-difference scheme. Taken at its word.

    Args:
        bandwidth: how far, along the state raveled leaf after leaf: entry i of the new state depends on entries i - bandwidth … i + bandwidth at most.
        axis: an axis along which nothing mixes (a batch axis), as in `Blocks`: the band is then that of the rest, for each index along it.

    Raises:
        ValueError: `bandwidth` is no integer of at least 0, `axis` is none.

    Example:
        >>> parscan.Band(2, axis=0)
        Band(2, axis=0)
    """

    bandwidth: int
    axis: int | None = None

    def __repr__(self) -> str:
        return f"Band({self.bandwidth})" if self.axis is None else f"Band({self.bandwidth}, axis={self.axis})"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidth", integer("Band(bandwidth=...)", self.bandwidth, 0))
        if self.axis is not None:
            _check_axis("Band", self.axis)


def _check_axis(name: str, axis: Any) -> None:
    if isinstance(axis, bool) or not isinstance(axis, Integral):
        raise ValueError(f"`{name}(axis=...)` must be an integer; got {axis!r}.")


Claim = Blocks | Band | str


def parse_structure(structure: Any) -> Claim | None:
    """A claim from a value or a name; `None` for `"auto"`.

    Raises:
        ValueError: the name is unknown. TypeError: neither a name nor a claim.
    """
    if isinstance(structure, (Blocks, Band)):
        return structure
    if isinstance(structure, str):
        if structure in ("dense", "diagonal"):
            return structure
        if structure == "auto":
            return None
    kind = ValueError if isinstance(structure, str) else TypeError
    raise kind(
        "`structure` must be 'auto', 'dense', 'diagonal', parscan.Blocks(axis=...), parscan.Blocks(size=...) or parscan.Band(...); " + f"got {structure!r}."
    )


States = Sequence[Sequence[Any]]  # of every state of a chain, the abstract values of its floating-point leaves


def claimed(claim: Claim, states: States) -> tuple[list[Order], list[tuple[Evidence, ...]]]:
    """Parts and groups of every state, and of every step the evidence for each group.

    Raises:
        ValueError: the claim's size or axis does not fit the state.
    """
    axis = claim.axis if isinstance(claim, (Blocks, Band)) else None
    orders = _by_axis(claim, axis, states) if axis is not None else _raveled(claim, states)
    evidence = []
    for (_, before), (_, after) in itertools.pairwise(orders):
        evidence.append(tuple(_evidence(claim, a.width, b.width) for a, b in zip(before, after, strict=True)))
    return orders, evidence


def _evidence(claim: Claim, before: int, after: int) -> Evidence:
    if not isinstance(claim, Band) or 2 * claim.bandwidth + 1 >= before:
        return Evidence((after, before))
    offsets = np.arange(-claim.bandwidth, claim.bandwidth + 1)
    rows, columns = (np.arange(before)[:, None] + offsets).ravel(), np.repeat(np.arange(before), len(offsets))
    inside = (rows >= 0) & (rows < after)
    return Evidence((after, before), Pattern((after, before), rows[inside], columns[inside]))


def _by_axis(claim: Claim, axis: int, states: States) -> list[Order]:
    sizes, found = set(), []
    for state in states:
        orders, widths = [], []
        for aval in state:
            rank = len(aval.shape)
            if not -rank <= axis < rank:
                raise ValueError(f"`structure={claim!r}` does not fit: every leaf of the state needs that axis; got {_listed(state)}.")
            place = axis % rank
            orders.append((place, *(a for a in range(rank) if a != place)))
            sizes.add(aval.shape[place])
            widths.append(math.prod(aval.shape[:place] + aval.shape[place + 1 :]))
        found.append((tuple(range(len(state))), tuple(orders), tuple(widths)))
    if len(sizes) > 1:
        got = "; ".join(dict.fromkeys(_listed(state) for state in states))
        raise ValueError(f"`structure={claim!r}` does not fit: that axis needs one length in every leaf of the state; got {got}.")
    count = sizes.pop() if sizes else 0
    _check_same(claim, states)
    return [
        ((ByAxes(leaves, orders, (count,), widths),), (Group((count,), sum(widths)),)) if leaves else ((), (Group((count,), 0),))
        for leaves, orders, widths in found
    ]


def _raveled(claim: Claim, states: States) -> list[Order]:
    """Blocks in raveled order."""
    totals = [sum(math.prod(a.shape) for a in state) for state in states]
    if isinstance(claim, Blocks):
        assert claim.size is not None
        for state, total in zip(states, totals, strict=True):
            if total % claim.size:
                raise ValueError(f"`structure={claim!r}` does not fit: the state has {total} coordinates ({_listed(state)}), not a multiple of {claim.size}.")
    _check_same(claim, states)
    found = []
    for state, total in zip(states, totals, strict=True):
        leaves = tuple(range(len(state)))
        match claim:
            case Blocks(size=int(size)):
                group = Group((total // size,), size)
            case "diagonal":
                group = Group((), total, elementwise=True)
            case _:
                group = Group((), total)
        found.append(((Raveled(leaves),) if leaves else (), (group,)))
    return found


def _check_same(claim: Claim, states: States) -> None:
    """Claims on raveled coordinates are for states that keep their number."""
    totals = [sum(math.prod(a.shape) for a in state) for state in states]
    if claim != "dense" and not (isinstance(claim, Blocks) and claim.axis is not None) and len({total for total in totals if total}) > 1:
        raise ValueError(
            f"`structure={claim!r}` does not fit: it needs as many coordinates before as after every layer; got {', '.join(map(str, totals))}. "
            "Use 'auto', 'dense' or parscan.Blocks(axis=...)."
        )


def _listed(carry: Sequence[Any]) -> str:
    return ", ".join(map(describe, carry))
