"""Products over several axes at once, taken over one.

The cotangent of a weight shared by all steps is a sum over the steps *and* over what a step itself sums over, a batch: two axes of one
`dot_general`. XLA brings the operands of such a product into order by copying one of them, which on a CPU costs more than the product.
Where the axes lie side by side in both operands, they are one axis already.

Not so if the inner one, a batch, is sharded over devices: it would be gathered first. How arrays are sharded is not known while a program is traced, how many
devices there are is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from parscan.jaxprs.program import open_jaxpr, part


def contracted(f: Callable, *args: Any) -> Any:
    """f(*args), every product over several adjacent axes being taken over one, if there is but one device.

    Args:
        f: a function of pytrees of arrays; traced once, not called.
        args: what it is given.
    """
    if jax.device_count() > 1:
        return f(*args)
    closed, out = jax.make_jaxpr(f, return_shape=True)(*args)
    return jax.tree.unflatten(jax.tree.structure(out), _run(open_jaxpr(closed), closed.consts, jax.tree.leaves(args)))


def _run(body: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """What a jaxpr computes: the products apart, all that lies between two of them in one piece."""
    known = dict(zip((*body.constvars, *body.invars), (*consts, *args), strict=True))

    def value(atom):
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    def run(eqns):
        inputs = list(dict.fromkeys(v for eqn in eqns for v in eqn.invars if not isinstance(v, core.Literal) and v in known))
        outputs = [v for eqn in eqns for v in eqn.outvars]
        known.update(zip(outputs, part(body, inputs, eqns, outputs)(*map(value, inputs)), strict=True))

    waiting = []
    for eqn in body.eqns:
        if not (_mergeable(eqn) or eqn.primitive.name in ("jit", "pjit")):
            waiting.append(eqn)
            continue
        run(waiting)
        waiting, values = [], list(map(value, eqn.invars))
        outs = [_merged(eqn, *values)] if eqn.primitive.name == "dot_general" else _run(open_jaxpr(eqn.params["jaxpr"]), eqn.params["jaxpr"].consts, values)
        known.update(zip(eqn.outvars, outs, strict=True))
    run(waiting)
    return list(map(value, body.outvars))


def _mergeable(eqn: Any) -> bool:
    if eqn.primitive.name != "dot_general":
        return False
    return all(len(axes) > 1 and axes == tuple(range(axes[0], axes[0] + len(axes))) for axes in _summed(eqn))


def _summed(eqn: Any) -> tuple[tuple[int, ...], ...]:
    """The axes of both operands that a product sums over, in the order of the first operand's."""
    return tuple(zip(*sorted(zip(*eqn.params["dimension_numbers"][0], strict=True)), strict=True)) or ((), ())


def _merged(eqn: Any, *operands: Any) -> Any:
    flat, contracting, batch = [], [], []
    for x, axes, batched in zip(operands, _summed(eqn), eqn.params["dimension_numbers"][1], strict=True):
        first, past = axes[0], axes[0] + len(axes)
        flat.append(lax.reshape(x, (*x.shape[:first], math.prod(x.shape[first:past]), *x.shape[past:])))
        contracting.append((first,))
        batch.append(tuple(b if b < first else b - len(axes) + 1 for b in batched))
    params = {k: v for k, v in eqn.params.items() if k != "dimension_numbers"}
    left, right = flat
    return lax.dot_general(left, right, (tuple(contracting), tuple(batch)), **params)
