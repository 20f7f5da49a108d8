"""How long a gradient takes, told from what its programs compute: the model by which `method="auto"` chooses, and that a plan prints.

The gradient is taken in the constants of the step and in the first state, every state being read; it is that of `jax.value_and_grad`, forward loop and
all. Its time is a sum of a few physical terms, each a count of a program's equations times what a `Machine` takes for one.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from parscan import memory
from parscan.checks import is_inexact
from parscan.costs import Step, costs, push_flops, state_bytes
from parscan.jaxprs import Program, Work, bytes_of_variables, in_floats, work, work_on
from parscan.methods import Lax, Method, Sequential
from parscan.structure import Structure


@dataclass(frozen=True)
class Machine:
    """What one of each takes, in nanoseconds.

    Attributes:
        start: a call of a compiled program, and what it does once.
        fused: a step of a loop that the compiler makes one kernel of.
        call, kernel: a product of matrices in a step of any other loop, and any other kernel: its launch, its arguments, its result.
        product, element, function: inside of a loop, a floating-point operation of a matrix product, an entry computed by arithmetic, and one by a
            transcendental function.
        kept: a byte that one loop writes and another reads.
        all_product, all_element, all_function: as above, where all steps are computed at once.
        level: an operation on explicit Jacobians that waits for another: a step of a walk, a level of a tree.
        entry: a multiply-add of explicit Jacobians.
    """

    start: float
    fused: float
    call: float
    kernel: float
    product: float
    element: float
    function: float
    kept: float
    all_product: float
    all_element: float
    all_function: float
    level: float
    entry: float


class Parts(NamedTuple):
    """The work of one step.

    forward: of the step. linearising: of the step and of what its derivatives are made of. back: of pulling one cotangent back to the state, which is at
    hand then. whole: of pulling it back to the state and to the constants. weights: these constants, entries and leaves.
    """

    forward: Work
    linearising: Work
    back: Work
    whole: Work
    weights: tuple[int, int]


@functools.lru_cache(maxsize=1024)
def parts(program: Program) -> Parts:
    """Of a step that has a reverse mode."""
    consts, carry, x = program.avals
    inner = [a for a in consts if is_inexact(a)]

    def pulled(wanted: int):
        """The pull-back to constants and state (2), or to the state alone (1), and its work on the cotangents."""

        def pull(cotangents, consts, carry, x):
            def step(*some):
                of_consts, places = in_floats(lambda full: full, consts) if len(some) == 2 else (None, [])
                full = list(consts)
                for i, value in zip(places, some[0] if len(some) == 2 else [], strict=True):
                    full[i] = value
                return in_floats(lambda state: program(full, state, x)[0], carry)[0](some[-1])

            floats = [[a for a in some if is_inexact(a)] for some in (consts, carry)]
            return jax.vjp(step, *floats[2 - wanted :])[1](cotangents)

        cotangents = [a for a in program.out_avals[0] if is_inexact(a)]
        closed = jax.make_jaxpr(pull)(cotangents, consts, carry, x)
        return closed, work_on(closed, range(len(cotangents)))

    everything, whole = pulled(2)
    _, back = pulled(1)
    total = work(everything)
    linearising = Work(*(max(a - b, 0) for a, b in zip(total, whole, strict=True)))
    return Parts(work(program.jaxpr), linearising, back, whole, (sum(math.prod(a.shape) for a in inner), len(inner)))


FUSES_LOOPS = jax.__version_info__ >= (0, 12)  # whether XLA makes one kernel of the body of any loop on a CPU that multiplies no matrices
SMALL_LOOP = 1024  # bytes of all variables of a step up to which it did so before
SMALL_GRADIENT = 512  # the same, where the loop also takes the gradient of the constants


def is_fused(program: Program, small: int = SMALL_LOOP) -> bool:
    """Whether XLA's compiler for CPUs makes one kernel of a loop of these steps."""
    return bytes_of_variables(program.jaxpr) < small or (FUSES_LOOPS and not work(program.jaxpr).calls)


def loop(machine: Machine, work: Work, fused: bool) -> float:
    """A step of a loop, in ns."""
    waiting = machine.fused if fused else machine.call * work.calls + machine.kernel * work.kernels
    return waiting + machine.product * work.products + machine.element * work.elements + machine.function * work.functions


def at_once(machine: Machine, work: Work) -> float:
    """One of many steps that are computed together, in ns."""
    return machine.all_product * work.products + machine.all_element * work.elements + machine.all_function * work.functions


def seconds(step: Step, structure: Structure, method: Method, machine: Machine) -> float:
    """Of the value and the gradient of a recurrence, by one method, its sizes chosen."""
    one, fused = parts(step.program), is_fused(step.program)
    if isinstance(method, Lax):
        back, small = one.whole + Work(kernels=one.weights[1], elements=one.weights[0]), is_fused(step.program, SMALL_GRADIENT)  # each step's share is added
        each = loop(machine, one.linearising, fused) + loop(machine, back, small) + machine.kept * memory.of_variables(step)
        return 1e-9 * (machine.start + step.count * each)
    to_weights = Work(*(max(a - b, 0) for a, b in zip(one.whole, one.back, strict=True)))
    each = loop(machine, one.forward, fused) + at_once(machine, one.linearising) + at_once(machine, one.linearising + to_weights)
    each += machine.kept * state_bytes(step.program)
    if isinstance(method, Sequential):
        each += loop(machine, one.back, fused) + machine.kept * 4 * one.back.elements  # an entry of what linearises the step for each
        return 1e-9 * (machine.start + step.count * each)
    found = costs([step], [structure], method)
    push = push_flops(step.program)
    forming = at_once(machine, one.back) * found.flops["forming"] / max(push, 1)
    pushed = found.flops["down-sweep"] + found.flops["up-sweep"]
    return 1e-9 * (machine.start + step.count * each + forming + machine.level * found.depth + machine.entry * pushed / 2)


# Fitted, in logarithms, to 220 measurements of 61 recurrences (`scripts/problems.py`, seed 0) by JAX 0.10.2 on 2 cores of a virtual Xeon at 2.5 GHz.
# Another machine may well be three times as fast in all of them: what is chosen follows from their ratios.
CPU = Machine(
    start=98000, fused=21, call=2300, kernel=220,
    product=0.049, element=0.17, function=4.7, kept=0.47,
    all_product=0.018, all_element=0.47, all_function=3.7, level=1700, entry=3.9,
)  # fmt: skip


def in_words(time: float) -> str:
    """A time in seconds, to two digits, in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if time >= size or unit == "µs":
            value = time / size
            return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"
    raise AssertionError
