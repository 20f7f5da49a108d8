"""What the jaxprs of the layers' derivatives prove of a chain's Jacobians, for every input.

First axis by axis: which leaves influence one another, and along which axes nothing in them mixes. The cost is the number of equations, whatever the
width. Where that leaves blocks, and the state is not too large, coordinate by coordinate: the connected components of
the graph of all dependences, over all layers together, and inside a block the pattern of its entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from parscan.checks import is_inexact
from parscan.jacobians import Evidence, Index, Pattern
from parscan.jaxprs import Dependence, Program, components, dependence, equations, in_floats, influenced_by, moves_only, pattern, variation
from parscan.layout import ByAxes, Group, Layout, Order, Raveled

Steps = tuple[tuple[Program, bool], ...]  # the layers of a chain; whether the layer is followed by its like, so that its states share a layout
Leaf = tuple[int, int]  # which state, which of its floating-point leaves

ELEMENTS = 2**22  # elements of all variables together up to which dependences are followed one by one
ENTRIES = 2**21  # entries of a pattern up to which it is written down
SMALLEST = 2  # blocks of this width on may be of a special kind


@dataclass(frozen=True)
class Proof:
    """Of every state its parts and groups; of every step the evidence for each group, along which axes of each all blocks are the same, and whether all
    steps of its like are one linear map."""

    orders: list[Order]
    evidence: list[tuple[Evidence, ...]]
    shared: list[tuple[tuple[bool, ...], ...]]
    same: list[bool]


@dataclass(frozen=True)
class Component:
    """Leaves, of any states, that influence one another; `groups`: for every axis along which nothing mixes, which axis of each leaf it is."""

    members: tuple[Leaf, ...]
    groups: tuple[dict[Leaf, int], ...]


@dataclass(frozen=True)
class Block:
    """A component in every state: its part there, if there is one, and its groups; for every step, along which axes of each group all is the same."""

    parts: list[ByAxes | Raveled | None]
    groups: list[list[Group]]
    shared: list[list[tuple[bool, ...]]]


def states_of(steps: Steps) -> list[list[Any]]:
    """Of every state of a chain, the abstract values of its floating-point leaves."""
    states = [*(program.avals[1] for program, _ in steps), steps[-1][0].out_avals[0]]
    return [[aval for aval in state if is_inexact(aval)] for state in states]


@functools.lru_cache(maxsize=4096)
def proved(steps: Steps) -> Proof:
    """The proof for a chain of layers."""
    chain = _Chain(steps)
    blocks = _side_by_side([chain.block(component) for component in chain.components])
    orders = [(tuple(part for block in blocks if (part := block.parts[p]) is not None), tuple(g for b in blocks for g in b.groups[p])) for p in chain.place]
    shared = [tuple(s for block in blocks for s in block.shared[r]) for r in range(len(steps))]
    return Proof(orders, [chain.evidence(r, orders) for r in range(len(steps))], shared, [derivative(program).same for program, _ in steps])


class Derivative:
    """The derivative of a layer in its state: a program linear in the tangents of the state's floating-point leaves, which come first among its inputs.

    Whatever is proved of it is proved once.
    """

    def __init__(self, program: Program):
        consts, carry, x = program.avals
        floats = [aval for aval in carry if is_inexact(aval)]
        self.tangents = range(len(floats))
        self.known = {len(floats) + i: value for i, value in program.known.items()}
        self.moving = range(len(floats) + len(consts), len(floats) + len(consts) + len(carry) + len(x))

        def push(tangents, consts, carry, x):
            new_carry, places = in_floats(lambda full: program(consts, full, x)[0], carry)
            return jax.jvp(new_carry, ([carry[i] for i in places],), (list(tangents),))[1]

        self.closed = jax.make_jaxpr(push)(floats, consts, carry, x)

    @functools.cached_property
    def dependence(self) -> list[Dependence]:
        """Of every leaf of the new state, on those of the old one."""
        return dependence(self.closed, self.tangents)

    @functools.cached_property
    def variation(self) -> list[frozenset[int]]:
        """Of every leaf of the new state, the axes along which its coefficients may vary."""
        return variation(self.closed, self.tangents)

    @functools.cached_property
    def components(self) -> tuple[np.ndarray, np.ndarray] | None:
        return components(self.closed, self.tangents, self.known, ELEMENTS)

    @functools.cached_property
    def pattern(self) -> Any:
        return pattern(self.closed, self.tangents, self.known, ENTRIES)

    @functools.cached_property
    def moves(self) -> bool:
        """Whether every coefficient is 1."""
        return moves_only(self.closed, self.tangents)

    @functools.cached_property
    def gathers(self) -> bool:
        """Whether anything is taken by index, which may lie outside."""
        return any(eqn.primitive.name == "gather" for eqn in equations(self.closed))

    @functools.cached_property
    def same(self) -> bool:
        """Whether it depends neither on the state nor on the inputs of the step: then all steps are one linear map."""
        outs = len(self.closed.jaxpr.outvars)
        return outs > 0 and not influenced_by(self.closed, range(outs), self.moving)


@functools.lru_cache(maxsize=4096)
def derivative(program: Program) -> Derivative:
    """The derivative of a program: one for all programs with the same equations."""
    return Derivative(program)


class _Chain:
    """A chain of layers as a graph. States that must share a layout have one `place`."""

    def __init__(self, steps: Steps):
        self.steps = steps
        self.place = [0]
        for _, repeats in steps:
            self.place.append(self.place[-1] + (not repeats))
        self.shapes = {(p, i): tuple(a.shape) for p, state in zip(self.place, states_of(steps), strict=True) for i, a in enumerate(state)}
        self.states = self.place[-1] + 1
        self.edges = [
            ((self.place[r + 1], new), (self.place[r], old), dims)
            for r, (program, _) in enumerate(steps)
            for new, depends in enumerate(derivative(program).dependence)
            for old, dims in depends.items()
        ]
        found = [Component(tuple(some), _groups(some, self.shapes, self.edges)) for some in _components(list(self.shapes), self.edges)]
        self.components = [c for c in found if any(0 not in self.shapes[leaf] for leaf in c.members)]

    # --- blocks of a component --------------------------------------------------------------------------------------------

    def block(self, component: Component) -> Block:
        """By axes, or coordinate by coordinate where that tells more."""
        widths = [sum(self._rest(component, leaf) for leaf in component.members if leaf[0] == state) for state in range(self.states)]
        if max(widths) > 1:
            return self._by_coordinates(component, math.prod(self._counts(component, range(len(component.groups))))) or self._by_axes(component, False)
        return self._by_axes(component, True)

    def _rest(self, component: Component, leaf: Leaf) -> int:
        """Entries of a leaf for each index along the axes that do not mix."""
        gone = {group[leaf] for group in component.groups}
        return math.prod(size for axis, size in enumerate(self.shapes[leaf]) if axis not in gone)

    def _counts(self, component: Component, axes: Sequence[int]) -> tuple[int, ...]:
        first = component.members[0]
        return tuple(self.shapes[first][component.groups[axis][first]] for axis in axes)

    def uniform(self, r: int, component: Component, axis: int) -> bool:
        """Whether in step r all blocks along an axis of the component are the same."""
        new = [leaf for leaf in component.members if leaf[0] == self.place[r + 1]]
        return all(component.groups[axis][leaf] not in derivative(self.steps[r][0]).variation[leaf[1]] for leaf in new)

    def _by_axes(self, component: Component, elementwise: bool) -> Block:
        """Blocks are counted along the axes that do not mix. Of an elementwise component only those are, along which all is the same."""
        axes = range(len(component.groups))
        if elementwise:
            axes = [axis for axis in axes if all(self.uniform(r, component, axis) for r in range(len(self.steps)))]
        counts, parts, groups = self._counts(component, axes), [], []
        for state in range(self.states):
            leaves = [leaf for leaf in component.members if leaf[0] == state]
            orders, widths = [], []
            for leaf in leaves:
                lead = [component.groups[axis][leaf] for axis in axes]
                rest = [axis for axis in range(len(self.shapes[leaf])) if axis not in lead]
                orders.append((*lead, *rest))
                widths.append(math.prod(self.shapes[leaf][axis] for axis in rest))
            parts.append(ByAxes(tuple(i for _, i in leaves), tuple(orders), counts, tuple(widths)) if leaves else None)
            groups.append([Group(counts, sum(widths), elementwise)])
        return Block(parts, groups, [[tuple(self.uniform(r, component, axis) for axis in axes)] for r in range(len(self.steps))])

    # --- coordinate by coordinate -------------------------------------------------------------------------------------------

    @functools.cached_property
    def labels(self) -> dict[Leaf, np.ndarray] | None:
        """For every coordinate the component that it is in, over the whole chain; None if some layer is too large."""
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import connected_components

        bounds, total = {}, 0
        for leaf, shape in self.shapes.items():
            bounds[leaf], total = total, total + math.prod(shape)
        edges = []
        for r, (program, _) in enumerate(self.steps):
            found = derivative(program).components
            if found is None:
                return None
            for labels, state in zip(found, (self.place[r], self.place[r + 1]), strict=True):
                own = [leaf for leaf in self.shapes if leaf[0] == state]
                nodes = np.concatenate([bounds[leaf] + np.arange(math.prod(self.shapes[leaf])) for leaf in own]) if own else np.zeros(0, int)
                edges.append((nodes, total + labels))
            total += int(max((labels.max(initial=-1) for labels in found), default=-1)) + 1
        nodes, hubs = (np.concatenate(side) for side in zip(*edges, strict=True))
        _, label = connected_components(csr_array((np.ones(len(nodes), bool), (nodes, hubs)), shape=(total, total)), directed=False)
        return {leaf: label[start : start + math.prod(self.shapes[leaf])] for leaf, start in bounds.items()}

    def _by_coordinates(self, component: Component, known: int) -> Block | None:
        """None if there are no more blocks than the `known` ones."""
        if self.labels is None:
            return None
        members = {state: [leaf for leaf in component.members if leaf[0] == state] for state in range(self.states)}
        of = {state: np.concatenate([self.labels[leaf] for leaf in some]) if some else np.zeros(0, int) for state, some in members.items()}
        names, firsts, inverse = np.unique(np.concatenate(list(of.values())), return_index=True, return_inverse=True)
        if len(names) <= known:
            return None
        split = np.split(inverse, np.cumsum([len(of[state]) for state in range(self.states)])[:-1])
        sizes = np.stack([np.bincount(some, minlength=len(names)) for some in split], axis=1)  # of every block, in every state
        by_size = np.lexsort((firsts, *sizes.T))
        kinds, starts, counts = np.unique(sizes[by_size], axis=0, return_index=True, return_counts=True)
        rank = np.empty(len(names), int)
        rank[by_size] = np.arange(len(names))
        parts, groups = [], []
        order = np.argsort(starts)
        for state in range(self.states):
            index = np.argsort(rank[split[state]], kind="stable")
            trivial = np.array_equal(index, np.arange(len(index)))
            leaves = tuple(i for _, i in members[state])
            parts.append(Raveled(leaves, None if trivial else Index(index)) if leaves else None)
            groups.append([_group(kinds[k], int(counts[k]), int(kinds[k][state])) for k in order])
        shared: list[tuple[bool, ...]] = [(False,) * len(group.counts) for group in groups[0]]
        return Block(parts, groups, [shared] * len(self.steps))

    # --- inside the blocks --------------------------------------------------------------------------------------------------------

    def evidence(self, r: int, orders: Sequence[Order]) -> tuple[Evidence, ...]:
        """What is known of the blocks of every group in step r."""
        (parts, before), (_, after) = orders[r], orders[r + 1]
        proof, entries = derivative(self.steps[r][0]), None
        if any(max(a.width, b.width) >= SMALLEST and not a.elementwise for a, b in zip(before, after, strict=True)) and proof.pattern is not None:
            rows, columns = proof.pattern.nonzero()
            entries = self._positions(r + 1, orders)[rows], self._positions(r, orders)[columns]
        moved = proof.moves and all(depends for depends in proof.dependence)
        found, row, column = [], 0, 0
        for a, b in zip(before, after, strict=True):
            shape, inside = (b.width, a.width), None
            if a.elementwise:
                found.append(Evidence(shape, moves=moved and not proof.gathers and not any(isinstance(part, Raveled) for part in parts)))
            else:
                if entries is not None and max(shape) >= SMALLEST:
                    own = (entries[1] >= column) & (entries[1] < column + a.size)
                    inside = Pattern(shape, (entries[0][own] - row) % max(b.width, 1), (entries[1][own] - column) % max(a.width, 1))
                found.append(Evidence(shape, inside, proof.moves))
            row, column = row + b.size, column + a.size
        return tuple(found)

    def _positions(self, state: int, orders: Sequence[Order]) -> np.ndarray:
        """Where each coordinate of a state, its leaves raveled one after another, stands in the vector."""
        shapes = tuple(shape for leaf, shape in self.shapes.items() if leaf[0] == self.place[state])
        order = Layout(shapes, (), None, *orders[state]).order()
        found = np.full(sum(map(math.prod, shapes)), -1)
        found[order] = np.arange(len(order))
        return found


def _side_by_side(blocks: Sequence[Block]) -> list[Block]:
    """Elementwise components whose groups have the same axes become one."""
    found: list[Block] = []
    places: dict[tuple[int, ...], int] = {}
    for block in blocks:
        group = block.groups[0][0]
        joinable = group.elementwise and all(part is None or isinstance(part, ByAxes) for part in block.parts)
        if joinable and group.counts in places:
            found[places[group.counts]] = _joined(found[places[group.counts]], block)
            continue
        if joinable:
            places[group.counts] = len(found)
        found.append(block)
    return found


def _joined(a: Block, b: Block) -> Block:
    parts, groups = [], []
    for p, q, (g,), (h,) in zip(a.parts, b.parts, a.groups, b.groups, strict=True):
        if isinstance(p, ByAxes) and isinstance(q, ByAxes):
            parts.append(ByAxes(p.leaves + q.leaves, p.orders + q.orders, p.counts, p.widths + q.widths))
        else:
            parts.append(p or q)
        groups.append([Group(g.counts, g.width + h.width, True)])
    return Block(parts, groups, a.shared)


def _group(sizes: np.ndarray, count: int, width: int) -> Group:
    """Blocks that have these sizes in the states."""
    return Group((), count * width, elementwise=True) if sizes.max() <= 1 else Group((count,), width)


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
    found = (_group_of(members, axis, shapes, inside) for axis in range(len(shapes[members[0]])))
    return tuple(group for group in found if group is not None)


def _group_of(members: list[Leaf], axis: int, shapes: dict[Leaf, tuple[int, ...]], edges: Sequence[Edge]) -> dict[Leaf, int] | None:
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


# --- which leaves have a derivative at all ------------------------------------------------------------------------------------


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
    outs = [aval for part in program.out_avals for aval in part]
    floats = [i for i, aval in enumerate(inputs) if is_inexact(aval)]

    def derivative(tangents, inputs):
        of_floats, places = in_floats(program.flat, inputs)
        return jax.jvp(of_floats, ([inputs[i] for i in places],), (list(tangents),))[1]

    closed = jax.make_jaxpr(derivative)([inputs[i] for i in floats], inputs)
    found = iter(dependence(closed, range(len(floats))))
    return [frozenset(floats[leaf] for leaf in next(found)) if is_inexact(aval) else frozenset() for aval in outs]
