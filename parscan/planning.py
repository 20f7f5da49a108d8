"""Which method, and why: decided at trace time from shapes, structure and platform alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import jax

from parscan.jacobians import kind_of
from parscan.jaxprs import Program, flops, obstacle
from parscan.methods import Chunked, Lax, Method, Walk
from parscan.structure import Claim, Layout, layout_of

logger = logging.getLogger("parscan")


@dataclass(frozen=True)
class Plan:
    """What was chosen for a chain, and why.

    Attributes:
        kind: name of the Jacobians' kind, `"Dense"`, `"BlockDiagonal"`, `"Diagonal"`, or `"none"` where there are none.
        blocks: from block size to how many.
        method: the method, its sizes chosen.
        reason: why, in words.
        length: number of steps.

    Example:
        >>> parscan.plan(f, init, xs, method="walk").length == len(xs)
        True
    """

    kind: str
    blocks: dict[int, int]
    method: Method
    reason: str
    length: int

    def __hash__(self) -> int:
        return hash((self.kind, tuple(self.blocks.items()), self.method, self.reason, self.length))


SEGMENT_ENTRIES = 2**17  # numbers in the Jacobians that a walk forms at once: they stay in cache
CPU_STATE = 1024  # B·n² up to which forming and walking beats a loop on a CPU
CPU_BLOCKS = 64  # blocks up to which it does
CPU_STEP = 2**13  # operations of a step up to which a loop waits more than it computes
ACCELERATOR_STATE = 2**18  # B·n² up to which chunk matrices are worth their products on an accelerator


def plan_for(
    program: Program, length: int, method: Method | None, claim: Claim | None, *, fallback: Method, platform: str | None = None
) -> tuple[Plan, Layout | None]:
    """The plan for `length` steps of a program.

    Args:
        method: a method, or None to choose.
        claim: a structure, or None to prove one.
        fallback: what takes over where no Jacobian may or should be formed: `Lax()` if JAX can, else `Sequential()`.
        platform: `"cpu"`, `"gpu"`, `"tpu"`; JAX's default backend if not given.

    Returns:
        the plan, and the layout of the state (None if it is handed over).

    Raises:
        ValueError: an explicit parallel method for a step that has none; the equation is named. A claim that does not fit.
    """
    if isinstance(method, Lax):
        return Plan("none", {}, method, "asked for", length), None
    problem = obstacle(program)
    if problem is not None:
        if method is not None and method.is_parallel:
            raise ValueError(
                f"`method={method!r}` cannot be used for this function: {problem}. "
                "Use method='auto', which leaves it to the sequential pass, or take that out of the function."
            )
        plan = Plan("none", {}, fallback, f"sequential, since {problem}", length)
        logger.debug("%s: %s", plan.method, plan.reason)
        return plan, None
    layout = layout_of(program, claim)
    blocks, width = layout.blocks, layout.width
    if layout.size == 0:
        return Plan("none", {}, fallback, "nothing in the state is differentiable", length), None
    if method is None:
        method, reason = _chosen(program, length, blocks, width, fallback, platform or jax.default_backend())
    else:
        reason = "asked for"
    plan = Plan(kind_of(blocks, width).__name__, {width: blocks}, sized(method, length, blocks, width), reason, length)
    logger.debug("%s for %d steps, %d blocks of %d: %s", plan.method, length, blocks, width, plan.reason)
    return plan, layout


def _chosen(program: Program, length: int, blocks: int, width: int, fallback: Method, platform: str) -> tuple[Method, str]:
    """The rule behind `method="auto"`; README, *When it pays*, has the figures it follows."""
    state, name = blocks * width**2, f"{blocks} block{'s' if blocks != 1 else ''} of {width}"
    if length < 2:
        return fallback, "nothing to combine"
    if program.recomputes:
        return fallback, "a `jax.checkpoint` in the step asks for little memory, which batching all steps would not keep to"
    if platform == "cpu":
        if blocks == 1 or width == 1:
            return fallback, f"{name} on a CPU: XLA fuses each step of the loop into one kernel"
        if flops(program.jaxpr) > CPU_STEP:
            return Lax(), f"{name} on a CPU: a step computes enough that a loop hardly waits"
        if state <= CPU_STATE and blocks <= CPU_BLOCKS:
            return Walk(), f"{name} on a CPU: forming their Jacobians and walking them is cheaper than a loop of VJPs"
        return fallback, f"{name} on a CPU: the arithmetic of matrix products outweighs the loop's overhead"
    if state <= ACCELERATOR_STATE and length >= 64:
        return Chunked(), f"{name} on {platform}: the loop's latency outweighs the arithmetic of matrix products"
    return fallback, f"{name} for {length} steps on {platform}: too much arithmetic, or too short a chain, for matrix products to pay"


def sized(method: Method, length: int, blocks: int, width: int) -> Method:
    """The method with every size that was left open chosen."""
    match method:
        case Walk(segment=None):
            return Walk(_divisor_near(length, max(1, min(length, max(32, SEGMENT_ENTRIES // max(1, blocks * width**2))))))
        case Chunked(size=None):
            return replace(method, size=max(1, min(8 if width < 48 else 32, length)))
    return method


def _divisor_near(length: int, target: int) -> int:
    """A divisor of `length` between half the target and twice it, the nearest by ratio; else the target: the rest goes apart."""
    fitting = [d for d in range(max(1, target // 2), 2 * target + 1) if length % d == 0]
    return min(fitting, key=lambda d: max(d / target, target / d), default=min(target, max(length, 1)))
