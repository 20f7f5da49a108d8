"""`scan`: the drop-in for `jax.lax.scan`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from parscan.claims import Claim, parse_structure
from parscan.debug import Watch, names_of
from parscan.jaxprs import Flat, Program, slice_spec, trace
from parscan.methods import Lax, Method, parse_method
from parscan.planning import plan_for
from parscan.recurrence import Recurrence, Run, run_recurrence
from parscan.report import Plan

Carry = TypeVar("Carry")
X = TypeVar("X")
Y = TypeVar("Y")


class _NotAScan(Exception):
    """What f returns is not what `lax.scan` takes."""


@dataclass
class Traced:
    """A scan whose function has been traced and planned. `spec` is None if it is left to JAX."""

    spec: Recurrence | None
    plan: Plan
    consts: list
    init: list
    xs: list
    out_tree: Any


def traced_scan(
    f: Callable, init: Any, xs: Any, length: int | None, reverse: bool, unroll: int | bool, method: Method | None, claim: Claim | None, debug: bool = False
) -> Traced | None:
    """None where `lax.scan` would raise: let it, in its own words."""
    leaves, xs_tree = jax.tree.flatten(xs)
    if not callable(f) or not all(hasattr(x, "shape") and x.ndim for x in leaves):
        return None
    try:
        lengths = {operator.index(n) for n in (*(x.shape[0] for x in leaves), *(() if length is None else (length,)))}
    except TypeError:  # a tracer's error is one, too
        return None
    if len(lengths) != 1:
        return None
    (count,) = lengths
    init_, x = Flat.of(init), Flat([slice_spec(leaf) for leaf in leaves], xs_tree)

    def pair(_, h, x):
        out = f(h, x)
        if not isinstance(out, tuple) or len(out) != 2 or jax.tree.structure(out[0]) != init_.tree:
            raise _NotAScan
        return out

    update_wrapper(pair, f, assigned=("__name__", "__qualname__"))  # JAX names the function that it was tracing
    flat, promoted = init_.leaves, True
    try:
        while promoted:  # at most twice: a weakly typed carry takes the type that comes out, as in lax.scan
            program, consts, out_tree = trace(pair, Flat.of(()), Flat(flat, init_.tree), x, emits=True)
            flat, promoted = _promoted(flat, program)
    except _NotAScan:
        return None
    if not program.is_square:
        return None
    plan, structure = plan_for(program, count, method, claim, fallback=Lax())
    spec = None
    if structure is not None and not isinstance(plan.method, Lax):
        unrolled = (max(count, 1) if unroll else 1) if isinstance(unroll, bool) else unroll
        watches = (Watch("step", claim, leaves=names_of("carry", init)),) if debug else ()
        spec = Recurrence((Run(program, structure, count, True),), plan.method, bool(reverse), unrolled, watches)
    return Traced(spec, plan, consts, flat, leaves, out_tree)


def _promoted(flat: list, program: Program) -> tuple[list, bool]:
    """Weakly typed leaves in the other dtype that the step gives them, and whether there were any."""
    done, changed = [], False
    for leaf, old, new in zip(flat, program.avals[1], program.out_avals[0], strict=True):
        if getattr(old, "weak_type", False) and old.dtype != new.dtype:
            leaf, changed = lax.convert_element_type(jnp.asarray(leaf), new.dtype), True
        done.append(leaf)
    return done, changed


# --- public ------------------------------------------------------------------------------------------------------------


def scan(
    f: Callable[[Carry, X], tuple[Carry, Y]],
    init: Carry,
    xs: X | None = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
    *,
    method: Method | str = "auto",
    structure: Any = "auto",
    debug: bool = False,
) -> tuple[Carry, Y]:
    """`jax.lax.scan` with a parallel backward pass: same arguments, same results, same derivatives of every order.

    The forward loop stays `lax.scan`. What cannot be differentiated in parallel (a `custom_vjp` inside f, a collective over a named
    axis, an effect, a mutable reference, a complex carry), and what would not pay, is left to `lax.scan` altogether;
    `parscan.plan` says which, and why.

    Args:
        f: (carry, x) -> (carry, y), as for `lax.scan`; traced once, twice if the carry is weakly typed, once more if it is left to JAX.
        init: pytree of arrays, any shapes and dtypes; only its floating-point leaves are differentiated.
        xs: pytree of arrays with a common leading axis L, or None.
        length: L, needed if xs is None.
        reverse: from the last x to the first.
        unroll: passed on to the forward loop.
        _split_transpose: passed on where the scan is left to JAX.
        method: `"auto"` or how to travel: `Lax`, `Sequential`, `Walk`, `Associative`, `Tree`, `Chunked`, as values or lower-case names.
        structure: `"auto"` proves which coordinates of the carry never mix; or a claim, taken at its word: `"dense"`, `"diagonal"`, `Blocks(...)`,
            `Band(...)`. A wrong claim is a wrong gradient: `parscan.testing.check_structure` checks one.
        debug: check at run time, wherever a derivative is taken in parallel, that the Jacobians formed are the derivatives of the steps; slow.

    Returns:
        the final carry, and the ys stacked on a leading axis L.

    Raises:
        ValueError: unknown method or structure; a claim that does not fit; a parallel method for an f that has none (the
            equation is named). `parscan.testing.StructureError`, with `debug`: a structure that is wrong; out of a compiled program
            JAX raises its own error with that message. Everything that `lax.scan` raises, in its words.

    Example:
        >>> def rnn(h, x):
        ...     h = jnp.tanh(0.5 * h + x)
        ...     return h, h
        >>> loss = lambda h: parscan.scan(rnn, h, jnp.ones((100, 4)))[1].sum()
        >>> jax.grad(loss)(jnp.zeros(4)).shape
        (4,)
    """
    parsed, claim = parse_method(method), parse_structure(structure)
    traced = None if isinstance(parsed, Lax) else traced_scan(f, init, xs, length, reverse, unroll, parsed, claim, bool(debug))
    if traced is None or traced.spec is None:
        return lax.scan(f, init, xs, length, reverse, unroll, _split_transpose)
    final, (ys,) = run_recurrence(traced.spec, [traced.consts], traced.init, [traced.xs])
    return jax.tree.unflatten(traced.out_tree, [*final, *ys])
