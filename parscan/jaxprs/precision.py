"""How finely a program rounds, read off its equations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend import core

from parscan.jaxprs.program import AnyJaxpr, equations, open_jaxpr, sub_jaxprs

PRODUCTS = {"gpu": 2.0**-10, "tpu": 2.0**-7}  # what products in single precision are rounded to there unless more is asked for: TF32, bfloat16


def roundoff(jaxpr: AnyJaxpr, inputs: Sequence[int], outputs: Sequence[int], platform: str) -> float:
    """Distance from 1 to the next number in the coarsest floating-point arithmetic between these inputs and these outputs; 0 if there is none.

    A loop, a branch or a call between them counts whole.

    platform: `"cpu"`, `"gpu"`, `"tpu"`.
    """
    body = open_jaxpr(jaxpr)
    reached, between, found = {body.invars[i] for i in inputs}, [], 0.0
    for eqn in body.eqns:
        if any(isinstance(a, core.Var) and a in reached for a in eqn.invars):
            reached.update(eqn.outvars)
            between.append(eqn)
    needed = {body.outvars[i] for i in outputs if isinstance(body.outvars[i], core.Var)}
    for eqn in reversed(between):
        if any(v in needed for v in eqn.outvars):
            needed.update(a for a in eqn.invars if isinstance(a, core.Var))
            inner = [one for some in sub_jaxprs(list(eqn.params.values())) for one in equations(some)]
            found = max(found, *(_of(one, platform) for one in (eqn, *inner)))
    return found


def _of(eqn: Any, platform: str) -> float:
    made = [v.aval.dtype for v in eqn.outvars if hasattr(v.aval, "dtype") and jnp.issubdtype(v.aval.dtype, jnp.floating)]
    coarsest = max((float(jnp.finfo(dtype).eps) for dtype in made), default=0.0)
    if eqn.primitive.name == "reduce_precision":
        return max(coarsest, 2.0 ** -eqn.params["mantissa_bits"])
    if eqn.primitive.name not in ("dot_general", "conv_general_dilated") or not made:
        return coarsest
    asked = eqn.params["precision"]
    each = asked if isinstance(asked, tuple) else (asked,)
    if all(one is lax.Precision.HIGHEST for one in each):
        return coarsest
    if any(isinstance(one, lax.DotAlgorithmPreset) for one in each):
        name = str(each[0])
        return max(coarsest, PRODUCTS["tpu"] if "BF16" in name or "F8" in name else PRODUCTS["gpu"] if "TF32" in name or "F16" in name else 0.0)
    return max(coarsest, PRODUCTS.get(platform, 0.0))
