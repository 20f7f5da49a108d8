"""Which method, and why: decided at trace time from shapes, structure and platform alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax

from parscan import memory, timing
from parscan.claims import Claim
from parscan.costs import Step
from parscan.jaxprs import Program, has_products, obstacle
from parscan.layout import blocks_in_words
from parscan.machines import machine
from parscan.methods import Associative, Chunked, Lax, Method, Sequential, Travelling, Tree, Walk, sized
from parscan.order import Order
from parscan.report import Given, Plan
from parscan.several import order_of_products
from parscan.structure import Structure, blocks_of, kind_of, structures_of

logger = logging.getLogger("parscan")


class Stretch(NamedTuple):
    """Steps lo … hi - 1 of a chain, crossed by one method.

    structures: of their Jacobians; None if nobody may ask. order: of the products of maps between states of several widths, if any are taken.
    """

    lo: int
    hi: int
    plan: Plan
    structures: tuple[Structure, ...] | None
    order: Order | None = None


CPU_STATE = 2**14  # entries of a step's Jacobian from which on no walk over them is thought of on a CPU
SURELY = {"Lax": 0.7, "Sequential": 0.85, "Walk": 0.65}  # of the favourite's time that a method must be told to take to be chosen before it
ACCELERATOR_LENGTH = 64  # steps from which on it is worth while there
ACCELERATOR_STATE = 2**18  # B·n² up to which chunk matrices are worth their products on an accelerator


def plan_for(
    program: Program, length: int, method: Method | None, claim: Claim | None, *, fallback: Method, platform: str | None = None
) -> tuple[Plan, Structure | None]:
    """The plan for `length` steps of a recurrence, and the structure of their Jacobians (None if it is handed over); see `plan_chain`."""
    plan, (stretch,) = plan_chain([Step(program, length, True)], method, claim, fallback=fallback, platform=platform)
    return plan, None if stretch.structures is None else stretch.structures[0]


def plan_chain(
    steps: Sequence[Step], method: Method | None, claim: Claim | None, *, fallback: Method, platform: str | None = None
) -> tuple[Plan, list[Stretch]]:
    """The plan for a chain of layers.

    Args:
        steps: without any there is no stretch either.
        method: a method, or None to choose.
        claim: a structure, or None to prove one.
        fallback: what takes over where no Jacobian may or should be formed: `Lax()` if JAX can, else `Sequential()`.
        platform: `"cpu"`, `"gpu"`, `"tpu"`; JAX's default backend if not given.

    Returns:
        the plan, and the stretches, each crossed by one method: one of them, unless the choice is free and layers differ.

    Raises:
        ValueError: an explicit parallel method for a step that has none; the equation is named. A claim that does not fit.
    """
    if not steps:
        return Plan("none", {}, fallback, "no layers", 0), []
    everything, platform = slice(0, len(steps)), platform or jax.default_backend()
    level, asked = logging.DEBUG, ""
    if isinstance(method, Lax):
        stretches = [_handed_over(steps, everything, method, "asked for", platform)]
    elif method is not None:
        problem = next((found for step in steps if (found := obstacle(step.program)) is not None), None)
        if problem is not None and method.is_parallel:
            raise ValueError(
                f"`method={method!r}` cannot be used for this function: {problem}. "
                "Use method='auto', which leaves it to the sequential pass, or take that out of the function."
            )
        if problem is not None:
            stretches = [_handed_over(steps, everything, fallback, f"sequential, since {problem}", platform)]
            if type(fallback) is not type(method):
                level, asked = logging.WARNING, f"; {method!r} was asked for"
        else:
            stretches = [_planned(steps, everything, method, "asked for", claim, fallback, platform)]
    else:
        stretches = _chosen_stretches(steps, claim, fallback, platform)
        if any(stretch.structures is None and obstacle(steps[stretch.lo].program) is not None for stretch in stretches):
            level = logging.INFO
    plan = _summary(stretches)
    logger.log(level, "%s for %d steps, %s %s: %s%s", plan.method, plan.length, plan.kind, plan.blocks, plan.reason, asked)
    return plan, stretches


def _chosen_stretches(steps: Sequence[Step], claim: Claim | None, fallback: Method, platform: str) -> list[Stretch]:
    """Neighbours that may and should be crossed in parallel go together, and so do the others."""
    if claim is not None:
        structures_of([(step.program, step.repeats) for step in steps], claim)  # raises if it does not fit
    verdicts = [_verdict(step, claim, fallback, platform) for step in steps]
    stretches, lo = [], 0
    for hi in range(1, len(steps) + 1):
        if hi == len(steps) or verdicts[hi][0] != verdicts[lo][0]:
            stretches += _of_stretch(steps, slice(lo, hi), verdicts[lo], claim, fallback, platform)
            lo = hi
    return stretches


def _of_stretch(steps: Sequence[Step], place: slice, verdict: tuple[str, Method, str], claim: Claim | None, fallback: Method, platform: str) -> list[Stretch]:
    what, method, reason = verdict
    length = sum(step.count for step in steps[place])
    if what == "narrow" and platform != "cpu" and length < ACCELERATOR_LENGTH:
        method, reason = fallback, f"{length} steps on {platform}: too short a chain for matrix products to pay"
    if what == "obstacle":
        return [_handed_over(steps, place, method, reason, platform)]
    return [_planned(steps, place, method, reason, claim, fallback, platform, modest=True)]


def _verdict(step: Step, claim: Claim | None, fallback: Method, platform: str) -> tuple[str, Method, str]:
    """How one step should be crossed: the kind of that decision (neighbours of one kind go together), the method, and why."""
    problem = obstacle(step.program)
    if problem is not None:
        return "obstacle", fallback, f"sequential, since {problem}"
    (structure,) = structures_of([(step.program, step.repeats)], claim)
    if step.repeats and structure.before.size == 0:
        return "lax", fallback, "nothing in the state is differentiable"
    method, reason = _chosen(step, structure, fallback, platform)
    return ("narrow" if method.is_parallel else type(method).__name__.lower()), method, reason


def _handed_over(steps: Sequence[Step], place: slice, method: Method, reason: str, platform: str) -> Stretch:
    runs = tuple(step.count for step in steps[place])
    return Stretch(place.start, place.stop, Plan("none", {}, method, reason, sum(runs), runs, _given=Given(tuple(steps[place]), None, platform)), None)


def _planned(
    steps: Sequence[Step], place: slice, method: Method, reason: str, claim: Claim | None, fallback: Method, platform: str, *, modest: bool = False
) -> Stretch:
    some = steps[place]
    structures = structures_of([(step.program, step.repeats) for step in some], claim)
    if not any(structure.before.size or structure.after.size for structure in structures):
        return _handed_over(steps, place, fallback, "nothing in the state is differentiable", platform)
    if isinstance(method, Tree):
        structures = [structure.multiplied() for structure in structures]
    runs, blocks = tuple(step.count for step in some), blocks_of(structures)
    sizes = sized(method, max(runs), blocks)
    if isinstance(sizes, Travelling):
        asked = method.segment if isinstance(method, Travelling) else None
        sizes, why = memory.fitting(sizes, asked, some, structures, platform, modest=modest)
        reason += why
    if modest and platform == "cpu" and isinstance(sizes, Sequential) and sizes.segment is None:
        sizes = timing.cut(sizes, some, structures, machine(platform))
        reason += f"; in segments of {sizes.segment}: less memory to be handed out" if sizes.segment else ""
    plan = Plan(kind_of(structures), blocks, sizes, reason, sum(runs), runs, _given=Given(tuple(some), tuple(structures), platform, claim))
    order = None
    if len(runs) > 1 and isinstance(sizes, (Tree, Associative)):
        order = order_of_products(runs[::-1], [structures[0].before.groups, *(one.after.groups for one in structures)][::-1])
    return Stretch(place.start, place.stop, plan, tuple(structures), order)


def _summary(stretches: Sequence[Stretch]) -> Plan:
    """One plan for all: see `Plan.stretches`."""
    plans, orders = [stretch.plan for stretch in stretches], [stretch.order for stretch in stretches if stretch.order is not None]
    if len(plans) == 1:
        return replace(plans[0], reason=plans[0].reason + _of_layers(plans[0].runs, orders))
    longest = max(plans, key=lambda plan: (plan.method.is_parallel, plan.length))
    runs = tuple(count for plan in plans for count in plan.runs)
    listed = "; ".join(f"{plan.method} for {plan.length} layers ({plan.reason})" for plan in plans)
    reason = f"in {len(plans)} stretches: {listed}" + _of_layers(runs, orders)
    return Plan(longest.kind, longest.blocks, longest.method, reason, sum(runs), runs, tuple(plans))


def _of_layers(runs: Sequence[int], orders: Sequence[Order]) -> str:
    """What a network's plan says beside its reason: which layers are batched, what the order of products saved."""
    said = ""
    if len(runs) > 1:
        batched = [f"{count} equal neighbours" for count in runs if count > 1]
        said += f"; {sum(runs)} layers in {len(runs)} runs" + (f", {', '.join(batched[:3])}{', …' if len(batched) > 3 else ''} batched" if batched else "")
    flops, balanced = sum(order.flops for order in orders), sum(order.balanced for order in orders)
    if balanced:
        said += f"; order of products: {flops} FLOPs where the balanced tree takes {balanced}, {1 - flops / balanced:.0%} saved"
    return said


