"""How long a gradient takes, told from what its programs compute: the model by which `method="auto"` chooses on a CPU, and that a plan prints.

The gradient is that of `jax.value_and_grad`, forward loop and all, every state being read; it is taken in the constants of the step and in the first
state, in the inputs where there are no constants. Its time is a sum of a few physical terms, each a count of what a program does times what a
`Machine` takes for one. Where XLA makes a single kernel of a loop, a step costs that and its arithmetic; where not, every kernel of the step is launched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from parscan.checks import is_inexact
from parscan.costs import Step, costs, push_flops
from parscan.jaxprs import Program, Work, residuals, work, work_on
from parscan.machines import FUSES_LOOPS, Machine
from parscan.methods import Lax, Method, Sequential
from parscan.structure import Structure

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
        return self.touched < SMALL_LOOP or (FUSES_LOOPS and not self.work.calls)

    def grown(self, slots: int, entries: int, beside: int, more: Work | None = None) -> Loop:
        """With more arrays of all steps, and so many entries that are carried or shared."""
        total = self.entries + entries
        return Loop(self.work + (more or Work()), self.slots + slots, total, total + beside)


class Parts(NamedTuple):
    """The work of one step.

    forward: of the step. linearising: of the step and of what its derivatives are made of. whole: of pulling one cotangent back to the state and to the
    constants, all that being at hand; back: to the state alone. at_once: of linearising many steps together, and of pulling their cotangents back to the
    constants: of `ALONG` steps.
    """

    forward: Loop
    linearising: Loop
    whole: Loop
    back: Loop
    at_once: Work

    @property
    def waits_little(self) -> bool:
        """Whether JAX's own gradient runs as two kernels."""
        return self.linearising.is_fused and self.whole.is_fused


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
        _, back = _pulled(program, (1,))
        together = _together(program, (0,) if weights else (2,))
    linearising = Work(*(max(a - b, 0) for a, b in zip(everything, whole.work, strict=True)))
    given, state, accumulated, shared = _size(x), _size(carry), _size(weights), _size(consts)
    leaves = len([a for a in carry if is_inexact(a)])
    of_xs = 2 in wanted
    summing = Work(kernels=len(weights), elements=accumulated)  # each step's share is added
    return Parts(
        Loop(work(program.jaxpr)).grown(len(x) + leaves, given + state, 2 * state + shared),
        Loop(linearising, whole.slots, whole.entries).grown(len(x) + leaves, given + state, 2 * state + shared),
        whole.grown(leaves + of_xs * len(x), state + of_xs * given, 2 * state + shared + 2 * accumulated, summing),
        back.grown(2 * leaves, 2 * state, 2 * state),
        together,
    )


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


def _pulled(program: Program, wanted: Sequence[int]) -> tuple[Work, Loop]:
    """All the work of the pull-back of a step to constants (0), state (1), inputs (2), and that on its cotangents, with what is kept for it."""
    consts, carry, x = program.avals
    cotangents = _floats(program.out_avals[0])

    def pull(cotangents, *given):
        step, values = _in(lambda *full: program(*full)[0], given, wanted)
        return jax.vjp(step, *values)[1](cotangents)

    closed, n = jax.make_jaxpr(pull)(cotangents, consts, carry, x), len(cotangents)
    return work(closed), Loop(work_on(closed, range(n)), *residuals(closed, range(n), range(n, n + len(consts))))


def _together(program: Program, wanted: Sequence[int]) -> Work:
    """Of linearising `ALONG` steps at once, and of pulling their cotangents back."""
    new, carry, x = ([jax.ShapeDtypeStruct((ALONG, *a.shape), a.dtype) for a in some] for some in (program.out_avals[0], *program.avals[1:]))

    def pull(cotangents, *given):
        every, values = _in(lambda consts, carry, x: jax.vmap(lambda h, x: program(consts, h, x)[0])(carry, x), given, wanted)
        return jax.vjp(every, *values)[1](cotangents)

    return work(jax.make_jaxpr(pull)(_floats(new), program.avals[0], carry, x))


# --- times ----------------------------------------------------------------------------------------------------------------


def seconds(step: Step, structure: Structure, method: Method, machine: Machine, platform: str) -> float | None:
    """Of the value and the gradient of a recurrence, by one method, its sizes chosen; None if it has no gradient."""
    one = parts(step.program)
    if one is None:
        return None
    loop = functools.partial(_loop, machine, platform == "cpu")
    if isinstance(method, Lax):
        return 1e-9 * (machine.start + step.count * (loop(one.linearising) + loop(one.whole)))
    each = loop(one.forward) + _at_once(machine, one.at_once) / ALONG + machine.all_kept * one.back.entries
    if isinstance(method, Sequential):
        return 1e-9 * (machine.start + step.count * (each + loop(one.back)))
    found = costs([step], [structure], method)
    forming = _at_once(machine, one.back.work) * found.flops["forming"] / max(push_flops(step.program), 1)
    pushed = found.flops["down-sweep"] + found.flops["up-sweep"]
    return 1e-9 * (machine.start + step.count * each + forming + machine.level * found.depth + machine.entry * pushed / 2)


def _loop(machine: Machine, fuses: bool, one: Loop) -> float:
    """A step of a loop, in ns; of one that is made a single kernel of, if the compiler ever does."""
    work = one.work
    waiting = machine.fused if fuses and one.is_fused else machine.call * work.calls + machine.kernel * work.kernels + machine.slot * one.slots
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
