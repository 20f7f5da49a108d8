"""One journey along a chain of affine maps, by any method: the driver of every backward pass, and of every tangent.

    v_i = M_i v_{i-1} + b_i,   i = 1 … L in the order of travel

M_i is a Jacobian (tangents travel with the chain) or its transpose (cotangents travel against it). It is known through its
action on a vector; whether it is ever written down, and for how many steps at once, is the method's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from parscan import guard, prefix
from parscan.guard import Check
from parscan.maps import Chain, crossed
from parscan.methods import Method, Parallel, Sequential, Walk
from parscan.several import through_order
from parscan.single import through_one


def sweep(chains: Sequence[Chain], start: Array, offsets: Sequence[Array], method: Method, *, reverse: bool) -> list[Array]:
    """The vector that leaves each map of every chain, one chain being entered with what leaves the one before.

    Args:
        chains: the maps, in the order of their index.
        start: vector entering the first map of the journey, (n,).
        offsets: b_i of every chain, (L, p).
        method: any but `Lax`, which has no journey of its own; sizes chosen.
        reverse: travel from the last chain's last map down to the first chain's first.

    Returns:
        (L, p) for every chain, entry i being what leaves map i.
    """
    journey = list(zip(chains, offsets, strict=True))[:: -1 if reverse else 1]
    values: list[Array] = []
    while journey:
        if _is_constant(*journey[0]):  # nothing travels through: what leaves it is its offset
            values.append(journey.pop(0)[1])
        else:
            count = next((i for i, some in enumerate(journey) if _is_constant(*some)), len(journey))
            values.extend(_swept(journey[:count], start, method, reverse))
            journey = journey[count:]
        start = prefix.last(values[-1], reverse) if values[-1].shape[0] else start
    return values[:: -1 if reverse else 1]


def is_guarded(method: Method) -> bool:
    return isinstance(method, Parallel) and method.guard


def judged(method: Method, start: Any, like: Any, journey: Callable[[Check | None], tuple[Any, Check | None]]) -> Any:
    """What is found on a journey in segments, of which all is judged at its end: an error grows from segment to segment.

    start: what enters, in leaves. like: shapes and dtypes of what is found.
    """
    if not is_guarded(method):
        return journey(None)[0]

    def once(again: Array) -> tuple[Any, Array]:
        found, check = journey(Check(again, jnp.ones((), bool), jax.tree.map(jnp.zeros_like, start)))
        assert check is not None
        return found, check.good

    return guard.repeated(once, like)


def sweep_on(chain: Chain, start: Array, offsets: Array, method: Method, check: Check, *, reverse: bool) -> tuple[Array, Check]:
    """`sweep` over one chain that goes on with a journey, of which all is judged at its end; nothing is mended here."""
    if _is_constant(chain, offsets):
        return offsets, check._replace(error=jnp.zeros_like(offsets[0]) if offsets.shape[0] else check.error)
    found = through_one(chain, start, offsets, method, reverse)
    errors = found.errors(check.error)
    good = guard.is_sound(found.values, errors, chain.forms.after, chain.rounding, reverse)
    return found.values, check._replace(good=check.good & good, error=errors.leaving(reverse) if errors else check.error)


def _is_constant(chain: Chain, offsets: Array) -> bool:
    return 0 in (offsets.shape[0], *chain.forms.sizes)


def _swept(journey: list[tuple[Chain, Array]], start: Array, method: Method, reverse: bool) -> list[Array]:
    """Chains in the order of travel, each of which has maps and coordinates."""
    if isinstance(method, Sequential) or (len(journey) == 1 and journey[0][1].shape[0] == 1):
        return _one_after_another(journey, start, reverse)
    if len(journey) > 1 and not isinstance(method, Walk):
        found = through_order(journey, start, method, reverse)
    else:
        found, entering = [], start
        for chain, offsets in journey:
            found.append(through_one(chain, entering, offsets, method, reverse))
            entering = prefix.last(found[-1].values, reverse)
    values = [one.values for one in found]
    if not is_guarded(method):
        return values
    good, error = [], None
    for one, (chain, _) in zip(found, journey, strict=True):
        errors = one.errors(error)
        good.append(guard.is_sound(one.values, errors, chain.forms.after, chain.rounding, reverse))
        error = errors.leaving(reverse) if errors else error
    bare = [(chain._replace(crossing=chain.stepping), offsets) for chain, offsets in journey]  # what is not expected to run holds no memory
    return guard.guarded(values, jnp.stack(good).all(), lambda: _one_after_another(bare, start, reverse))


def _one_after_another(journey: list[tuple[Chain, Array]], start: Array, reverse: bool) -> list[Array]:
    values = []
    for chain, offsets in journey:
        values.append(crossed(chain, start, offsets, reverse))
        start = prefix.last(values[-1], reverse)
    return values
