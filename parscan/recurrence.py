"""`scan`, `chain`, `forward`: recurrences as differentiable functions, run by `lax.scan`, differentiated in parallel."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from parscan import checks, prefix, system
from parscan.jaxprs import Flat, Program, jit_unless_staged, slice_spec, trace
from parscan.methods import Lax, Method, parse_method
from parscan.planning import Plan, plan_for
from parscan.stacking import check_layer, check_state, split_params
from parscan.structure import Claim, Layout, active_leaves, parse_structure

Carry = TypeVar("Carry")
X = TypeVar("X")
Y = TypeVar("Y")


@dataclass(frozen=True)
class Recurrence:
    """All that is static about a scan: what `jax.jit` compiles once for."""

    program: Program
    layout: Layout
    method: Method
    reverse: bool
    length: int
    unroll: int


# --- the forward loop and its derivative ----------------------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(spec: Recurrence, consts: list, init: list, xs: list) -> tuple[list, list]:
    """The final carry and the ys: a plain `lax.scan` where nothing is differentiated."""
    outs = lax.scan(lambda h, x: spec.program(consts, h, x), init, xs, spec.length, spec.reverse, spec.unroll)
    return _evenly(outs, (consts, init, xs))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run_stored(spec: Recurrence, consts: list, init: list, xs: list) -> tuple[list, list, list]:
    """The same, and the carry entering each step. Its own derivative is the same rule, so that every order stays parallel.

    A leaf of the carry that f also emits is stacked once.
    """
    emitted = {source: i for i, source in enumerate(spec.program.forwarded) if source is not None}

    def step(h, x):
        new, ys = spec.program(consts, h, x)
        return new, (ys, [leaf for i, leaf in enumerate(h) if i not in emitted])

    final, (ys, rest) = lax.scan(step, init, xs, spec.length, spec.reverse, spec.unroll)
    others = iter(rest)
    entering = [_shifted(init[i], ys[emitted[i]], spec.reverse) if i in emitted else next(others) for i in range(len(init))]
    return _evenly((final, ys, entering), (consts, init, xs))


def _shifted(start: Array, leaving: Array, reverse: bool) -> Array:
    """What enters each step, from what enters the first and what leaves each."""
    if leaving.shape[0] == 0:
        return leaving
    parts = [leaving[1:], start[None]] if reverse else [start[None], leaving[:-1]]
    return jnp.concatenate(parts)


def _evenly(outs: Any, ins: Any) -> Any:
    """The same values, each of which depends, formally, on every input, and has its batch axis first.

    `jax.vmap` keeps a `custom_jvp` function and its rule side by side and trusts them to batch their outputs alike, whichever runs.
    The two compute by different operations, so that must be forced: a select between a value and itself follows the
    inputs, and an axis put on and taken off again leaves the batch in front. XLA removes both.
    """
    follows = system.nothing(ins) == 0
    return jax.tree.map(lambda leaf: lax.squeeze(lax.expand_dims(jnp.where(follows, leaf, leaf), (0,)), (0,)), outs)


def _boundaries(start: list, rest: list, reverse: bool) -> list:
    """`prefix.boundaries` for leaves of any dtype, keys included."""
    return [jnp.concatenate([r, s[None]] if reverse else [s[None], r]) for s, r in zip(start, rest, strict=True)]


def _derivative(spec: Recurrence, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    """Outputs and tangents of `_run_stored`: one parallel solve, see `parscan.system`."""
    consts, init, xs = primals
    consts_dot, init_dot, xs_dot = tangents
    final, ys, entering = _run_stored(spec, consts, init, xs)
    forwarded = spec.program.forwarded
    from_consts, from_xs = _active(consts_dot), _active(xs_dot)
    moving, emitting = active_leaves(spec.program, from_consts, _active(init_dot), from_xs)
    at = system.Linearised(
        spec.program,
        spec.layout,
        spec.method,
        spec.reverse,
        consts,
        xs,
        entering,
        from_consts,
        moving,
        from_xs,
        tuple(i for i in emitting if forwarded[i] is None),
    )
    rhs = system.zeros(at, spec.length)
    start = [jnp.zeros_like(h) if isinstance(d, SymbolicZero) else d for h, d in zip(init, init_dot, strict=True) if checks.is_inexact(h)]
    states = prefix.boundaries(start, prefix.leaving(rhs.states, spec.reverse), spec.reverse)
    rhs = rhs._replace(consts=[consts_dot[i] for i in at.active_consts], xs=[xs_dot[i] for i in at.active_xs], states=states)
    solved = system.tangents(at, rhs)

    def scattered(like: list, floats: list) -> list:
        all_ = dict(zip((i for i, h in enumerate(like) if checks.is_inexact(h)), floats, strict=True))
        return [all_[i] if i in moving else zero_from_primal(h, symbolic_zeros=True) for i, h in enumerate(like)]

    final_dot = scattered(final, prefix.first(solved.states, not spec.reverse))
    entering_dot = scattered(entering, prefix.entering(solved.states, spec.reverse))
    leaving_dot = scattered(entering, prefix.leaving(solved.states, spec.reverse))
    made = dict(zip(at.active_ys, solved.ys, strict=True))
    ys_dot = [
        leaving_dot[source] if source is not None else made[i] if i in made else zero_from_primal(y, symbolic_zeros=True)
        for i, (y, source) in enumerate(zip(ys, forwarded, strict=True))
    ]
    return (final, ys, entering), (final_dot, ys_dot, entering_dot)


def _active(tangents: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero) and t.dtype != jax.dtypes.float0)


@partial(_run.defjvp, symbolic_zeros=True)
def _(spec: Recurrence, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    outs, dots = _derivative(spec, primals, tangents)
    return outs[:2], dots[:2]


_run_stored.defjvp(_derivative, symbolic_zeros=True)

_compiled = jit_unless_staged(_run)
_compiled_stored = jit_unless_staged(_run_stored)


# --- tracing and planning ---------------------------------------------------------------------------------------------


class _NotAScan(Exception):
    """What f returns is not what `lax.scan` takes."""


@dataclass
class _Traced:
    """A scan whose function has been traced and planned. `spec` is None if it is left to JAX."""

    spec: Recurrence | None
    plan: Plan
    consts: list
    init: list
    xs: list
    out_tree: Any


def _traced(
    f: Callable, init: Any, xs: Any, length: int | None, reverse: bool, unroll: int | bool, method: Method | None, claim: Claim | None
) -> _Traced | None:
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
            program, consts, out_tree = trace(pair, Flat.of(()), Flat(flat, init_.tree), x)
            flat, promoted = _promoted(flat, program)
    except _NotAScan:
        return None
    if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in zip(program.out_avals[0], program.avals[1], strict=True)):
        return None
    plan, layout = plan_for(program, count, method, claim, fallback=Lax())
    spec = None
    if layout is not None and not isinstance(plan.method, Lax):
        spec = Recurrence(program, layout, plan.method, bool(reverse), count, (max(count, 1) if unroll else 1) if isinstance(unroll, bool) else unroll)
    return _Traced(spec, plan, consts, flat, leaves, out_tree)


def _promoted(flat: list, program: Program) -> tuple[list, bool]:
    """Weakly typed leaves in the strong dtype that the step gives them, and whether there were any."""
    done, changed = [], False
    for leaf, old, new in zip(flat, program.avals[1], program.out_avals[0], strict=True):
        if getattr(old, "weak_type", False) and (old.dtype != new.dtype or not new.weak_type):
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
        structure: `"auto"` proves which coordinates of the carry never mix; or a claim, taken at its word: `"dense"`, `"diagonal"`, `Blocks(...)`.

    Returns:
        the final carry, and the ys stacked on a leading axis L.

    Raises:
        ValueError: unknown method or structure; a claim that does not fit; a parallel method for an f that has none (the
            equation is named). Everything that `lax.scan` raises, in its words.

    Example:
        >>> def rnn(h, x):
        ...     h = jnp.tanh(0.5 * h + x)
        ...     return h, h
        >>> loss = lambda h: parscan.scan(rnn, h, jnp.ones((100, 4)))[1].sum()
        >>> jax.grad(loss)(jnp.zeros(4)).shape
        (4,)
    """
    parsed, claim = parse_method(method), parse_structure(structure)
    traced = None if isinstance(parsed, Lax) else _traced(f, init, xs, length, reverse, unroll, parsed, claim)
    if traced is None or traced.spec is None:
        return lax.scan(f, init, xs, length, reverse, unroll, _split_transpose)
    final, ys = _compiled(traced.spec, traced.consts, traced.init, traced.xs)
    return jax.tree.unflatten(traced.out_tree, [*final, *ys])


