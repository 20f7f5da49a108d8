"""Taking out of a loop what does not belong in it.

The action of a step's Jacobian on a vector, `cross(data, vector)`, repeats work that does not depend on the vector: gates, slopes, whatever
linearisation needs. `staged` cuts its equations in three: those that depend on nothing of the step (a shared weight, its
transpose: done once), those that depend on the step alone (done for all steps together, outside any loop), and the linear rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from parscan.jaxprs.program import open_jaxpr, part, slice_spec


def staged(cross: Callable[[Any, Array], Array], data: Any, vector: jax.ShapeDtypeStruct) -> tuple[list[Array], Callable[[Any, Array], Array]]:
    """The same linear maps, with all that the vector has no part in computed for every step beforehand.

    Args:
        cross: (one entry of data, vector) -> vector; linear in the vector.
        data: pytree with leading axis L.
        vector: shape and dtype of the vector.

    Returns:
        residuals, with leading axis L, and the map (one entry of residuals, vector) -> vector.
    """
    closed = jax.make_jaxpr(cross)(jax.tree.map(slice_spec, data), vector)
    body, leaves = open_jaxpr(closed), jax.tree.leaves(data)
    stepwise, linear = set(body.invars[:-1]), {body.invars[-1]}
    shared_eqns, step_eqns, linear_eqns = [], [], []
    for eqn in needed_for(body.eqns, body.outvars):
        inputs = variables(eqn.invars)
        if inputs & linear:
            linear_eqns.append(eqn)
            linear.update(eqn.outvars)
        elif inputs & stepwise:
            step_eqns.append(eqn)
            stepwise.update(eqn.outvars)
        else:
            shared_eqns.append(eqn)
    used = {v: None for eqn in linear_eqns for v in eqn.invars if isinstance(v, core.Var)}
    used.update((v, None) for v in body.outvars if isinstance(v, core.Var))
    residuals = [v for v in used if v in stepwise]
    needed = [*(v for eqn in (*step_eqns, *linear_eqns) for v in eqn.invars), *body.outvars]
    shared = list(dict.fromkeys(v for v in needed if isinstance(v, core.Var) and v not in stepwise and v not in linear))

    constants = part(body, body.constvars, shared_eqns, shared)(*closed.consts)
    each = part(body, [*shared, *body.invars[:-1]], step_eqns, residuals)
    stacked = jax.vmap(each, in_axes=(*(None,) * len(shared), *(0,) * len(leaves)))(*constants, *leaves) if residuals else []
    rest = part(body, [*shared, *residuals, body.invars[-1]], linear_eqns, body.outvars)
    if not residuals:  # every step is the same map: only their number remains
        return [jnp.zeros((leaves[0].shape[0], 0))], lambda step, vector: rest(*constants, vector)[0]
    return list(stacked), lambda step, vector: rest(*constants, *step, vector)[0]


def needed_for(eqns: Sequence[Any], outvars: Sequence[Any]) -> list[Any]:
    """The equations that these depend on: what a step emits and nobody reads must not weigh when ways are compared."""
    needed, kept = variables(outvars), []
    for eqn in reversed(eqns):
        if needed.intersection(eqn.outvars):
            kept.append(eqn)
            needed |= variables(eqn.invars)
    return kept[::-1]


def variables(atoms: Sequence[Any]) -> set[Any]:
    return {a for a in atoms if isinstance(a, core.Var)}