def _chosen(step: Step, structure: Structure, fallback: Method, platform: str) -> tuple[Method, str]:
    """The rule behind `method="auto"`, for one step; docs/explanation/choosing.md has the figures it follows."""
    pairs = [(a, b) for a, b in zip(structure.before.groups, structure.after.groups, strict=True) if a.size or b.size]
    blocks = sum(max(a.blocks, b.blocks) for a, b in pairs)
    state = sum(max(a.blocks, b.blocks) * a.side * b.side for a, b in pairs)
    name = blocks_in_words(structure.before.groups, structure.after.groups)
    if step.count < 2 and (platform == "cpu" or step.repeats):
        return fallback, "nothing to combine"
    if step.program.recomputes:
        return fallback, "a `jax.checkpoint` in the step asks for little memory, which batching all steps would not keep to"
    if platform == "cpu":
        return _quickest_on_cpu(step, structure, name, state, fallback)
    if structure.kind in ("Identity", "Permutation"):
        return Tree(), f"{name} on {platform}: products of the Jacobians cost no more than they do"
    if state <= ACCELERATOR_STATE and structure.same:
        return Tree(), f"{name} on {platform}: all steps are one linear map, squared"
    once = blocks > len(pairs) and all(shared and all(shared) for shared in structure.along.shared)
    if once and sum(a.side * b.side for a, b in pairs) <= ACCELERATOR_STATE:
        return Tree(), f"{name} on {platform}: the blocks of a step are equal, and multiplied once"
    if state <= ACCELERATOR_STATE:
        return Chunked(), f"{name} on {platform}: the loop's latency outweighs the arithmetic of matrix products"
    if blocks > 1 and has_products(step.program.jaxpr):
        return Sequential(), f"{name} on {platform}: too much arithmetic for matrix products to pay; a loop of the states' cotangents alone waits less"
    return fallback, f"{name} on {platform}: too much arithmetic for matrix products to pay"