def plan(
    f: Callable[[Carry, X], tuple[Carry, Y]],
    init: Carry,
    xs: X | None = None,
    length: int | None = None,
    reverse: bool = False,
    *,
    method: Method | str = "auto",
    structure: Any = "auto",
) -> Plan:
    """What `scan` would do with these arguments, and why, without running anything.

    Args:
        f, init, xs, length, reverse, method, structure: as for `scan`; arrays may be `jax.ShapeDtypeStruct`s.

    Returns:
        the kind of the Jacobians, their blocks, the method with its sizes, the reason.

    Raises:
        ValueError: whatever `scan` raises for these arguments.

    Example:
        >>> def f(h, x):
        ...     return jnp.tanh(h @ jnp.ones((8, 8)) + x), None
        >>> parscan.plan(f, jnp.zeros((32, 8)), jnp.ones((1000, 8))).blocks
        {8: 32}
    """
    parsed, claim = parse_method(method), parse_structure(structure)
    traced = _traced(f, init, xs, length, reverse, 1, parsed, claim)
    if traced is None:
        jax.eval_shape(lambda init, xs: lax.scan(f, init, xs, length, reverse), init, xs)
        raise ValueError("`lax.scan` accepts these arguments, but parscan cannot read them; it leaves them to `lax.scan`.")
    return traced.plan


