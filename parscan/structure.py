"""The structure of a chain's Jacobians: what the user claims, what is proved, and the order of coordinates that shows it.

A `Layout` is an order of a state's coordinates in which every Jacobian of the chain is block-diagonal: vectors of length
n = blocks · width, block after block. Batch axes, heads and elementwise recurrences are all such blocks. Where layers change the
state, every state between two of them has a layout of its own, with the same blocks, of another width; a block may have no coordinate there.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from parscan.checks import describe, integer, is_inexact
from parscan.jacobians import BlockDiagonal, Dense, Diagonal
from parscan.jaxprs import Dependence, Program, dependence


@dataclass(frozen=True)
class Blocks:
    """A claim: the state falls into equal blocks that never mix. Taken at its word; a wrong claim is a wrong gradient.

    Args:
        axis: every leaf of the state has this axis, and an entry of the new state depends only on entries of the old one with the same
            index along it (a batch axis). Negative counts from the end.
        size: the state, raveled leaf after leaf, falls into consecutive blocks of this size.

    Example:
        >>> parscan.Blocks(axis=0)
        Blocks(axis=0, size=None)
    """

    axis: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if (self.axis is None) == (self.size is None):
            raise ValueError(f"`Blocks` needs exactly one of `axis` and `size`; got axis={self.axis!r}, size={self.size!r}.")
        if self.size is not None:
            object.__setattr__(self, "size", integer("Blocks(size=...)", self.size, 1))
        elif isinstance(self.axis, bool) or not isinstance(self.axis, Integral):
            raise ValueError(f"`Blocks(axis=...)` must be an integer; got {self.axis!r}.")


Claim = Blocks | str


def parse_structure(structure: Any) -> Claim | None:
    """A claim from a value or a name; `None` for `"auto"`.

    Raises:
        ValueError: the name is unknown. TypeError: neither a name nor a claim.
    """
    if isinstance(structure, Blocks):
        return structure
    if isinstance(structure, str):
        if structure in ("dense", "diagonal"):
            return structure
        if structure == "auto":
            return None
    kind = ValueError if isinstance(structure, str) else TypeError
    raise kind(f"`structure` must be 'auto', 'dense', 'diagonal', parscan.Blocks(axis=...) or parscan.Blocks(size=...); got {structure!r}.")


@dataclass(frozen=True)
class Part:
    """Leaves that share their blocks: leaf `leaves[i]`, its axes permuted by `orders[i]`, is (blocks, widths[i]). There may be none."""

    leaves: tuple[int, ...]
    orders: tuple[tuple[int, ...], ...]
    blocks: int
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        return sum(self.widths)


@dataclass(frozen=True)
class Layout:
    """An order of coordinates: parts one after another, every block padded with zeros to the widest part's width.

    shapes, dtypes: the leaves. dtype: the one floating-point dtype in which vectors are held, at least float32. `block_size` cuts the
    vector of all parts into blocks of that size instead (a claim in raveled order, whose blocks may straddle leaves).
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    dtype: Any
    parts: tuple[Part, ...]
    block_size: int | None = None

    @property
    def blocks(self) -> int:
        """How many blocks."""
        return sum(part.blocks * part.width for part in self.parts) // self.block_size if self.block_size else sum(part.blocks for part in self.parts)

    @property
    def width(self) -> int:
        """Side of a block."""
        return self.block_size or self._padded

    @property
    def _padded(self) -> int:
        return max((part.width for part in self.parts), default=0)

    @property
    def size(self) -> int:
        """Length of a vector."""
        return self.blocks * self.width

    def to_vector(self, leaves: Sequence[Array]) -> Array:
        """State leaves (..., *shape) as vectors (..., n); at least one leaf."""
        before = leaves[0].shape[: leaves[0].ndim - len(self.shapes[0])]
        pieces = []
        for part in self.parts:
            columns = [] if part.leaves else [jnp.zeros((*before, part.blocks, 0), self.dtype)]
            for leaf, order, width in zip(part.leaves, part.orders, part.widths, strict=True):
                x = leaves[leaf]
                lead = x.ndim - len(order)
                x = x.transpose(*range(lead), *(lead + axis for axis in order))
                columns.append(x.reshape(*x.shape[:lead], part.blocks, width).astype(self.dtype))
            whole = columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=-1)
            missing = self._padded - part.width
            whole = whole if missing == 0 else jnp.pad(whole, [(0, 0)] * (whole.ndim - 1) + [(0, missing)])
            pieces.append(whole.reshape(*whole.shape[:-2], part.blocks * self._padded))
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)

    def from_vector(self, vector: Array) -> list[Array]:
        """Vectors (..., n) as state leaves (..., *shape), each in its own dtype."""
        lead, block = vector.shape[:-1], 0
        leaves: list[Any] = [jnp.zeros((*lead, *shape), dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        blocks = vector.reshape(*lead, sum(part.blocks for part in self.parts), self._padded)
        for part in self.parts:
            whole, start = blocks[..., block : block + part.blocks, :], 0
            for leaf, order, width in zip(part.leaves, part.orders, part.widths, strict=True):
                shape = [self.shapes[leaf][axis] for axis in order]
                x = whole[..., start : start + width].reshape(*lead, *shape)
                back = sorted(range(len(order)), key=order.__getitem__)
                leaves[leaf] = x.transpose(*range(len(lead)), *(len(lead) + axis for axis in back)).astype(self.dtypes[leaf])
                start += width
            block += part.blocks
        return leaves


def kind_of(layouts: Sequence[Layout]) -> type[Any]:
    """The kind of the Jacobians between states with these layouts."""
    some = [layout for layout in layouts if layout.size]
    return Diagonal if all(layout.width == 1 for layout in some) else Dense if all(layout.blocks == 1 for layout in some) else BlockDiagonal


Steps = Sequence[tuple[Program, bool]]  # the layers of a chain; whether the layer is followed by its like, so that its states must share a layout


def layout_of(program: Program, structure: Claim | None) -> Layout:
    """The layout of a recurrence's differentiable carry: proved, or as claimed; see `layouts_of`."""
    return layouts_of([(program, True)], structure)[0]


def layouts_of(steps: Steps, structure: Claim | None) -> list[Layout]:
    """The layouts of a chain's differentiable states, one more than there are steps: proved, or as claimed.

    Raises:
        ValueError: the claim's size or axis does not fit the state.
    """
    states = _states(steps)
    wide = any(jnp.dtype(a.dtype).itemsize == 8 for state in states for a in state)
    dtype = jnp.dtype(jnp.float64 if wide else jnp.float32)
    if structure is None:
        parts, sizes = _proved(tuple(steps)), [None] * len(states)
    elif isinstance(structure, Blocks) and structure.axis is not None:
        parts, sizes = _claimed_axis(structure.axis, states), [None] * len(states)
    else:
        parts, sizes = _claimed_size(structure, states)
    return [
        Layout(tuple(tuple(a.shape) for a in state), tuple(a.dtype for a in state), dtype, some, size)
        for state, some, size in zip(states, parts, sizes, strict=True)
    ]


def _states(steps: Steps) -> list[list[Any]]:
    """The floating-point leaves of every state."""
    states = [program.avals[1] for program, _ in steps] + [steps[-1][0].out_avals[0]]
    return [[aval for aval in state if is_inexact(aval)] for state in states]


# --- claims ----------------------------------------------------------------------------------------------------------


def _claimed_axis(axis: int, states: Sequence[Sequence[Any]]) -> list[tuple[Part, ...]]:
    sizes, found = set(), []
    for state in states:
        orders, widths = [], []
        for aval in state:
            rank = len(aval.shape)
            if not -rank <= axis < rank:
                raise ValueError(f"`structure=Blocks(axis={axis})` does not fit: every leaf of the state needs that axis; got {_listed(state)}.")
            place = axis % rank
            orders.append((place, *(a for a in range(rank) if a != place)))
            sizes.add(aval.shape[place])
            widths.append(math.prod(aval.shape[:place] + aval.shape[place + 1 :]))
        found.append((tuple(range(len(state))), tuple(orders), tuple(widths)))
    if len(sizes) > 1:
        got = "; ".join(dict.fromkeys(_listed(state) for state in states))
        raise ValueError(f"`structure=Blocks(axis={axis})` does not fit: that axis needs one length in every leaf of the state; got {got}.")
    blocks = sizes.pop() if sizes else 0
    return [(Part(leaves, orders, blocks, widths),) if blocks else () for leaves, orders, widths in found]


def _claimed_size(structure: Claim, states: Sequence[Sequence[Any]]) -> tuple[list[tuple[Part, ...]], list[int | None]]:
    """Blocks in raveled order, and how wide they are in each state."""
    totals = [sum(math.prod(a.shape) for a in state) for state in states]
    if structure == "dense":
        widths = totals
    else:
        width = structure.size if isinstance(structure, Blocks) else 1
        assert width is not None
        widths = [width if total else 0 for total in totals]
        for state, total in zip(states, totals, strict=True):
            if total % width:
                raise ValueError(
                    f"`structure=Blocks(size={width})` does not fit: the state has {total} coordinates ({_listed(state)}), not a multiple of {width}."
                )
        if len({total for total in totals if total}) > 1:
            raise ValueError(
                f"`structure={structure!r}` does not fit: it needs as many coordinates before as after every layer; got {', '.join(map(str, totals))}. "
                "Use 'auto', 'dense' or parscan.Blocks(axis=...)."
            )
    raveled = [
        tuple(Part((i,), (tuple(range(len(a.shape))),), math.prod(a.shape), (1,)) for i, a in enumerate(state) if math.prod(a.shape)) for state in states
    ]
    return raveled, [width or None for width in widths]


def _listed(carry: Sequence[Any]) -> str:
    return ", ".join(map(describe, carry))


# --- proof -----------------------------------------------------------------------------------------------------------


Leaf = tuple[int, int]  # which state, which of its floating-point leaves


@dataclass(frozen=True)
class Component:
    """Leaves, of any states, that influence one another; `groups`: for every axis along which nothing mixes, which axis of each leaf it is."""

    members: tuple[Leaf, ...]
    groups: tuple[dict[Leaf, int], ...]

    def size(self, group: dict[Leaf, int], shapes: dict[Leaf, tuple[int, ...]]) -> int:
        return shapes[self.members[0]][group[self.members[0]]]

    def parts(self, groups: Sequence[dict[Leaf, int]], shapes: dict[Leaf, tuple[int, ...]], states: int) -> list[Part]:
        """The component's part of each state, blocks being taken along these groups."""
        blocks, found = math.prod(self.size(group, shapes) for group in groups), []
        for state in range(states):
            leaves = [leaf for leaf in self.members if leaf[0] == state]
            orders, widths = [], []
            for leaf in leaves:
                lead = [group[leaf] for group in groups]
                rest = [axis for axis in range(len(shapes[leaf])) if axis not in lead]
                orders.append((*lead, *rest))
                widths.append(math.prod(shapes[leaf][axis] for axis in rest))
            found.append(Part(tuple(i for _, i in leaves), tuple(orders), blocks, tuple(widths)))
        return found


@functools.lru_cache(maxsize=4096)
def _proved(steps: Steps) -> list[tuple[Part, ...]]:
    """The parts and blocks of every state that the jaxprs of the derivatives prove, for every input."""
    place = [0]
    for _, repeats in steps:
        place.append(place[-1] + (not repeats))
    states = _states(steps)
    shapes = {(p, i): tuple(a.shape) for p, state in zip(place, states, strict=True) for i, a in enumerate(state)}
    edges = [
        ((place[r + 1], new), (place[r], old), dims)
        for r, (program, _) in enumerate(steps)
        for new, depends in enumerate(_derivative_dependence(program))
        for old, dims in depends.items()
    ]
    components = [Component(tuple(some), _groups(some, shapes, edges)) for some in _components(list(shapes), edges)]
    chosen = _merged(components, shapes, place[-1] + 1)
    return [chosen[p] for p in place]


@functools.lru_cache(maxsize=4096)
def _derivative_dependence(program: Program) -> list[Dependence]:
    """Of every floating-point leaf of the new carry, on those of the old one."""
    consts, carry, x = program.avals
    floats = [i for i, aval in enumerate(carry) if is_inexact(aval)]

    def derivative(tangents, consts, carry, x):
        def new_carry(some):
            full = list(carry)
            for i, value in zip(floats, some, strict=True):
                full[i] = value
            return [leaf for leaf in program(consts, full, x)[0] if is_inexact(leaf)]

        return jax.jvp(new_carry, ([carry[i] for i in floats],), (list(tangents),))[1]

    closed = jax.make_jaxpr(derivative)([carry[i] for i in floats], consts, carry, x)
    return dependence(closed, range(len(floats)))


def active_leaves(
    program: Program, repeats: bool, consts: Sequence[int], carry: Sequence[int], xs: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The leaves of the carry, of the new carry and of y that have a derivative, given the leaves of consts, first carry and xs that have one.

    With `repeats` as `lax.scan` finds them: by following the derivative around the loop until nothing is added.
    """
    before = len(program.avals[0])
    influences = _influences(program)
    active = {*consts, *(before + i for i in carry), *(before + program.num_carry + i for i in xs)}
    if repeats:
        while new := {before + i for i in range(program.num_carry) if influences[i] & active} - active:
            active |= new
    old = tuple(i for i in range(program.num_carry) if before + i in active)
    reached = tuple(i for i, inputs in enumerate(influences) if inputs & active)
    moving = old if repeats else tuple(i for i in reached if i < program.num_new)
    return old, moving, tuple(i - program.num_new for i in reached if i >= program.num_new)


@functools.lru_cache(maxsize=4096)
def _influences(program: Program) -> list[frozenset[int]]:
    """For every leaf of the new carry, then of y: the inputs, counted through consts, carry and x, on which its derivative depends."""
    inputs = [aval for part in program.avals for aval in part]
    before, count = len(program.avals[0]), program.num_carry
    floats = [i for i, aval in enumerate(inputs) if is_inexact(aval)]
    outs = [aval for part in program.out_avals for aval in part]

    def derivative(tangents, inputs):
        def of_floats(some):
            full = list(inputs)
            for i, value in zip(floats, some, strict=True):
                full[i] = value
            new, ys = program(full[:before], full[before : before + count], full[before + count :])
            return [leaf for leaf in (*new, *ys) if is_inexact(leaf)]

        return jax.jvp(of_floats, ([inputs[i] for i in floats],), (list(tangents),))[1]

    closed = jax.make_jaxpr(derivative)([inputs[i] for i in floats], inputs)
    found = iter(dependence(closed, range(len(floats))))
    return [frozenset(floats[leaf] for leaf in next(found)) if is_inexact(aval) else frozenset() for aval in outs]


Edge = tuple[Leaf, Leaf, tuple[int | None, ...]]  # a new leaf, an old one that it depends on, and where the axes of that one went


def _components(leaves: list[Leaf], edges: Sequence[Edge]) -> list[list[Leaf]]:
    """Leaves that influence one another, directly or not."""
    label = {leaf: leaf for leaf in leaves}
    for new, old, _ in edges:
        a, b = label[new], label[old]
        if a != b:
            label = {leaf: min(a, b) if root in (a, b) else root for leaf, root in label.items()}
    return [[leaf for leaf in leaves if label[leaf] == root] for root in sorted(set(label.values()))]


def _groups(members: list[Leaf], shapes: dict[Leaf, tuple[int, ...]], edges: Sequence[Edge]) -> tuple[dict[Leaf, int], ...]:
    """The axes along which nothing in these leaves mixes."""
    inside = [edge for edge in edges if edge[0] in members]
    found = (_group(members, axis, shapes, inside) for axis in range(len(shapes[members[0]])))
    return tuple(group for group in found if group is not None)


def _group(members: list[Leaf], axis: int, shapes: dict[Leaf, tuple[int, ...]], edges: Sequence[Edge]) -> dict[Leaf, int] | None:
    """The axis of each leaf that corresponds to `axis` of the first leaf, if no dependence mixes along them."""
    group, pending = {members[0]: axis}, True
    while pending:
        pending = False
        for new, old, dims in edges:
            moved = dims[group[old]] if old in group else None
            if new not in group and moved is not None:  # not `MIXED`
                group[new], pending = moved, True
            if new in group and old not in group and group[new] in dims:
                group[old], pending = dims.index(group[new]), True
    if set(group) != set(members):
        return None
    kept = all(dims[group[old]] == group[new] for new, old, dims in edges)
    equal = len({shapes[leaf][a] for leaf, a in group.items()}) == 1
    return group if kept and equal else None


def _merged(components: Sequence[Component], shapes: dict[Leaf, tuple[int, ...]], states: int) -> list[tuple[Part, ...]]:
    """For every state: the components side by side, every block as wide as the widest, or joined into wider blocks, whatever costs less."""
    components = [c for c in components if any(0 not in shapes[leaf] for leaf in c.members)]
    choices = []  # for each component: blocks -> parts
    for component in components:
        subsets = (some for count in range(len(component.groups), -1, -1) for some in itertools.combinations(component.groups, count))
        choices.append({})
        for some in subsets:
            choices[-1].setdefault(math.prod(component.size(group, shapes) for group in some), component.parts(some, shapes, states))
    if not components:
        return [()] * states
    apart = [next(iter(choice.values())) for choice in choices]  # along all groups
    tried = [[tuple(parts[state] for parts in apart) for state in range(states)]]
    for blocks in sorted(set.intersection(*(set(choice) for choice in choices)), reverse=True) if len(choices) > 1 else ():
        tried.append([(_joined([choice[blocks][state] for choice in choices]),) for state in range(states)])
    return min(tried, key=_cost)


def _cost(states: Sequence[tuple[Part, ...]]) -> int:
    """Numbers in the Jacobians of one layer each."""
    widths = [max(part.width for part in parts) for parts in states]
    blocks = sum(part.blocks for part in states[0])
    return sum(blocks * a * b for a, b in zip(widths, widths[1:] or widths, strict=False))


def _joined(parts: list[Part]) -> Part:
    leaves = tuple(leaf for part in parts for leaf in part.leaves)
    orders = tuple(order for part in parts for order in part.orders)
    return Part(leaves, orders, parts[0].blocks, tuple(width for part in parts for width in part.widths))
