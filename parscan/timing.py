"""How long a gradient takes, told from what its programs compute: the model by which `method="auto"` chooses on a CPU, and that a plan prints.

The gradient is that of `jax.value_and_grad`, forward loop and all, every state being read; it is taken in the constants of the step and in the first
state, in the inputs where there are no constants. Its time is a sum of a few physical terms, each a count of what a program does times what a
`Machine` takes for one. Where XLA makes a single kernel of a loop, a step costs that and its arithmetic; where not, every kernel of the step is launched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from parscan import memory
from parscan.checks import is_inexact
from parscan.costs import Step, costs, push_flops
from parscan.jaxprs import Program, Work, cut_ahead, made_by_products, repeated, residuals, work, work_on
from parscan.machines import FUSES_LOOPS, Machine
from parscan.methods import Lax, Method, Sequential, Travelling
from parscan.structure import Structure

KEPT, HANDED_OUT = 0.7 * 2**25, 1.1 * 2**25  # bytes up to which a C library keeps memory for the next call, and from which on the system hands it out
# anew at every call, page by page: around glibc's limit, of which other arrays take a part
CACHED, FEWEST = 2**21, 8  # bytes of what passes that stay in cache, and steps of a segment, at least
SMALL_LOOP = 80  # numbers that a step reads and writes up to which XLA makes one kernel of it on a CPU where not `FUSES_LOOPS`


class Loop(NamedTuple):
    """A step of a loop.

    work: what it computes. slots, entries: the arrays that it reads or writes of those that hold all steps, and their entries. touched: their entries,
    with those of what is carried or shared.
    """

    work: Work
    slots: int = 0
    entries: int = 0
    touched: int = 0

    @property
    def is_fused(self) -> bool:
        """Whether XLA's compiler for CPUs makes one kernel of it."""
        return not self.work.alone and (self.touched < SMALL_LOOP or (FUSES_LOOPS and not self.work.calls))

    def grown(self, slots: int, entries: int, beside: int, more: Work | None = None) -> Loop:
        """With more arrays of all steps, and so many entries that are carried or shared."""
        total = self.entries + entries
        return Loop(self.work + (more or Work()), self.slots + slots, total, total + beside)


class Parts(NamedTuple):
    """The work of one step.

    linearising: of the step and of what its derivatives are made of. whole: of pulling the cotangents of the new state, and of outputs that are none of it,
    back to the state and to the constants, all that being at hand; back: those of the new state to the state alone. at_once: of linearising many steps
    together, and of pulling their cotangents back to the constants: of `ALONG` steps. stays, passes: entries of every step that a gradient through a loop of
    cotangents alone holds from its first pass to its last, and of every step that is linearised at once, about: as XLA's buffers show. loop: those that
    JAX's own gradient holds.
    """

    linearising: Loop
    whole: Loop
    back: Loop
    at_once: Work
    stays: int
    passes: int
    loop: int

    @property
    def waits_little(self) -> bool:
        """Whether JAX's own gradient runs as two small kernels."""
        return not self.whole.work.alone and max(self.linearising.touched, self.whole.touched) < SMALL_LOOP


ALONG = 1024


@functools.lru_cache(maxsize=1024)
def parts(program: Program) -> Parts | None:
    """Of a step; None if JAX cannot transpose it."""
    consts, carry, x = program.avals
    weights = [a for a in consts if is_inexact(a)]
    wanted = (0, 1) if weights else (1, 2)
    with jax.numpy_rank_promotion("allow"):  # a setting for the user's step, which has been traced
        try:
            everything, whole = _pulled(program, wanted)
        except ValueError:  # JAX's word for a `while_loop`
            return None
        _, back = _pulled(program, (1,), outputs=False)
        together = _together(program, (0,) if weights else (2,))
    linearising = Work(*(max(a - b, 0) for a, b in zip(everything, whole.work, strict=True)))
    given, state, accumulated, shared = _size(x), _size(carry), _size(weights), _size(consts)
    leaves = len([a for a in carry if is_inexact(a)])
    of_xs = 2 in wanted
    summing = Work(kernels=len(weights), elements=accumulated)  # each step's share is added
    stays = 2 * state + of_xs * given
    return Parts(
        Loop(linearising, whole.slots, whole.entries).grown(len(x) + leaves, given + state, 2 * state + shared),
        whole.grown(leaves + of_xs * len(x), state + of_xs * given, 2 * state + shared + 2 * accumulated, summing),
        back.grown(2 * leaves, 2 * state, 2 * state),
        together,
        stays,
        max(whole.entries + 3 * state - of_xs * given - stays, 0) + made_by_products(program.jaxpr, range(len(consts), len(consts) + len(carry))),
        whole.entries + 2 * state,
    )


