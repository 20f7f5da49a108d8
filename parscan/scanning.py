"""`scan`: the drop-in for `jax.lax.scan`."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from parscan.checks import is_inexact
from parscan.claims import Claim, parse_structure
from parscan.debug import Watch, names_of
from parscan.jaxprs import Flat, Program, is_staged, jit_unless_staged, obstacle, slice_spec, trace
from parscan.methods import Lax, Method, Travelling, parse_method
from parscan.planning import plan_for
from parscan.recurrence import Recurrence, Run, run_recurrence
from parscan.report import Plan

logger = logging.getLogger("parscan")

Carry = TypeVar("Carry")
X = TypeVar("X")
Y = TypeVar("Y")


class _NotAScan(Exception):
    """What f returns is not what `lax.scan` takes."""


@dataclass(frozen=True)
class _AsTraced:
    """A `lax.scan` of a step that has been traced."""

    program: Program
    count: int
    reverse: bool
    unroll: int | bool
    split_transpose: bool

    @property
    def is_portable(self) -> bool:
        return self.program.is_portable


_scan_as_traced = jit_unless_staged(
    lambda spec, consts, init, xs: lax.scan(lambda h, x: spec.program(consts, h, x), init, xs, spec.count, spec.reverse, spec.unroll, spec.split_transpose)
)


@dataclass
class Traced:
    """A scan whose function has been traced and planned.

    spec: None if it is left to JAX. as_traced: then, the same scan of what has been traced; None if the function itself must be given to JAX.
    varying: which leaves of the carry are the state of the recurrence; the others are handed on from step to step as they are, and are constants.
    """

    spec: Recurrence | None
    as_traced: _AsTraced | None
    plan: Plan
    consts: list
    init: Flat
    varying: list[int]
    xs: list
    out_tree: Any

    @property
    def state(self) -> Any:
        """The carry with `None` for what does not vary."""
        return only(self.init, self.varying)


def only(given: Flat, places: list[int]) -> Any:
    """A pytree with `None` for all leaves but some."""
    return jax.tree.unflatten(given.tree, [leaf if i in places else None for i, leaf in enumerate(given.leaves)])


def traced_scan(
    f: Callable,
    init: Any,
    xs: Any,
    length: int | None,
    reverse: bool,
    method: Method | None,
    claim: Claim | None,
    *,
    unroll: int | bool = 1,
    split_transpose: bool = False,
    debug: bool = False,
) -> Traced | None:
    """None where `lax.scan` would raise: let it, in its own words."""
    leaves, xs_tree = jax.tree.flatten(xs)
    if not callable(f) or not all(hasattr(x, "shape") and x.ndim for x in leaves):
        return None
    try:
        lengths = {operator.index(n) for n in (*(x.shape[0] for x in leaves), *(() if length is None else (length,)))}
        reverse, unroll = bool(reverse), unroll if isinstance(unroll, bool) else operator.index(unroll)
    except TypeError:  # a tracer's error is one, too
        return None
    if len(lengths) != 1:
        return None
    (count,) = lengths
    found = _trace_step(f, Flat.of(init), leaves, xs_tree)
    if found is None:
        return None
    program, consts, init_, out_tree = found
    varying = list(range(program.num_carry))
    if claim is None:  # a claim speaks of the whole carry
        program, varying = program.with_fixed_leaves_as_constants()
        consts = [*consts, *(leaf for i, leaf in enumerate(init_.leaves) if i not in varying)]
    plan, structure = plan_for(program, count, method, claim, fallback=Lax())
    spec, as_traced = None, None
    if structure is not None and isinstance(plan.method, Travelling):
        unrolled = (max(count, 1) if unroll else 1) if isinstance(unroll, bool) else unroll
        watches = (Watch("step", claim, leaves=names_of("carry", only(init_, varying))),) if debug else ()
        spec = Recurrence((Run(program, structure, count, True),), plan.method, bool(reverse), unrolled, watches)
    elif is_staged() or obstacle(program) is None:  # traced again, a function that draws from a state of its own would draw other numbers
        as_traced = _AsTraced(program, count, bool(reverse), unroll, split_transpose)
    return Traced(spec, as_traced, plan, consts, init_, varying, leaves, out_tree)


def _trace_step(f: Callable, init: Flat, xs: list, xs_tree: Any) -> tuple[Program, list, Flat, Any] | None:
    """The step, the values that it closes over, the first carry in the dtypes that the step gives it, and the tree of its output. None if it is no step."""

    def pair(_, h, x):
        out = f(h, x)
        if not isinstance(out, tuple) or len(out) != 2 or jax.tree.structure(out[0]) != init.tree:
            raise _NotAScan
        return out

    update_wrapper(pair, f, assigned=("__name__", "__qualname__"))  # JAX names the function that it was tracing
    try:
        x = Flat([slice_spec(leaf) for leaf in xs], xs_tree)
        program, consts, out_tree = trace(pair, Flat.of(()), init, x, emits=True)
        flat, promoted = _promoted(init.leaves, program)
        if promoted:  # once, as by `lax.scan`
            program, consts, out_tree = trace(pair, Flat.of(()), Flat(flat, init.tree), x, emits=True)
    except Exception:  # _NotAScan, f's own, or JAX's, which names the transformation that it was tracing for
        return None
    return (program, consts, Flat(flat, init.tree), out_tree) if program.is_square else None


def _promoted(flat: list, program: Program) -> tuple[list, bool]:
    """Weakly typed leaves to which the step gives another dtype in the one that holds both, and whether there were any; as in `lax.scan`."""
    done, changed = [], False
    for leaf, old, new in zip(flat, program.avals[1], program.out_avals[0], strict=True):
        if getattr(old, "weak_type", False) and old.dtype != new.dtype:
            leaf, changed = lax.convert_element_type(leaf, jnp.result_type(leaf, new)), True
        done.append(leaf)
    return done, changed


def _stays_discrete(init: Any) -> bool:
    """Whether no leaf of the carry is floating-point, nor can become it by promotion."""
    leaves = jax.tree.leaves(init)
    return all(hasattr(leaf, "dtype") and not is_inexact(leaf) and not jax.typeof(leaf).weak_type for leaf in leaves)


def _left_alone(method: Method | None, init: Any) -> str:
    """Why f is not even traced; empty if it is."""
    if isinstance(method, Lax):
        return "asked for"
    # Without jit f is given values, one by one: it need not be traceable.
    if method is None and jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        return "JAX is told not to compile"
    return "nothing in the carry is differentiable" if method is None and _stays_discrete(init) else ""


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

    The forward loop stays `lax.scan`, of what the carry has a part in: products with x and functions of x alone are computed for all steps at
    once, and equal the loop's but for rounding. What cannot be differentiated in parallel (a `custom_vjp` inside f, a collective over a named
    axis, an effect, a mutable reference, a complex carry), and what would not pay, is left to `lax.scan` altogether;
    `parscan.plan` says which, and why.

    Args:
        f: (carry, x) -> (carry, y), as for `lax.scan`; traced once, twice if the carry is weakly typed; once more outside of `jax.jit` if
            there is something in it that cannot be parallel.
        init: pytree of arrays, any shapes and dtypes; only its floating-point leaves are differentiated.
        xs: pytree of arrays, any dtypes, with a common leading axis L; or None.
        length: L, needed if xs is None.
        reverse: from the last x to the first.
        unroll: passed on to the forward loop.
        _split_transpose: passed on where the scan is left to JAX.
        method: `"auto"` or how to travel: `Lax`, `Sequential`, `Walk`, `Associative`, `Tree`, `Chunked`, as values or lower-case names.
        structure: `"auto"` proves which coordinates of the carry never mix; or a claim, taken at its word: `"dense"`, `"diagonal"`, `Blocks(...)`,
            `Band(...)`. A wrong claim is a wrong gradient: `parscan.testing.check_structure` checks one.
        debug: check at run time, wherever a derivative is taken in parallel, that the Jacobians formed are the derivatives of the steps; slow.

    Returns:
        the final carry, a pytree like `init`, and the ys, a pytree of f's shapes and dtypes stacked on a leading axis L.

    Raises:
        ValueError: unknown method or structure; a claim that does not fit; a parallel method for an f that has none (the equation is named).
        TypeError: a method or structure that is neither a name nor such a value.
        parscan.testing.StructureError: with `debug`, a structure that is wrong; out of a compiled program JAX raises its own error with that message.
        Exception: everything that `lax.scan` raises, in its words.

    Example:
        >>> def rnn(h, x):
        ...     h = jnp.tanh(0.5 * h + x)
        ...     return h, h
        >>> loss = lambda h: parscan.scan(rnn, h, jnp.ones((100, 4)))[1].sum()
        >>> jax.grad(loss)(jnp.zeros(4)).shape
        (4,)
    """
    parsed, claim = parse_method(method), parse_structure(structure)
    traced, why = None, _left_alone(parsed, init)
    if not why:
        traced = traced_scan(f, init, xs, length, reverse, parsed, claim, unroll=unroll, split_transpose=_split_transpose, debug=bool(debug))
    if traced is None:
        logger.debug("lax.scan for a scan of %r: %s", f, why or "it is no scan that can be read, and lax.scan may say why")
    if traced is None or (traced.spec is None and traced.as_traced is None):
        return lax.scan(f, init, xs, length, reverse, unroll, _split_transpose)
    start, consts = traced.init.leaves, [c if hasattr(c, "shape") else jnp.asarray(c) for c in traced.consts]
    state = [start[i] for i in traced.varying]
    if traced.spec is None:
        some, ys = _scan_as_traced(traced.as_traced, consts, state, traced.xs)
    else:
        some, (ys,) = run_recurrence(traced.spec, [consts], state, [traced.xs])
    final = dict(zip(traced.varying, some, strict=True))
    return jax.tree.unflatten(traced.out_tree, [*(final[i] if i in final else jnp.asarray(leaf) for i, leaf in enumerate(start)), *ys])
