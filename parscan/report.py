"""`Plan`: what was chosen for a chain, why, and what it costs, as plain fields, as a line, as a table and as a picture.

What a plan costs to say is computed when somebody asks: plans are made at every trace of a scan, and few are read.
"""

from __future__ import annotations

import functools
import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from parscan import costs, drawing, notebook, timing
from parscan.checks import is_inexact, named_leaves
from parscan.claims import Claim
from parscan.costs import STAGES, Step
from parscan.jaxprs import Mixing, Program, mixings
from parscan.layout import Layout, in_words
from parscan.machines import machine
from parscan.methods import BY_NAME, Method, sized
from parscan.proof import Derivative, derivative
from parscan.structure import Structure

WIDTH = 100  # columns of a terminal
WIDE = 32  # side of a dense block from which on it is said what would make it cheaper
MOST_WHY = 6  # sentences of `why` that a table shows


class Given(NamedTuple):
    """What a plan was made from.

    steps, structures: of the chain, `structures` being None if it is left to JAX. claim: of the structure, if there is one. names: of the
    floating-point leaves of the states before, between and after the steps, as the user writes them, if they are known.
    """

    steps: tuple[Step, ...]
    structures: tuple[Structure, ...] | None
    platform: str
    claim: Claim | None = None
    names: tuple[tuple[str, ...], ...] | None = None


