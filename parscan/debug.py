"""`debug=True`: at run time, the Jacobians that a structure lets be formed are compared with the derivatives that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from parscan.checks import coordinate, is_inexact, named_leaves
from parscan.claims import Claim
from parscan.jacobians import Dense
from parscan.layout import Layout
from parscan.structure import Structure
from parscan.system import Linearised

AT_ONCE = 32  # steps whose Jacobians are held at a time


class StructureError(ValueError):
    """A coordinate depends on another that a structure denies.

    Example:
        >>> try:
        ...     parscan.testing.check_structure(lambda w, h: h @ w, jnp.ones((2, 2)), jnp.ones(2), structure="diagonal")
        ... except parscan.testing.StructureError as error:
        ...     print(str(error)[:40])
        `h[0]` of the new state depends on `h[1]
    """

    __module__ = "parscan.testing"  # where users find it


@dataclass(frozen=True)
class Watch:
    """How an error speaks of a run of equal steps.

    what: `"step"` or `"layer"`. claim: None if the structure is proved. first: the number of the run's first. leaves: names of the floating-point
    leaves of the state leaving it.
    """

    what: str
    claim: Claim | None
    first: int = 0
    leaves: tuple[str, ...] = ()


def names_of(name: str, tree: Any) -> tuple[str, ...]:
    """The floating-point leaves of a state as a user writes them."""
    return tuple(path for path, leaf in named_leaves(name, tree) if is_inexact(leaf))


def check_runs(runs: Sequence[Linearised], watches: Sequence[Watch]) -> None:
    """Stages a check of every run; without `watches`, nothing.

    It looks at stored values alone, so it stands outside of what is linear and differentiated.

    Raises:
        StructureError: when it runs, and a formed Jacobian is not the derivative. Inside a compiled program JAX hands on the message in an error of its own.
    """
    for run, watch in zip(runs, watches, strict=bool(watches)) if watches else ():
        if run.count and run.before.size and run.after.size and not _denies_nothing(run.structure):
            _check(run, watch)


def _denies_nothing(structure: Structure) -> bool:
    (form, *others), (group, *_) = structure.along.each, structure.before.groups
    return not others and not group.counts and form.kind is Dense


def _check(run: Linearised, watch: Watch) -> None:
    """At every stored state a random vector is pushed through the step, and multiplied by the formed Jacobian."""
    still = replace(run, **{name: [lax.stop_gradient(leaf) for leaf in getattr(run, name)] for name in ("consts", "xs", "states")})
    vector = jax.random.normal(jax.random.key(0), (run.before.size,), run.before.dtype)
    own, form = still.forming(transposed=False)

    def one(some):
        data, own = some
        (formed,) = form(jax.tree.map(lambda leaf: leaf[None], own)).apply(vector[None])
        return _compared(formed, still.push(data, vector))

    found = lax.map(one, (still.data, own), batch_size=AT_ONCE)
    step = jnp.argmax(found[0])
    jax.debug.callback(partial(_complain, watch, run.after, run.roundoff**0.5), step, *(each[step] for each in found))


def _compared(formed: Array, pushed: Array) -> tuple[Array, Array, Array, Array]:
    """The largest difference, relative to the largest entry, where it is, and the two values there. What is not finite says nothing."""
    known = jnp.isfinite(formed) & jnp.isfinite(pushed)
    difference = jnp.where(known, jnp.abs(formed - pushed), 0)
    scale = jnp.max(jnp.where(known, jnp.maximum(jnp.abs(formed), jnp.abs(pushed)), 0))
    at = jnp.argmax(difference)
    return jnp.where(scale > 0, difference[at] / jnp.where(scale > 0, scale, 1), 0), at, formed[at], pushed[at]


def _complain(watch: Watch, layout: Layout, tolerance: float, step: Any, ratio: Any, at: Any, formed: Any, pushed: Any) -> None:
    if not ratio > tolerance:
        return
    named = coordinate(watch.leaves, layout.shapes, int(layout.order()[int(at)]))
    said = (
        f"In {watch.what} {watch.first + int(step)} `{named}` of the new state moves by {float(pushed):.3g} for a random change of the old one, "
        f"and by {float(formed):.3g} according to the Jacobian "
    )
    if watch.claim is None:
        raise StructureError(said + "formed as its program was proved to allow: the proof is wrong, which is a fault of parscan's.")
    raise StructureError(
        said + f"formed as `structure={watch.claim!r}` claims: the claim is wrong, and so is the gradient. "
        "parscan.testing.check_structure says which coordinates depend on one another."
    )