def _quickest_on_cpu(step: Step, structure: Structure, name: str, entries: int, fallback: Method) -> tuple[Method, str]:
    """The method that is told to take the least time: JAX's own loop, one of the states' cotangents alone, or a walk over Jacobians.

    No model is exact, so one of them is favoured: JAX's loop where XLA makes a small kernel of each of its two passes, if it may keep what linearises the steps
    from the one for the other; else the loop of cotangents. What is told to be a little faster than the favourite is not taken.
    """
    if step.program.has_branches:
        return fallback, f"{name} on a CPU: the loop takes one branch of a `cond`, all steps at once take every one"
    found = timing.parts(step.program)
    if found is None:
        return fallback, f"{name} on a CPU: a loop of unknown length in the step, which JAX cannot transpose"
    taken, some = machine("cpu"), _on_cpu(step, structure, entries)
    told = {type(method).__name__: timing.seconds(step, structure, method, taken, "cpu") or math.inf for method in some}
    favourite = "Lax" if found.waits_little and isinstance(fallback, Lax) else "Sequential"
    best = min(told, key=lambda name: told[name] / (1 if name == favourite else SURELY[name]))
    method, how = {
        "Lax": (Lax(), "JAX's own loop"),
        "Sequential": (Sequential(), "a loop of the states' cotangents alone, and one batched pull-back,"),
        "Walk": (Walk(), "forming their Jacobians and walking them"),
    }[best]
    narrowly = "" if best == min(told, key=told.__getitem__) else ", or hardly more"
    return method, f"{name} on a CPU: {how} is told to take the least time{narrowly}"


def _on_cpu(step: Step, structure: Structure, entries: int) -> list[Method]:
    """What is thought of. Over several devices the answer of a walk's guard would be a collective."""
    walk = [sized(Walk(), step.count, blocks_of([structure]))] if jax.device_count() == 1 and entries <= CPU_STATE else []
    return [Lax(), timing.cut(Sequential(), [step], [structure], machine("cpu")), *walk]