@dataclass(frozen=True, repr=False)
class Plan:
    """What was chosen for a chain, why, and what its backward pass costs. `print` shows it as a table.

    Attributes:
        kind: name of the Jacobians' kind, such as `"Dense"`, `"BlockDiagonal"`, `"Diagonal"`, or `"none"` where there are none.
        blocks: from block size to how many; the widest where layers change the width.
        method: the method, its sizes chosen.
        reason: why, in words.
        length: number of steps, or of layers.
        runs: how many layers in each run of equal neighbours, which are batched; `(length,)` for a recurrence.
        stretches: the plans of stretches of a network that are crossed by different methods. Then `kind`, `blocks`, `method` are those of
            the longest, the costs are sums.

    Example:
        >>> parscan.plan(f, init, xs, method="walk").length == len(xs)
        True
        >>> parscan.plan(f, init, xs, method="tree")
        Plan(Diagonal, {1: 4}, Tree(), length 16)
    """

    kind: str
    blocks: dict[int, int]
    method: Method
    reason: str
    length: int
    runs: tuple[int, ...] = ()
    stretches: tuple[Plan, ...] = ()
    _given: Given | None = field(default=None, compare=False)

    def __hash__(self) -> int:
        return hash((self.kind, tuple(self.blocks.items()), self.method, self.reason, self.length, self.runs))

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, keeps what the plan says, but not the programs that it says it of."""
        return {**self.__dict__, "_costs": self._costs, "_told": self._told, "why": self.why, "_given": None}

    # --- what it costs, computed when asked for -----------------------------------------------------------------------------

    @functools.cached_property
    def _costs(self) -> tuple[int, dict[str, int], dict[str, int]]:
        if self.stretches:
            return costs.summed([plan._costs for plan in self.stretches])
        return (costs.Costs() if self._given is None else costs.costs(self._given.steps, self._given.structures, self.method)).plain()

    @property
    def depth(self) -> int:
        """Operations that must follow one another.

        They are vectors pushed through steps, products, products with a vector; stacked ones count as one.
        """
        return self._costs[0]

    @property
    def flops(self) -> dict[str, int]:
        """Floating-point operations of the cotangents of all states, stage by stage.

        The stages are `"forming"` Jacobians, their products (`"up-sweep"`), the vectors (`"down-sweep"`), their `"total"`, and a `"sequential"` pass.
        """
        return dict(self._costs[1])

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of what the stages of `flops` make.

        They are the Jacobians held at once, all their products, the cotangents.
        """
        return dict(self._costs[2])

    @functools.cached_property
    def _told(self) -> dict[str, tuple[float, int]]:
        given = self._given
        if given is None or given.structures is None or len(given.steps) != 1 or not given.steps[0].repeats:
            return {}
        (step,), (structure,) = given.steps, given.structures
        found = {}
        for kind in BY_NAME.values():
            method = sized(self.method if isinstance(self.method, kind) else kind(), step.count, self.blocks)
            time = timing.seconds(step, structure, method, machine(given.platform), given.platform)
            if time is not None:
                found[kind.__name__] = time, timing.held(step, structure, method)
        return found

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of a value and gradient by every method, under its name, its sizes chosen, as the model of the machine tells them.

        Forward loop and all; of one recurrence that JAX can transpose; else empty.
        """
        return {name: time for name, (time, _) in self._told.items()}

    @property
    def held(self) -> dict[str, int]:
        """Bytes that this gradient holds at once, about, by every method.

        They are states, cotangents, and what linearises as many steps as are taken together, with their maps.
        """
        return {name: size for name, (_, size) in self._told.items()}

    def levels(self) -> list[tuple[int, str, int]]:
        """What the maps of a tree over equal steps are, at every level. A kind that grows under products is seen to fill in here.

        Returns:
            (level, kind, bytes of one map) of every level, 0 being the steps' own Jacobians; of a chunked method the maps of its chunks.

        Raises:
            ValueError: the chain has several runs of layers, or no Jacobians.

        Example:
            >>> parscan.plan(f, init, xs, method="tree").levels()[0]
            (0, 'Diagonal', 16)
        """
        if len(self.runs) != 1 or self._given is None or self._given.structures is None:
            raise ValueError(f"`levels` is for the Jacobians of one run of equal steps; this is {self!r}: {self.reason}.")
        return costs.levels(self._given.structures[0], self.method, self.length)

    # --- why ------------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def why(self) -> tuple[str, ...]:
        """Why the Jacobians have this structure, in words.

        Which equation mixes what; what would have to change for a wide dense block to be cheaper.
        """
        if self.stretches:
            return tuple(dict.fromkeys(said for plan in self.stretches for said in plan.why))
        if self._given is None or self._given.structures is None:
            return ()
        if self._given.claim is not None:
            return (f"claimed: structure={self._given.claim!r}, taken at its word",)
        said = tuple(dict.fromkeys(sentence for r in range(len(self._given.steps)) for sentence in _sentences(self._given, r)))
        return (*said, *_advice(self.kind, self.blocks))

    def named(self, states: Sequence[Any], base: str) -> Plan:
        """The same plan, which calls the leaves of the state by their names.

        Args:
            states: pytrees like the states before, between and after the runs of layers; for a recurrence the one before and the one after.
            base: what the user's function calls the state.
        """
        names = [tuple(name for name, _ in named_leaves(base, state)) for state in states]
        ends = list(itertools.accumulate((len(plan.runs) for plan in self.stretches), initial=0))
        stretches = (plan._with_names(names[lo : hi + 1]) for plan, (lo, hi) in zip(self.stretches, itertools.pairwise(ends), strict=True))
        return replace(self._with_names(names), stretches=tuple(stretches))

    def _with_names(self, names: Sequence[tuple[str, ...]]) -> Plan:
        """Of all leaves of the states, of which the floating-point ones are kept."""
        if self._given is None:
            return self
        states = (*(step.program.avals[1] for step in self._given.steps), self._given.steps[-1].program.out_avals[0])
        floats = (tuple(n for n, a in zip(some, state, strict=True) if is_inexact(a)) for some, state in zip(names, states, strict=True))
        return replace(self, _given=self._given._replace(names=tuple(floats)))

    # --- a line, a table, a picture -----------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        several = f", in {len(self.stretches)} stretches" if self.stretches else ""
        return f"Plan({self.kind}, {self.blocks}, {self.method}, length {self.length}{several})"

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def spy(self, ax: Any = None) -> Any:
        """Draws where one step's Jacobian may be non-zero, its coordinates in the order of the blocks, and the blocks.

        Of layers that differ, those of the longest run; of stretches, of the longest. Needs matplotlib.

        Args:
            ax: matplotlib Axes to draw on; new ones if not given.

        Returns:
            the Axes.

        Raises:
            ValueError: no Jacobians are formed. ImportError: there is no matplotlib.

        Example:
            >>> parscan.plan(f, init, xs, method="tree").spy().get_title()
            'Diagonal: 4 blocks of 1'
        """
        found = self._shown()
        if found is None:
            shown = self._longest()
            raise ValueError(f"There is no Jacobian to draw in {shown!r}: {shown.reason}.")
        step, structure, names = found
        return drawing.spy(structure, derivative(step.program).pattern, names, ax)

    def _repr_html_(self) -> str:
        """What notebooks show: the table, and a picture of the blocks."""
        found = self._shown()
        picture = ""
        if found is not None and min(found[1].before.size, found[1].after.size):
            step, structure, _ = found
            small = max(structure.before.size, structure.after.size) <= drawing.MOST_DRAWN
            picture = notebook.picture(structure, derivative(step.program).pattern if small else None)
        return notebook.page(_words(self), _numbers(self), picture)

    def _longest(self) -> Plan:
        """Of stretches, the one that stands for all; else the plan itself."""
        return max(self.stretches, key=lambda plan: (plan.method.is_parallel, plan.length), default=self)

    def _shown(self) -> tuple[Step, Structure, tuple[list[str], list[str]]] | None:
        """The step whose Jacobian is drawn, that one's structure, and what the leaves of both states are called; None if none is formed."""
        given = self._longest()._given
        if given is None or given.structures is None:
            return None
        r = max(range(len(given.steps)), key=lambda r: given.steps[r].count)
        structure = given.structures[r]
        before, after = ([name.strip("`") for name in _names(given, r + i, len(layout.shapes))] for i, layout in enumerate((structure.before, structure.after)))
        return given.steps[r], structure, (before, after)


# --- why: in words --------------------------------------------------------------------------------------------------------


def _mixings(program: Program) -> list[Mixing]:
    """The equations of a step's derivative that mix entries along an axis. Of this very program: an equal one may stand elsewhere in the user's files."""
    own = Derivative(program)
    return mixings(own.closed, own.tangents)


