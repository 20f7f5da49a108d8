"""Recurrences and stretches of a network as differentiable functions: run one step after another, differentiated in parallel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from parscan import checks, prefix, system
from parscan.debug import Watch, check_runs
from parscan.jaxprs import Program, cut_ahead, jit_unless_staged
from parscan.methods import Travelling
from parscan.proof import active_leaves
from parscan.structure import Structure


@dataclass(frozen=True)
class Run:
    """Equal steps, one after another.

    structure: of its Jacobians.
    repeats: a loop, whose state keeps its shape; otherwise a single layer.
    """

    program: Program
    structure: Structure
    count: int
    repeats: bool


@dataclass(frozen=True)
class Recurrence:
    """All that is static about a scan, or about a stretch of a network: what `jax.jit` compiles once for.

    debug: for every run, how errors speak of it, if Jacobians are to be checked while they are formed.
    """

    runs: tuple[Run, ...]
    method: Travelling
    reverse: bool = False
    unroll: int = 1
    debug: tuple[Watch, ...] = ()

    @property
    def is_portable(self) -> bool:
        """Whether it may be compiled apart from where it was traced."""
        return all(run.program.is_portable for run in self.runs)


# --- the forward loop -------------------------------------------------------------------------------------------------


def run_loop(program: Program, consts: list, init: list, xs: list, count: int, *, out: Callable, spec: Recurrence | None = None) -> tuple[list, Any]:
    """The final carry, and `out(carry, ys)` of each step, stacked. With a `spec`, what needs no state is computed before the loop."""
    cut = None if spec is None else cut_ahead(program, jax.default_backend())
    reverse, unroll = (False, 1) if spec is None else (spec.reverse, spec.unroll)

    def stepping(step):
        def one(h, x):
            new, ys = step(h, x)
            return new, out(h, ys)

        return one

    weak = any(a.weak_type for group in program.out_avals for a in group if hasattr(a, "weak_type"))  # segments put together would not be
    if spec is None or cut is None or (weak and spec.method.cuts([count])):
        return lax.scan(stepping(lambda h, x: program(consts, h, x)), init, xs, count, reverse, unroll)
    constants = cut.constants(consts)

    def cross(h, xs, size):
        return lax.scan(stepping(partial(cut.step, constants)), h, cut.of_all(constants, xs), size, reverse, unroll)

    return prefix.by_segments(cross, init, xs, count, spec.method.segment, reverse=reverse)


def run_steps(program: Program, consts: list, init: list, xs: list, count: int, *, repeats: bool, spec: Recurrence | None = None) -> tuple:
    """The final carry, the ys and the carry entering each step (leading axis L). A leaf of the carry that the step also emits is stacked once."""
    if not repeats:
        new, ys = program(consts, init, [x[0] for x in xs])
        return new, [y[None] for y in ys], [h[None] for h in init]
    emitted = {source: i for i, source in enumerate(program.forwarded) if source is not None}

    def out(h, ys):
        return ys, [leaf for i, leaf in enumerate(h) if i not in emitted]

    final, (ys, rest) = run_loop(program, consts, init, xs, count, out=out, spec=spec)
    others, reverse = iter(rest), spec is not None and spec.reverse
    return final, ys, [shifted(init[i], ys[emitted[i]], reverse) if i in emitted else next(others) for i in range(len(init))]


def shifted(start: Array, leaving: Array, reverse: bool) -> Array:
    """What enters each step, from what enters the first and what leaves each; against the chain, what leaves each from what enters."""
    if leaving.shape[0] == 0:
        return leaving
    parts = [leaving[1:], start[None]] if reverse else [start[None], leaving[:-1]]
    return jnp.concatenate(parts)


def _evenly(outs: Any, ins: Any) -> Any:
    """The same values, each differentiable one of which depends, formally, on every input, and has its batch axis first.

    `jax.vmap` keeps a `custom_jvp` function and its rule side by side and trusts them to batch their outputs alike, whichever runs.
    The two compute by different operations, so that must be forced: a select between a value and itself follows the
    inputs, and an axis put on and taken off again leaves the batch in front. XLA removes both.
    """
    follows = system.nothing(ins) == 0

    def even(leaf):
        return lax.squeeze(lax.expand_dims(jnp.where(follows, leaf, leaf), (0,)), (0,)) if checks.is_inexact(leaf) else leaf

    return jax.tree.map(even, outs)


# --- and its derivative -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _differentiable(spec: Recurrence) -> tuple[Callable, Callable]:
    """`(consts, init, xs)`, lists by run, to the final carry and the ys; and to these and the carry entering each step.

    The second one's derivative is the same rule, so that every order stays parallel. Both are the same objects for equal `spec`s.
    """

    @jax.custom_jvp
    def run(consts: list, init: list, xs: list) -> tuple[list, list]:
        (one, *others), h = spec.runs, init
        if not others and one.repeats:  # a plain `lax.scan` where nothing is differentiated
            h, y = run_loop(one.program, consts[0], init, xs[0], one.count, out=lambda _, ys: ys, spec=spec)
            return _evenly((h, [y]), (consts, init, xs))
        return stored_values(consts, init, xs)[:2]

    @jax.custom_jvp
    def stored(consts: list, init: list, xs: list) -> tuple[list, list, list]:
        return stored_values(consts, init, xs)

    def stored_values(consts, init, xs):
        h, ys, entering = init, [], []
        for one, c, x in zip(spec.runs, consts, xs, strict=True):
            h, y, before = run_steps(one.program, c, h, x, one.count, repeats=one.repeats, spec=spec)
            ys.append(y)
            entering.append(before)
        return _evenly((h, ys, entering), (consts, init, xs))

    def derivative(primals, tangents):
        with jax.numpy_rank_promotion("allow"):  # a setting for the user's step, which has been traced
            return _derivative(spec, stored, primals, tangents)

    def shorter(primals, tangents):
        outs, dots = derivative(primals, tangents)
        return outs[:2], dots[:2]

    for function, rule in ((run, shorter), (stored, derivative)):
        rule.depends_on = (function.__name__, spec)  # pyright: ignore[reportFunctionMemberAccess]  # for `parscan.jaxprs`: all that this rule is made of
        function.defjvp(rule, symbolic_zeros=True)
    return run, stored


def _derivative(spec: Recurrence, stored: Callable, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    """Outputs and tangents of `stored`: one parallel solve, see `parscan.system`."""
    consts, init, xs = primals
    consts_dot, init_dot, xs_dot = tangents
    final, ys, entering = stored(consts, init, xs)
    active, runs, emits = [_active(init_dot)], [], []
    for run, c, x, states, c_dot, x_dot in zip(spec.runs, consts, xs, entering, consts_dot, xs_dot, strict=True):
        of_consts, of_xs = _active(c_dot), _active(x_dot)
        old, new, emitting = active_leaves(run.program, run.repeats, of_consts, active[-1], of_xs)
        emitting = tuple(i for i in emitting if run.program.forwarded[i] is None)
        emits.append(() if run.program.has_branches else emitting)
        solved_for = emitting if run.program.has_branches else ()
        runs.append(system.Linearised(run.program, run.structure, c, x, states, of_consts, old, of_xs, solved_for, run.count))
        active.append(new)
    check_runs(runs, spec.debug)
    at = system.System(runs, spec.method, spec.reverse)
    zero = system.zeros(at, system.nothing([d for d in jax.tree.leaves(tangents) if not isinstance(d, SymbolicZero)]))
    given = [
        some._replace(consts=[c_dot[i] for i in run.active_consts], xs=[x_dot[i] for i in run.active_xs])
        for run, some, c_dot, x_dot in zip(runs, zero.runs, consts_dot, xs_dot, strict=True)
    ]
    start = [jnp.zeros_like(h) if isinstance(d, SymbolicZero) else d for h, d in zip(init, init_dot, strict=True) if checks.is_inexact(h)]
    solved = system.tangents(at, system.Unknowns(start, given))

    before = list(at.entering(solved))
    entering_dot = [_scattered(h, run.active_states, floats) for h, run, floats in zip(entering, runs, before, strict=True)]
    made = [_made(at, *each) for each in zip(runs, emits, given, before, solved.runs, strict=True)]
    ys_dot = [_emitted(run, y, some, new, moving) for run, y, some, new, moving in zip(runs, ys, solved.runs, made, active[1:], strict=True)]
    last = prefix.first(solved.runs[-1].states, not spec.reverse) if runs[-1].count else solved.start
    return (final, ys, entering), (_scattered(final, active[-1], last), ys_dot, entering_dot)


def _scattered(like: list, moving: Sequence[int], floats: list) -> list:
    """Tangents for all leaves, from those of the floating-point ones."""
    found = dict(zip((i for i, h in enumerate(like) if checks.is_inexact(h)), floats, strict=True))
    return [found[i] if i in moving else zero_from_primal(h, symbolic_zeros=True) for i, h in enumerate(like)]


def _made(
    at: system.System, run: system.Linearised, emits: tuple[int, ...], given: system.RunUnknowns, entering: list, solved: system.RunUnknowns
) -> dict[int, Array]:
    """Tangents of the outputs that are no leaves of the carry, by position.

    They follow from the states' by one batched push outside of the solve, which would need a cotangent of every output, also of those that are not used.
    Not with a `cond` in the step: see `Linearised.pull_inputs`. What linearises the steps is computed when it is needed, not kept from the forward pass on.
    """
    if not emits:
        return dict(zip(run.active_ys, solved.ys, strict=True))

    bare = replace(run, consts=(), states=(), xs=(), active_ys=emits)  # JAX remembers what is checkpointed, which must hold no tracer

    @partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
    def push(at_consts, consts, steps, count):
        (states, xs), *tangents = steps
        return replace(bare, consts=at_consts, states=states, xs=xs, count=count).push_all(consts, *tangents)[1]

    def cross(consts, steps, count):
        return consts, push(list(run.consts), consts, steps, count)

    _, made = prefix.by_segments(cross, given.consts, (run.data, entering, given.xs), run.count, at.method.segment)
    return dict(zip(emits, made, strict=True))


def _emitted(run: system.Linearised, ys: list, solved: system.RunUnknowns, made: dict[int, Array], moving: Sequence[int]) -> list:
    """Tangents of a run's outputs: made of the states', or those of the new carry where an output is a leaf of it."""
    leaving = dict(zip((i for i, h in enumerate(run.program.out_avals[0]) if checks.is_inexact(h)), solved.states, strict=True))

    def one(i, y, source):
        if source is not None and source in moving:
            return leaving[source]
        return made[i] if i in made else zero_from_primal(y, symbolic_zeros=True)

    return [one(i, y, source) for i, (y, source) in enumerate(zip(ys, run.program.forwarded, strict=True))]


def _active(tangents: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero) and t.dtype != jax.dtypes.float0)


run_recurrence = jit_unless_staged(lambda spec, *arguments: _differentiable(spec)[0](*arguments))
run_recurrence_stored = jit_unless_staged(lambda spec, *arguments: _differentiable(spec)[1](*arguments))