@functools.lru_cache(maxsize=1024)
def forward(program: Program, platform: str) -> tuple[Loop, Work]:
    """A step of the forward loop, and what is computed ahead of it for all steps at once."""
    consts, carry, x = program.avals
    cut, leaves, state = cut_ahead(program, platform), len([a for a in carry if is_inexact(a)]), _size(carry)
    if cut is None:
        return Loop(work(program.jaxpr)).grown(len(x) + leaves, _size(x) + state, 2 * state + _size(consts)), Work()
    own = [*cut.ahead, *(x[i] for i in cut.kept)]
    return Loop(work(cut.rest)).grown(len(own) + leaves, _size(own) + state, 2 * state + cut.shared), cut.work


def _size(avals: Sequence[Any]) -> int:
    return sum(math.prod(a.shape) for a in avals)


def _filled(leaves: Sequence[Any], floats: Sequence[Any]) -> list[Any]:
    """The leaves with other values for the floating-point ones."""
    some = iter(floats)
    return [next(some) if is_inexact(leaf) else leaf for leaf in leaves]


def _floats(leaves: Sequence[Any]) -> list[Any]:
    return [leaf for leaf in leaves if is_inexact(leaf)]


def _in(step: Any, given: Sequence[Sequence[Any]], wanted: Sequence[int]) -> tuple[Any, list[list[Any]]]:
    """`step(consts, carry, x)` as a function of the floating-point leaves of some of these three groups, and their values."""

    def of_floats(*some):
        full = list(given)
        for place, floats in zip(wanted, some, strict=True):
            full[place] = _filled(given[place], floats)
        return _floats(step(*full))

    return of_floats, [_floats(given[place]) for place in wanted]


def _outs(program: Program, outs: Sequence[Sequence[Any]], outputs: bool = True) -> list[Any]:
    """Of what a step gives, the new state, and the outputs that are none of it."""
    new, ys = outs
    return [*new, *(y for y, source in zip(ys, program.forwarded, strict=True) if outputs and source is None)]


def _pulled(program: Program, wanted: Sequence[int], outputs: bool = True) -> tuple[Work, Loop]:
    """All the work of the pull-back of a step to constants (0), state (1), inputs (2), and that on its cotangents, with what is kept for it."""
    consts, carry, x = program.avals
    cotangents = _floats(_outs(program, program.out_avals, outputs))

    def pull(cotangents, *given):
        step, values = _in(lambda *full: _outs(program, program(*full), outputs), given, wanted)
        return jax.vjp(step, *values)[1](cotangents)

    closed, n = jax.make_jaxpr(pull)(cotangents, consts, carry, x), len(cotangents)
    everything = work(closed)
    everything = everything._replace(functions=everything.functions - repeated(closed))
    return everything, Loop(work_on(closed, range(n)), *residuals(closed, range(n), range(n, n + len(consts))))


def _together(program: Program, wanted: Sequence[int]) -> Work:
    """Of linearising `ALONG` steps at once, and of pulling their cotangents back."""
    outs = _outs(program, program.out_avals)
    new, carry, x = ([jax.ShapeDtypeStruct((ALONG, *a.shape), a.dtype) for a in some] for some in (outs, *program.avals[1:]))

    def pull(cotangents, *given):
        every, values = _in(lambda consts, carry, x: jax.vmap(lambda h, x: _outs(program, program(consts, h, x)))(carry, x), given, wanted)
        return jax.vjp(every, *values)[1](cotangents)

    closed = jax.make_jaxpr(pull)(_floats(new), program.avals[0], carry, x)
    return work(closed) + Work(functions=repeated(closed))


# --- times ----------------------------------------------------------------------------------------------------------------


