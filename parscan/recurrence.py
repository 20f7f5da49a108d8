"""`scan`, `chain`, `forward`: recurrences as differentiable functions, run by `lax.scan`, differentiated in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from parscan import checks, prefix, system
from parscan.jaxprs import Program, slice_spec, trace
from parscan.methods import Lax, Method, parse_method
from parscan.planning import Plan, plan_for
from parscan.structure import Layout, parse_structure

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
    unroll: int | bool


# --- the forward loop and its derivative ----------------------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(spec: Recurrence, consts: list, init: list, xs: list) -> tuple[list, list]:
    """The final carry and the ys: a plain `lax.scan` where nothing is differentiated."""
    return tuple(lax.scan(lambda h, x: spec.program(consts, h, x), init, xs, spec.length, spec.reverse, spec.unroll))  # type: ignore[return-value]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run_stored(spec: Recurrence, consts: list, init: list, xs: list) -> tuple[list, list, list]:
    """The same, and the carry entering each step. Its own derivative is the same rule, so that every order stays parallel."""
    forwarded = spec.program.forwarded

    def step(h, x):
        new, ys = spec.program(consts, h, x)
        return new, ([y for y, source in zip(ys, forwarded, strict=True) if source is None], h)

    final, (made, entering) = lax.scan(step, init, xs, spec.length, spec.reverse, spec.unroll)
    leaving = prefix.leaving(_boundaries(final, entering, not spec.reverse), spec.reverse) if any(s is not None for s in forwarded) else []
    rest = iter(made)
    return final, [next(rest) if source is None else leaving[source] for source in forwarded], entering


def _boundaries(start: list, rest: list, reverse: bool) -> list:
    """`prefix.boundaries` for leaves of any dtype, keys included."""
    return [jnp.concatenate([r, s[None]] if reverse else [s[None], r]) for s, r in zip(start, rest, strict=True)]


def _derivative(spec: Recurrence, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    """Outputs and tangents of `_run_stored`: one parallel solve, see `parscan.system`."""
    consts, init, xs = primals
    consts_dot, init_dot, xs_dot = tangents
    final, ys, entering = _run_stored(spec, consts, init, xs)
    forwarded = spec.program.forwarded
    at = system.Linearised(
        spec.program,
        spec.layout,
        spec.method,
        spec.reverse,
        consts,
        xs,
        entering,
        _active(consts_dot),
        _active(xs_dot),
        tuple(i for i, y in enumerate(ys) if checks.is_inexact(y) and forwarded[i] is None),
    )
    rhs = system.zeros(at, spec.length)
    start = [jnp.zeros_like(h) if isinstance(d, SymbolicZero) else d for h, d in zip(init, init_dot, strict=True) if checks.is_inexact(h)]
    states = prefix.boundaries(spec.layout.to_vector(start), prefix.leaving(rhs.states, spec.reverse), spec.reverse)
    rhs = rhs._replace(consts=[consts_dot[i] for i in at.active_consts], xs=[xs_dot[i] for i in at.active_xs], states=states)
    solved = system.tangents(at, rhs)

    def scattered(like: list, floats: list) -> list:
        rest = iter(floats)
        return [next(rest) if checks.is_inexact(h) else zero_from_primal(h, symbolic_zeros=True) for h in like]

    from_states = partial(_tangent_leaves, spec.layout)
    final_dot = scattered(final, from_states(prefix.first(solved.states, not spec.reverse)))
    entering_dot = scattered(entering, from_states(prefix.entering(solved.states, spec.reverse)))
    leaving_dot = scattered(entering, from_states(prefix.leaving(solved.states, spec.reverse)))
    made = dict(zip(at.active_ys, solved.ys, strict=True))
    ys_dot = [
        leaving_dot[source] if source is not None else made[i] if i in made else zero_from_primal(y, symbolic_zeros=True)
        for i, (y, source) in enumerate(zip(ys, forwarded, strict=True))
    ]
    return (final, ys, entering), (final_dot, ys_dot, entering_dot)


def _tangent_leaves(layout: Layout, vector: Array) -> list[Array]:
    return layout.from_vector(vector)


def _active(tangents: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero) and t.dtype != jax.dtypes.float0)


@partial(_run.defjvp, symbolic_zeros=True)
def _(spec: Recurrence, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    outs, dots = _derivative(spec, primals, tangents)
    return outs[:2], dots[:2]


_run_stored.defjvp(_derivative, symbolic_zeros=True)

_run_compiled = jax.jit(_run, static_argnums=0)
_run_stored_compiled = jax.jit(_run_stored, static_argnums=0)


# --- public ------------------------------------------------------------------------------------------------------------


@dataclass
class _Traced:
    """A scan whose function has been traced and planned."""

    spec: Recurrence | None
    plan: Plan
    consts: list
    init: list
    xs: list
    out_tree: Any

    @classmethod
    def of(cls, f, init, xs, length, reverse, unroll, method, structure) -> _Traced | None:
        """None where `lax.scan` would raise: let it."""
        leaves = jax.tree.leaves(xs)
        if not all(hasattr(x, "shape") and x.ndim for x in leaves):
            return None
        lengths = {x.shape[0] for x in leaves} | ({length} if length is not None else set())
        if len(lengths) != 1:
            return None
        (count,) = lengths
        specs = jax.tree.map(slice_spec, xs)
        flat, tree = jax.tree.flatten(init)
        for _ in range(2):  # a weakly typed carry takes the type that comes out, as in lax.scan
            program, consts, out = trace(f, jax.tree.unflatten(tree, flat), specs)
            if not isinstance(out, tuple) or len(out) != 2 or jax.tree.structure(out[0]) != tree:
                return None
            flat, promoted = _promoted(flat, program)
            if not promoted:
                break
        news, olds = program.out_avals[0], program.avals[1]
        if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in zip(news, olds, strict=True)):
            return None
        plan, layout = plan_for(program, count, method, structure, fallback=Lax())
        handed_over = layout is None or isinstance(plan.method, Lax)
        spec = None if handed_over else Recurrence(program, layout, plan.method, bool(reverse), count, unroll)
        return cls(spec, plan, consts, flat, leaves, jax.tree.structure(out))


def _promoted(flat: list, program: Program) -> tuple[list, bool]:
    done, changed = [], False
    for leaf, old, new in zip(flat, program.avals[1], program.out_avals[0], strict=True):
        if getattr(old, "weak_type", False) and (old.dtype != new.dtype or not new.weak_type):
            leaf, changed = lax.convert_element_type(leaf, new.dtype), True
        done.append(leaf)
    return done, changed


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
    """`jax.lax.scan` with a parallel backward pass."""
    method_, claim = parse_method(method), parse_structure(structure)
    hand_over = partial(lax.scan, f, init, xs, length, reverse, unroll, _split_transpose)
    if isinstance(method_, Lax):
        return hand_over()
    traced = _Traced.of(f, init, xs, length, reverse, unroll, method_, claim)
    if traced is None or traced.spec is None:
        return hand_over()
    final, ys = _run_compiled(traced.spec, traced.consts, traced.init, traced.xs)
    return jax.tree.unflatten(traced.out_tree, [*final, *ys])
