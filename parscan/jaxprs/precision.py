"""How finely a program rounds, read off its equations."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from parscan.jaxprs.program import AnyJaxpr, equations

PRODUCTS = {"gpu": 2.0**-10, "tpu": 2.0**-7}  # what products in single precision are rounded to there unless more is asked for: TF32, bfloat16


def roundoff(jaxpr: AnyJaxpr, platform: str) -> float:
    """Distance from 1 to the next number in the coarsest floating-point arithmetic that a program does anywhere; 0 if it does none.

    platform: `"cpu"`, `"gpu"`, `"tpu"`.
    """
    return max((_of(eqn, platform) for eqn in equations(jaxpr)), default=0.0)


def _of(eqn: Any, platform: str) -> float:
    made = [v.aval.dtype for v in eqn.outvars if hasattr(v.aval, "dtype") and jnp.issubdtype(v.aval.dtype, jnp.floating)]
    finest = max((float(jnp.finfo(dtype).eps) for dtype in made), default=0.0)
    if eqn.primitive.name not in ("dot_general", "conv_general_dilated") or not made:
        return finest
    asked = eqn.params["precision"]
    each = asked if isinstance(asked, tuple) else (asked,)
    if all(one is lax.Precision.HIGHEST for one in each):
        return finest
    if any(isinstance(one, lax.DotAlgorithmPreset) for one in each):
        name = str(each[0])
        return max(finest, PRODUCTS["tpu"] if "BF16" in name or "F8" in name else PRODUCTS["gpu"] if "TF32" in name or "F16" in name else 0.0)
    return max(finest, PRODUCTS.get(platform, 0.0))
