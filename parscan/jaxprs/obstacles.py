"""What keeps a step from being pushed a basis through, found in its equations before anything runs."""

from __future__ import annotations

import functools
from typing import Any

import jax

from parscan.checks import is_complex
from parscan.jaxprs.program import Program, equations, in_floats, open_jaxpr, sub_jaxprs
from parscan.jaxprs.sources import where


def obstacle(program: Program) -> str | None:
    """Why the derivative of this step may not be pushed a basis through, or `None`.

    A custom VJP need not be linear in the cotangent (gradient clipping is not), a collective mixes what another device
    or mapped axis holds, an effect would be repeated, a mutable reference read at the wrong time, and what may not be
    batched cannot be taken for all steps at once.
    """
    found = _seen(program)
    if found is not None:
        return found
    try:
        _pull_back_a_batch(program)
    except Exception as error:  # not remembered: it may be of the moment, as where the stack runs out
        return f"JAX cannot take its reverse-mode derivative for a batch of steps: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


@functools.lru_cache(maxsize=4096)
def _seen(program: Program) -> str | None:
    """An obstacle that can be seen without taking a derivative."""
    if any(map(is_complex, program.avals[1])):
        return "the carry is complex"
    return _in_equations(program.jaxpr) or _unbatchable(program)


@functools.lru_cache(maxsize=4096)
def _pull_back_a_batch(program: Program) -> None:
    """Fails where JAX does, of shapes alone: of the step itself, too, whose functions may have derivatives that do not call them."""
    consts, carry, x = program.avals
    for f in (program, functools.partial(_pull_back, program)):
        batched = jax.vmap(f, in_axes=(None, 0, 0), axis_size=1)
        jax.eval_shape(batched, consts, *([jax.ShapeDtypeStruct((1, *a.shape), a.dtype) for a in part] for part in (carry, x)))


def is_batchable(program: Program) -> bool:
    """Whether all steps may be run at once."""
    return not open_jaxpr(program.jaxpr).effects and _unbatchable(program) is None


def _unbatchable(program: Program) -> str | None:
    """What would come out differently for a batch of steps, or not at all."""
    for eqn in equations(program.jaxpr):
        draws = eqn.primitive.name in ("random_bits", "random_split", "random_fold_in") and "fry" not in eqn.invars[0].aval.dtype.name
        if draws or eqn.primitive.name in ("rng_bit_generator", "rng_uniform"):
            return f"{where(eqn)} draws other numbers for a batch of steps than step by step; keys of the default kind (threefry2x32) do not"
    avals = [aval for group in (*program.avals, *program.out_avals) for aval in group if hasattr(aval, "shape")]
    inside = [v.aval for eqn in equations(program.jaxpr) for v in eqn.outvars if hasattr(v.aval, "shape")]
    if not all(isinstance(size, int) for aval in (*avals, *inside) for size in aval.shape):
        return "an array has a symbolic dimension"
    if any(axis is not None for aval in avals for axis in getattr(getattr(aval, "sharding", None), "spec", ())):
        return "an array is sharded over an explicit mesh axis"
    return None


def _in_equations(jaxpr: Any) -> str | None:
    for eqn in open_jaxpr(jaxpr).eqns:
        name = eqn.primitive.name
        if name.startswith("custom_vjp_call"):
            return f"{where(eqn)} has a custom VJP, which need not be linear in the cotangent"
        for inner in sub_jaxprs(list(eqn.params.values())):
            found = _in_equations(inner)
            if found is not None:
                return found
        axes = [axis for axis in _axis_names(eqn.params) if isinstance(axis, str)]
        if axes:
            return f"{where(eqn)} is a collective over the named axis {axes[0]!r}"
        if any(type(v.aval).__name__ == "AbstractRef" for v in (*eqn.invars, *eqn.outvars)):
            return f"{where(eqn)} uses a mutable reference"
        if eqn.effects:
            return f"{where(eqn)} has a side effect"
    return None


def _axis_names(params: dict[str, Any]) -> list[Any]:
    names: list[Any] = []
    for key in ("axis_name", "axes", "axis"):
        value = params.get(key, ())
        names.extend(value if isinstance(value, (tuple, list)) else [value])
    return names


def _pull_back(program: Program, consts: Any, carry: Any, x: Any) -> Any:
    """A pull-back through everything differentiable."""
    leaves = [*consts, *carry, *x]
    differentiable, places = in_floats(program.flat, leaves)
    outs, pull = jax.vjp(differentiable, [leaves[i] for i in places])
    return pull(outs)