def _sentences(given: Given, r: int) -> Iterator[str]:
    """What mixes what in step r."""
    assert given.structures is not None
    layout, names = given.structures[r].before, _names(given, r, len(given.structures[r].before.shapes))
    mixed: dict[tuple[str, int, bool], list[int]] = {}
    for one in _mixings(given.steps[r].program):
        if layout.shapes[one.leaf][one.axis] > 1:
            mixed.setdefault((one.eqn, one.leaf, one.moves), []).append(one.axis)
    for (eqn, leaf, moves), places in mixed.items():
        axes = f"{_listed([_axis(axis, len(layout.shapes[leaf])) for axis in places])} of {names[leaf]}"
        yield f"{eqn} moves entries of {axes}, and what follows mixes them" if moves else f"{eqn} mixes {axes}"
    if not mixed and max(layout.blocks, default=0) <= 1:
        yield "no equation mixes coordinates"
    elif not mixed and len(names) > 1:
        yield f"no equation mixes entries along an axis, but {_listed(names)} depend on one another"
    for leaf, others in _ties(layout):
        yield f"{names[leaf]}, a single number, is in one block with {others} others: as an integer, or an input, it would tie nothing"


def _ties(layout: Layout) -> Iterator[tuple[int, int]]:
    """Leaves of a single coordinate that are in a block with more than another, and with how many."""
    sizes, start = [math.prod(shape) for shape in layout.shapes], 0
    single = {sum(sizes[:leaf]): leaf for leaf, size in enumerate(sizes) if size == 1 and len(sizes) > 1}
    if not single:
        return
    order = layout.order()
    for group in layout.groups:
        own = order[start : start + group.size]
        yield from ((leaf, group.side - 1) for place, leaf in single.items() if group.side > 2 and place in own)
        start += group.size


def _names(given: Given, state: int, count: int) -> tuple[str, ...]:
    """How sentences call the floating-point leaves of a state."""
    if given.names is not None:
        return tuple(f"`{name}`" for name in given.names[state])
    return ("the state",) if count == 1 else tuple(f"leaf {i} of the state" for i in range(count))


def _axis(axis: int, rank: int) -> str:
    return "the only axis" if rank == 1 else "the last axis" if axis == rank - 1 else f"axis {axis}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]


def _advice(kind: str, blocks: dict[int, int]) -> Iterator[str]:
    """What in the layer would have to change for a wide dense block to be structured."""
    wide = max(blocks, default=0)
    if kind in ("Dense", "BlockDiagonal") and wide >= WIDE:
        yield (
            f"a block of {wide} is dense since all its coordinates meet there; heads or groups (a block-diagonal weight), an elementwise recurrence "
            "(a * h in the place of h @ W) or a weight that is diagonal plus low rank would make it cheaper"
        )


# --- a table --------------------------------------------------------------------------------------------------------------


def _lines(plan: Plan) -> Iterator[str]:
    for label, text in _words(plan):
        yield from _entry(label, text)
    for (label, *headings), lines in _numbers(plan):
        yield f"{label:12}{headings[0]:>9}{headings[1]:>11}"
        for name, first, second in lines:
            yield f"{name:12}{first:>9}{second:>11}".rstrip()


def _words(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "method", f"{plan.method}, length {plan.length}"
    if not plan.stretches:
        yield "reason", plan.reason
    for i, one in enumerate(plan.stretches, 1):
        yield f"stretch {i}", f"{one.length} layer{'s' if one.length != 1 else ''} by {one.method}, {_structure(one)}: {one.reason}"
    yield "structure", _structure(plan)
    for i, said in enumerate(plan.why[:MOST_WHY]):
        yield "why" if i == 0 else "", said
    if len(plan.why) > MOST_WHY:
        yield "", f"… and {len(plan.why) - MOST_WHY} more, see `why`"
    yield "depth", f"{plan.depth} operations one after another; {plan.length} steps"


def _numbers(plan: Plan) -> Iterator[tuple[tuple[str, str, str], list[tuple[str, str, str]]]]:
    """Headings and lines of what is counted, and of what is told."""
    yield ("", "FLOPs", "bytes"), [(stage, _human(plan.flops[stage], ""), _human(plan.bytes[stage], "B")) for stage in (*STAGES, "total", "sequential")]
    if plan._told:
        yield ("gradient by", "told", "holds"), [(name, timing.in_words(time), _human(held, "B")) for name, (time, held) in plan._told.items()]


def _human(number: int, unit: str) -> str:
    """Such as `128 kB`; without thousands a blank takes their place, so that digits stand below digits."""
    value, thousands = costs.human(number)
    return f"{value} {thousands}{unit}{'' if thousands else ' '}"


def _entry(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{label:12}", subsequent_indent=" " * 12, break_on_hyphens=False)


def _structure(plan: Plan) -> str:
    return f"{plan.kind}, {in_words(plan.blocks, ', ')}" if plan.blocks else f"kind {plan.kind}"