def seconds(step: Step, structure: Structure, method: Method, machine: Machine, platform: str) -> float | None:
    """Of the value and the gradient of a recurrence, by one method, its sizes chosen; None if it has no gradient."""
    one = parts(step.program)
    if one is None:
        return None
    loop, fresh = functools.partial(_loop, machine, platform == "cpu"), 0.0
    if platform == "cpu":
        size = held(step, structure, method)
        fresh = machine.fresh * size * min(max((size - KEPT) / (HANDED_OUT - KEPT), 0), 1)
    if isinstance(method, Lax):
        return 1e-9 * (machine.start + fresh + step.count * (loop(one.linearising) + loop(one.whole)))
    stepping, ahead = forward(step.program, platform)
    segments = -(-step.count // max(method.segment or step.count, 1)) if isinstance(method, Travelling) else 1
    each = loop(stepping) + _at_once(machine, one.at_once) / ALONG + machine.all_kept * one.back.entries
    each += _at_once(machine, ahead) if segments > 1 else 0  # what the backward pass needs of it is at hand, unless it comes piece by piece
    whole = machine.start + fresh + segments * machine.launch * (one.at_once.calls + one.at_once.kernels) + step.count * each
    if isinstance(method, Sequential):
        return 1e-9 * (whole + step.count * loop(one.back))
    found = costs([step], [structure], method)
    forming = _at_once(machine, one.back.work) * found.flops["forming"] / max(push_flops(step.program), 1)
    pushed = found.flops["down-sweep"] + found.flops["up-sweep"]
    return 1e-9 * (whole + forming + machine.level * found.depth + machine.entry * pushed / 2)


def held(step: Step, structure: Structure, method: Method) -> int:
    """Bytes that this gradient holds at once, about: states, cotangents, and what linearises as many steps as are taken together, with their maps."""
    one = parts(step.program)
    if one is None or not isinstance(method, Travelling):
        entries = step.count * (one.loop if one else 0)
        return entries * structure.before.dtype.itemsize
    count = min(method.segment or step.count, step.count)
    twice = 2 if count < step.count else 1  # what one segment is given and gives is held beside what all are
    return (step.count * one.stays + twice * count * one.passes) * structure.before.dtype.itemsize + memory.of_maps(structure, method, count)


def cut(method: Sequential, steps: Sequence[Step], structures: Sequence[Structure], machine: Machine) -> Sequential:
    """The method in segments on a CPU, if they are told to be quicker there: what takes more memory than is kept from call to call is handed out anew."""
    pairs, longest = list(zip(steps, structures, strict=True)), max(step.count for step in steps)

    def size(method: Sequential) -> int:
        return sum(held(step, one, method) for step, one in pairs)

    def time(method: Sequential) -> float:
        return sum(seconds(step, one, method, machine, "cpu") or 0 for step, one in pairs)

    if size(method) <= KEPT or longest <= FEWEST:
        return method
    enough = memory.longest_segment(lambda count: size(replace(method, segment=count)), longest, longest, KEPT)
    passing = max(one.passes * structure.before.dtype.itemsize for step, structure in pairs if (one := parts(step.program)))
    cached = memory.longest_segment(lambda count: count * passing, longest, longest, CACHED)
    found = [method, *(replace(method, segment=max(count, FEWEST)) for count in (enough, cached) if count)]
    return min(found, key=time)


def _loop(machine: Machine, fuses: bool, one: Loop) -> float:
    """A step of a loop, in ns; of one that is made a single kernel of, if the compiler ever does."""
    work = one.work
    waiting = machine.fused if fuses and one.is_fused else machine.call * (work.calls + work.apart) + machine.kernel * work.kernels + machine.slot * one.slots
    return waiting + machine.product * work.products + machine.element * work.elements + machine.function * work.functions + machine.kept * one.entries


def _at_once(machine: Machine, work: Work) -> float:
    """Of many steps that are computed together, in ns."""
    products = machine.all_call * work.batched + machine.all_product * work.products
    return products + machine.all_element * work.elements + machine.all_function * work.functions


def in_words(time: float) -> str:
    """A time in seconds, to two digits, in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if time >= size or unit == "µs":
            value = time / size
            return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"
    raise AssertionError