def forward(
    layer: Callable[[Any, Carry], Carry],
    params: Any,
    x: Carry,
    *,
    params_axes: Any = 0,
    length: int | None = None,
    method: Method | str = "auto",
    structure: Any = "auto",
) -> tuple[Carry, Any]:
    """Runs a chain of layers and keeps every activation; differentiable, with the same parallel rule.

    Args:
        layer: (params_i, h) -> h; the state keeps its structure, shapes and dtypes.
        params: pytree, leaves stacked on a leading axis L or shared.
        x: h_0, pytree of arrays.
        params_axes: prefix of `params`: 0 for stacked, None for shared by all layers.
        length: L, needed if all parameters are shared.
        method, structure: as for `scan`.

    Returns:
        h_L, and the activations h_0 … h_L stacked on a leading axis L + 1.

    Raises:
        ValueError: parameters that are not stacked alike; unknown method or structure. TypeError: a layer that changes the state's type.

    Example:
        >>> y, activations = parscan.forward(lambda w, h: jnp.tanh(w * h), jnp.ones((10, 3)), jnp.ones(3))
        >>> activations.shape
        (11, 3)
    """
    check_layer(layer)
    parsed, claim = parse_method(method), parse_structure(structure)
    stacked = split_params(params, params_axes, length)

    def step(h, p):
        new = layer(stacked.join(p), h)
        return check_state(h, new), h

    traced = None if isinstance(parsed, Lax) else _traced(lambda h, p: (step(h, p)[0], None), x, stacked.leaves, stacked.length, False, 1, parsed, claim)
    if traced is None or traced.spec is None:
        final, entering = lax.scan(step, x, stacked.leaves, stacked.length)
        leaves, tree = jax.tree.flatten(final)
        return final, jax.tree.unflatten(tree, _boundaries(leaves, jax.tree.leaves(entering), reverse=True))
    final, _, entering = _compiled_stored(traced.spec, traced.consts, traced.init, traced.xs)
    activations = _boundaries(final, entering, reverse=True)
    tree = jax.tree.structure(x)
    return jax.tree.unflatten(tree, final), jax.tree.unflatten(tree, activations)


def chain(
    layer: Callable[[Any, Carry], Carry],
    *,
    params_axes: Any = 0,
    length: int | None = None,
    return_activations: bool = False,
    method: Method | str = "auto",
    structure: Any = "auto",
) -> Callable[[Any, Carry], Any]:
    """A chain of layers as one differentiable function `apply(params, x)`.

    Args:
        layer: (params_i, h) -> h.
        params_axes, length, method, structure: as for `forward`.
        return_activations: give `(h_L, h_0 … h_L)` instead of h_L.

    Returns:
        apply(params, x): x is h_0, the result h_L, or with `return_activations` what `forward` returns.

    Raises:
        ValueError: unknown method or structure, at once; the rest when applied, as `forward` does.

    Example:
        >>> apply = parscan.chain(lambda w, h: h + jnp.tanh(h @ w))
        >>> jax.grad(lambda w: apply(w, jnp.ones((4, 3))).sum())(jnp.ones((50, 3, 3))).shape
        (50, 3, 3)
    """
    check_layer(layer)
    parsed, claim = parse_method(method), parse_structure(structure)

    def apply(params, x):
        if return_activations:
            return forward(layer, params, x, params_axes=params_axes, length=length, method=method, structure=structure)
        stacked = split_params(params, params_axes, length)

        def step(h, p):
            return check_state(h, layer(stacked.join(p), h)), None

        return scan(step, x, stacked.leaves, stacked.length, method=parsed or "auto", structure=claim or "auto")[0]

    return apply
