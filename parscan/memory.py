"""What a backward pass holds at once, what the device has, and how long a segment may be."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np

from parscan.checks import dtype_of
from parscan.costs import Step, abstract, human, state_bytes
from parscan.jaxprs import bytes_of_variables
from parscan.methods import Associative, Chunked, Sequential, Travelling, Walk
from parscan.structure import Structure

SHARE = 0.5  # of the device's memory that a backward pass may take unless told otherwise
LITTLE = 2**26  # bytes on an accelerator that nobody misses, where every segment makes the device wait
BESIDE = 10  # times the states of a chain that a whole gradient holds beside: inputs, outputs, cotangents of all, what the guard compares; as on a GPU
COPIES = {Walk: 2, Associative: 5}  # of every map formed, with its products and what the guard compares: as XLA's buffers show; the others 3


def of_variables(step: Step) -> int:
    """Bytes of all that one step is given and computes, but for what all steps share: about what `lax.scan` keeps of it, or a little more."""
    consts = sum(math.prod(a.shape) * dtype_of(a).itemsize for a in step.program.avals[0])
    return bytes_of_variables(step.program.jaxpr) - consts


def held(step: Step, structure: Structure, method: Travelling, count: int) -> int:
    """Bytes that `count` steps at once take, about, beside the chain's states and cotangents: what linearises them, their maps, products of these."""
    return count * of_variables(step) + of_maps(structure, method, count)


def of_maps(structure: Structure, method: Travelling, count: int) -> int:
    """Bytes of the maps of `count` steps at once, and of products of these."""
    forms, dtype = structure.forms(transposed=True), np.dtype(structure.before.dtype)
    if isinstance(method, Sequential) or 0 in forms.sizes:
        return 0
    if isinstance(method, Chunked):
        return 3 * -(-count // (method.size or 1)) * abstract(forms.closed(), dtype).nbytes
    return COPIES.get(type(method), 3) * (1 if structure.same else count) * abstract(forms, dtype).nbytes


@functools.cache
def of_device(platform: str) -> int | None:
    """Bytes of the memory of JAX's default device, or of this machine if that is its processor; None if it does not say."""
    if platform != jax.default_backend():
        return None
    if platform != "cpu":
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on every system
        return None


def fitting(
    method: Travelling, asked: int | None, steps: Sequence[Step], structures: Sequence[Structure], platform: str, *, modest: bool = False
) -> tuple[Travelling, str]:
    """The method, in segments if it would hold too much without, and why, in words.

    Args:
        method: sizes chosen. asked: the segment that the user has asked for, if any.
        modest: on an accelerator, hold no more than about what the loop's own backward pass does, or than is little.

    Raises:
        ValueError: what is asked for takes more than the device has, and what would not.
    """
    longest = max(step.count for step in steps)

    def need(size: int) -> int:
        each = [held(step, one, method, min(size, step.count)) for step, one in zip(steps, structures, strict=True)]
        return sum(each) if size >= longest else max(each)  # in segments, run by run

    size, device = min(method.segment or longest, longest), of_device(platform)
    beside = BESIDE * sum(step.count * state_bytes(step.program) for step in steps)
    budget = math.inf if device is None else device * SHARE if asked is None else device - beside
    if need(size) > budget:
        fits = longest_segment(need, longest, size, budget)
        if asked is None and fits:
            why = f"; in segments of {fits}: all at once would hold about {_bytes(need(size))}, and the device has {_bytes(device)}"
            return replace(method, segment=fits), why
        if method.is_parallel and not modest:  # what was chosen is never refused
            raise ValueError(_too_much(method, size, need(size), beside, device, structures, fits))
    if not modest or asked is not None or platform == "cpu":
        return method, ""
    # Half of what the loop keeps: the chain's states and cotangents are held beside.
    enough = max(sum(step.count * of_variables(step) for step in steps) / 2, LITTLE)
    if need(size) > enough:
        fits = max(1, longest_segment(need, longest, size, enough))
        return replace(method, segment=fits), f"; in segments of {fits}, to hold no more than the loop's own backward pass does"
    return method, ""


def longest_segment(need: Callable[[int], int], longest: int, size: int, budget: float) -> int:
    """The longest segment that fits, of half of `size`, a third, a quarter …, or the divisor of the chain's length below that; 0 if there is none."""
    parts = 2
    while -(-size // parts) > 1 and need(-(-size // parts)) > budget:
        parts += 1 if parts < 16 else parts // 8
    fits = -(-size // parts)
    return next((d for d in range(fits, fits // 2, -1) if longest % d == 0), fits) if need(fits) <= budget else 0


def _too_much(method: Travelling, size: int, need: int, beside: int, device: int | None, structures: Sequence[Structure], fits: int) -> str:
    widest = max(structures, key=lambda one: one.before.size)
    others = f"segment={fits} would fit, or `method='sequential'`, which forms none" if fits else "`method='sequential'` forms none"
    return (
        f"`method={method!r}` would hold about {_bytes(need)} for the Jacobians of {size} steps at once ({widest.kind}, {widest.before.size} coordinates), "
        f"beside {_bytes(beside)} for the chain's states and what else has their size, and the device has {_bytes(device)}: {others}."
    )


def _bytes(number: float | None) -> str:
    assert number is not None
    value, unit = human(round(number))
    return f"{value} {unit}B"
