"""The derivative of a whole chain as one linear system, solved in parallel in both directions.

Linearised at its stored states, a chain h_i, y_i = f_i(θ, h_{i-1}, x_i) maps tangents (θ', x', h_0') to

    h_i' = J_i h_{i-1}' + B_i (θ', x_i'),      y_i' = C_i h_{i-1}' + D_i (θ', x_i').

With U = (θ', x', h', y') stacked this reads A U = r, A unit lower triangular and *local*: a step touches its
neighbour only. `lax.custom_linear_solve` is told A, how to solve with it (tangents: `sweep` along the chain) and how to solve with its
transpose (cotangents: `sweep` against it, then one batched pull-back to θ and x). JAX then knows everything else: jvp, transpose,
batching, and every higher derivative, since the derivative of a solve is a solve with the same A. Nothing of the sweeps is
ever differentiated, no Jacobian is kept from the forward pass, and each direction scales its matrices on its own side.

A chain is a sequence of *runs*: a recurrence is one run of equal steps, a network of different layers has several, some of a single layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from parscan import guard, prefix
from parscan.checks import is_inexact
from parscan.guard import Check, Rounding
from parscan.jaxprs import Program, contracted, flops, masks_nothing, roundoff, staged
from parscan.layout import Layout
from parscan.maps import Chain
from parscan.methods import Sequential, Travelling
from parscan.structure import Structure
from parscan.sweep import judged, sweep, sweep_on


class RunUnknowns(NamedTuple):
    """One run's share of U, for its active leaves: constants, inputs (leading axis L), states leaving each step (L), outputs (L).

    States are leaves, not vectors: A touches no coordinate that the step itself does not, so structure stays visible through it.
    """

    consts: list[Array]
    xs: list[Array]
    states: list[Array]
    ys: list[Array]


class Unknowns(NamedTuple):
    """U, and likewise its cotangents: the state entering the chain, then every run."""

    start: list[Array]
    runs: list[RunUnknowns]


@dataclass(frozen=True, eq=False)
class Linearised:
    """A run of equal steps at its stored states, and what of it is differentiated.

    program: the step; its carry leaves that are not floating-point are constants here.
    structure: of its Jacobians, and the coordinates of the differentiable states entering and leaving it.
    consts, xs: all of them, xs with leading axis L.
    states: the carry entering each step, leading axis L.
    active_consts, active_states, active_xs, active_ys: positions of the leaves that take part. A floating-point leaf of the carry
        that does not (a clock that nothing differentiates) keeps its place in the layout; its derivatives are zero and never taken.
    """

    program: Program
    structure: Structure
    consts: Sequence[Any]
    xs: Sequence[Any]
    states: Sequence[Any]
    active_consts: tuple[int, ...]
    active_states: tuple[int, ...]
    active_xs: tuple[int, ...]
    active_ys: tuple[int, ...]
    count: int  # L

    @property
    def _floats(self) -> tuple[int, ...]:
        return tuple(i for i, aval in enumerate(self.program.avals[1]) if is_inexact(aval))

    def step(self, data: Any, consts: list[Any], state: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        """One step as a function of the active leaves; `data` is that step's (states, xs), which fills in the others."""
        states, xs = data
        moving = [value for i, value in zip(self._floats, state, strict=True) if i in self.active_states]
        new, ys = self.program(_filled(self.consts, self.active_consts, consts), _filled(states, self.active_states, moving), _filled(xs, self.active_xs, x))
        return [leaf for leaf in new if is_inexact(leaf)], [ys[i] for i in self.active_ys]

    @property
    def data(self) -> tuple[list[Any], list[Any]]:
        """What tells one step from another, leading axis L."""
        return list(self.states), list(self.xs)

    def cut(self, states: Sequence[Any], xs: Sequence[Any], count: int) -> Linearised:
        """A part of the run, which has these `data`."""
        return replace(self, states=states, xs=xs, count=count)

    def at(self, data: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """The point of linearisation, of a single step or of stacked ones: active consts, float states, active xs."""
        states, xs = data
        return [self.consts[i] for i in self.active_consts], [states[i] for i in self._floats], [xs[i] for i in self.active_xs]

    # --- one step -----------------------------------------------------------------------------------------------------

    def push(self, data: Any, vector: Array) -> Array:
        """J v for one step, in the coordinates of the layout."""
        consts, state, x = self.at(data)
        _, out = jax.jvp(lambda s: self.step(data, consts, s, x)[0], (state,), (self.before.from_vector(vector),))
        return self.after.to_vector(out)

    def pull(self, data: Any, vector: Array) -> Array:
        """Jᵀ g for one step, in the coordinates of the layout."""
        consts, state, x = self.at(data)
        _, back = jax.vjp(lambda s: self.step(data, consts, s, x)[0], state)
        return self.before.to_vector(back(self.after.from_vector(vector))[0])

    @property
    def before(self) -> Layout:
        return self.structure.before

    @property
    def after(self) -> Layout:
        return self.structure.after

    def crossing(self, *, transposed: bool) -> tuple[Any, Callable[[Any, Array], Array]]:
        """(data with leading axis L, map of (one entry of data, vector) to the vector that leaves that step)."""
        entering = self.after if transposed else self.before
        return staged(self.pull if transposed else self.push, self.data, jax.ShapeDtypeStruct((entering.size,), entering.dtype))

    def forming(self, *, transposed: bool) -> tuple[Any, Callable[[Any], Any]]:
        """(data with leading axis L, map of stacked entries of data to their Jacobians, or the transposes)."""
        if self.structure.factored is not None:
            return self.data, partial(self._from_factors, transposed=transposed)
        data, linear = self.crossing(transposed=transposed)
        return data, self._by_pushing(linear, transposed)

    def chain(self, *, transposed: bool) -> Chain:
        """The steps as linear maps: their Jacobians, or the transposes."""

        def cheaper():
            """Rows or columns: a weight meets the basis before it meets anything of the step from one side only, and then once for all.

            From the other side only where nothing is masked: what a mask keeps out on the way there, 0 · inf, it lets in on the way back.
            """
            if self.structure.factored is not None:
                return self.forming(transposed=transposed)
            data, linear = self.crossing(transposed=transposed)
            ways = [(transposed, data, self._by_pushing(linear, transposed))]
            entering = self.after if transposed else self.before
            if masks_nothing(jax.make_jaxpr(jax.vmap(linear))(data, jax.ShapeDtypeStruct((self.count, entering.size), entering.dtype))):
                ways.append((not transposed, *self.forming(transposed=not transposed)))
            way, data, form = min(ways, key=lambda way: flops(jax.make_jaxpr(way[2])(way[1])))
            return data, form if way == transposed else lambda data: form(data).transpose()

        stepping = self.data, self.pull if transposed else self.push
        forms, rounding = self.structure.forms(transposed=transposed), self._rounding(self.before if transposed else self.after)
        return Chain(lambda: self.crossing(transposed=transposed), lambda: stepping, cheaper, forms, self.structure.same, rounding)

    def _rounding(self, leaving: Layout) -> Rounding:
        """Of vectors that leave the steps."""
        coarser = [dtype for dtype in leaving.dtypes if dtype != leaving.dtype]
        # Half precision has few numbers close to zero, bfloat16 as many as single precision.
        least = max((16 * float(jnp.finfo(dtype).smallest_subnormal) for dtype in coarser if jnp.finfo(dtype).minexp > -100), default=0.0)
        rounding = Rounding(self.roundoff, max(least, 64 * float(jnp.finfo(leaving.dtype).tiny)))
        return rounding._replace(stored=lambda vectors: leaving.to_vector(leaving.from_vector(vectors))) if coarser else rounding

    @property
    def roundoff(self) -> float:
        """Of the coarsest arithmetic between the states that enter and leave a step, or of these themselves."""
        stored = max((float(jnp.finfo(dtype).eps) for end in (self.before, self.after) for dtype in end.dtypes), default=0.0)
        carry = [self.program.num_consts + i for i in self._floats]
        return max(stored, roundoff(self.program.jaxpr, carry, range(self.program.num_new), jax.default_backend()))

    def _by_pushing(self, linear: Callable[[Any, Array], Array], transposed: bool) -> Callable[[Any], Any]:
        """Stacked entries of data -> Jacobians, by pushing seeds through the steps, or pulling them."""
        forms = self.structure.forms(transposed=transposed)
        seeds = forms.seeds(self.before.dtype)
        return lambda data: forms.jacobian(jax.vmap(jax.vmap(linear, (None, 0)), (0, None))(data, seeds))

    def _from_factors(self, data: Any, *, transposed: bool) -> Any:
        """Jacobians of stacked steps, or their transposes, without pushing a basis of the state."""
        factored, (states, _) = self.structure.factored, self.data
        assert factored is not None
        like = [jax.ShapeDtypeStruct(states[i].shape[1:], states[i].dtype) for i in self._floats]

        def one(data):
            states, xs = data
            return factored.formed([*self.consts, *states, *xs], like, transposed=transposed, dtype=self.before.dtype)

        return self.structure.forms(transposed=transposed).around(jax.vmap(one)(data))

    # --- all steps ----------------------------------------------------------------------------------------------------

    def all_steps(self, consts: list[Array], states: list[Array], xs: list[Array]) -> tuple[list[Array], list[Array]]:
        """Every step at once; shared constants stay shared, so that their cotangent is one contraction over all steps."""
        return jax.vmap(self.step, in_axes=(0, None, 0, 0))(self.data, consts, states, xs)

    def push_inputs(self, consts: list[Array], xs: list[Array]) -> list[Array]:
        """Tangents of all new states from those of constants and inputs alone."""
        at_consts, states, at_xs = self.at(self.data)
        return jax.jvp(lambda c, x: self.all_steps(c, states, x)[0], (at_consts, at_xs), (consts, xs))[1]

    def push_all(self, consts: list[Array], entering: list[Array], xs: list[Array]) -> tuple[list[Array], list[Array]]:
        """Tangents of all new states and outputs."""
        return jax.jvp(self.all_steps, self.at(self.data), (consts, entering, xs))[1]

    def pull_outputs(self, ys: list[Array]) -> list[Array]:
        """Cotangents of the states entering each step, from those of the outputs alone."""

        def one(data, ys):
            consts, state, x = self.at(data)
            return jax.vjp(lambda s: self.step(data, consts, s, x)[1], state)[1](ys)[0]

        return jax.vmap(one)(self.data, ys)

    def pull_inputs(self, leaving: list[Array], ys: list[Array]) -> tuple[list[Array], list[Array]]:
        """Cotangents of constants and inputs, from those of new states and outputs.

        With a `cond` in the step they are taken step by step, then summed. Batched steps turn it into a select of all branches, and transposing
        that multiplies what the branches not taken have stored, perhaps inf or NaN, by zero; transposed by themselves, they are selected away.
        """

        def one(data, cotangents):
            consts, state, x = self.at(data)
            return jax.vjp(lambda c, x: self.step(data, c, state, x), consts, x)[1](cotangents)

        def every(consts, states, xs, cotangents):
            return jax.vjp(lambda c, x: self.all_steps(c, states, x), consts, xs)[1](cotangents)

        if not self.program.has_branches:
            return contracted(every, *self.at(self.data), (leaving, ys))
        consts, xs = jax.vmap(one)(self.data, (leaving, ys))
        return jax.tree.map(lambda c: c.sum(0), consts), xs


def _filled(leaves: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    full = list(leaves)
    for place, value in zip(places, values, strict=True):
        full[place] = value
    return full


class System(NamedTuple):
    """A chain of runs.

    method: how to travel; sizes chosen. reverse: the recurrence runs from the last step to the first; only a single run does.
    """

    runs: Sequence[Linearised]
    method: Travelling
    reverse: bool = False

    @property
    def in_segments(self) -> bool:
        """Whether it is solved run by run, segment by segment; else all at once."""
        return self.method.cuts(run.count for run in self.runs)

    def only(self, run: Linearised) -> System:
        """Of one run, or a part of it."""
        return self._replace(runs=[run])

    def chains(self, *, transposed: bool) -> list[Chain]:
        """The runs as linear maps."""
        return [run.chain(transposed=transposed) for run in self.runs]

    def entering(self, u: Unknowns) -> Iterator[list[Array]]:
        """Of each run, the states entering every step, leading axis L."""
        start = u.start
        for run, some in zip(self.runs, u.runs, strict=True):
            entering, start = _handed_on(start, some.states, run.count, self.reverse)
            yield entering


def _handed_on(start: list[Array], leaving: list[Array], count: int, reverse: bool) -> tuple[list[Array], list[Array]]:
    """Of a run, what enters each step (leading axis L) and what leaves the last, from what enters the first and what leaves each."""
    if count == 1:  # a single layer may change the shapes
        return [s[None] for s in start], [v[0] for v in leaving]
    bounds = prefix.boundaries(start, leaving, reverse)
    return prefix.entering(bounds, reverse), prefix.first(bounds, not reverse)


def _matrix(at: System) -> Callable[[Unknowns], Unknowns]:
    """A. Unless told to compute it again, JAX would keep what linearises the steps from the forward pass on, for a transpose of A that nobody applies."""
    return jax.checkpoint(partial(_apply, at), prevent_cse=False)


def _apply(at: System, u: Unknowns) -> Unknowns:
    """A U."""
    runs = []
    for run, some, entering in zip(at.runs, u.runs, at.entering(u), strict=True):
        new, ys = run.push_all(some.consts, entering, some.xs)
        states = jax.tree.map(jnp.subtract, some.states, new)
        runs.append(some._replace(states=states, ys=jax.tree.map(jnp.subtract, some.ys, ys)))
    return _tied(Unknowns(u.start, runs), nothing(u) * nothing([(run.consts, run.xs, run.states) for run in at.runs]))


def nothing(tree: Any) -> Array:
    """A zero that depends on every differentiable leaf: the sum of no entries of each."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]
    return sum((jnp.real(leaf.ravel()[:0]).sum().astype(jnp.float32) for leaf in floats), jnp.float32(0))


def _tied(u: Unknowns, nothing: Array) -> Unknowns:
    """The same values, every leaf of which depends on `nothing`.

    JAX transposes a linear solve only if every leaf of its right-hand side is linear in what is transposed; a leaf of plain zeros
    is not. Empty sums make the dependence formal, cost nothing and multiply nothing by zero.
    """
    return jax.tree.map(lambda leaf: leaf + nothing.astype(leaf.dtype), u)


def solve(at: System, r: Unknowns) -> Unknowns:
    """A⁻¹ r: tangents, along the chain."""
    if not at.in_segments:
        return _solve_at_once(at, r)[0]
    like = [(some.states, some.ys) for some in r.runs]
    solved = judged(at.method, r.start, like, partial(_solve_in_segments, at, r))
    return Unknowns(r.start, [some._replace(states=states, ys=ys) for some, (states, ys) in zip(r.runs, solved, strict=True)])


def _piece(
    solve: Callable[..., tuple[Unknowns, Check | None]], end: Callable[[Unknowns], list[Array]], at: System, given: Unknowns, check: Check | None
) -> Any:
    """One segment of a journey that is judged at its end, or taken again, one map after another: then nothing is off. end: what leaves it."""
    if check is None:
        return solve(at, given, None)

    def slowly():
        solved, _ = solve(at._replace(method=Sequential()), given, None)
        return solved, check._replace(error=jax.tree.map(jnp.zeros_like, end(solved)))

    return guard.either(check.again, lambda: solve(at, given, check), slowly)


def _solve_in_segments(at: System, r: Unknowns, check: Check | None) -> tuple[list[tuple[list[Array], list[Array]]], Check | None]:
    """(states, ys) of every run."""
    start, found = r.start, []

    def end(solved):
        return prefix.last(solved.runs[0].states, at.reverse)

    for run, some in zip(at.runs, r.runs, strict=True):

        def cross(carry, steps, count, run=run, some=some):
            (entering, check), ((states, xs), *given) = carry, steps
            piece, given = at.only(run.cut(states, xs, count)), Unknowns(entering, [RunUnknowns(some.consts, *given)])
            solved, check = _piece(_solve_at_once, end, piece, given, check)
            return (end(solved), check), (solved.runs[0].states, solved.runs[0].ys)

        carry, given = (start, check), (run.data, *some[1:])
        (start, check), leaving = prefix.by_segments(cross, carry, given, run.count, at.method.segment, reverse=at.reverse)
        found.append(leaving)
    return found, check


def _solve_at_once(at: System, r: Unknowns, check: Check | None = None) -> tuple[Unknowns, Check | None]:
    offsets = []
    for run, some in zip(at.runs, r.runs, strict=True):
        given = bool(run.active_consts or run.active_xs)
        offsets.append(jax.tree.map(jnp.add, some.states, run.push_inputs(some.consts, some.xs)) if given else some.states)
    swept, check = _swept(at, r.start, offsets, check, transposed=False)
    solved = Unknowns(r.start, [some._replace(states=states) for some, states in zip(r.runs, swept, strict=True)])
    runs = []
    for run, some, entering in zip(at.runs, solved.runs, at.entering(solved), strict=True):
        made = run.push_all(some.consts, entering, some.xs)[1] if run.active_ys else []
        runs.append(some._replace(ys=jax.tree.map(jnp.add, some.ys, made) if made else some.ys))
    return Unknowns(r.start, runs), check


def solve_transposed(at: System, c: Unknowns) -> Unknowns:
    """A⁻ᵀ c: cotangents, against the chain, then one batched pull-back to constants and inputs."""
    if not at.in_segments:
        return _solve_transposed_at_once(at, c)[0]
    behind = [jnp.zeros_like(leaf[-1]) for leaf in c.runs[-1].states]  # what flows back into the state that leaves a segment
    like = [jnp.zeros_like(leaf) for leaf in c.start], [(some.consts, some.xs, some.states) for some in c.runs]
    start, solved = judged(at.method, behind, like, partial(_solve_transposed_in_segments, at, c, behind))
    runs = [RunUnknowns(consts, xs, leaving, some.ys) for some, (consts, xs, leaving) in zip(c.runs, solved, strict=True)]
    return Unknowns(jax.tree.map(jnp.add, c.start, start), runs)


def _solve_transposed_in_segments(at: System, c: Unknowns, behind: list[Array], check: Check | None) -> tuple[tuple[list[Array], list[Any]], Check | None]:
    """What flows back into the chain's start, and (consts, xs, states) of every run."""
    found = []
    for run, some in reversed(list(zip(at.runs, c.runs, strict=True))):

        def cross(carry, steps, count, run=run):
            (behind, total, check), ((states, xs), leaving, ys) = carry, steps
            leaving = [leaf.at[0 if at.reverse else -1].add(back) for leaf, back in zip(leaving, behind, strict=True)]
            piece = at.only(run.cut(states, xs, count))
            nothing = zeros(piece, jnp.float32(0))
            given = nothing._replace(runs=[nothing.runs[0]._replace(consts=total, states=leaving, ys=ys)])
            solved, check = _piece(_solve_transposed_at_once, lambda solved: solved.start, piece, given, check)
            return (solved.start, solved.runs[0].consts, check), (solved.runs[0].xs, solved.runs[0].states)

        carry, given = (behind, some.consts, check), (run.data, some.states, some.ys)
        (behind, consts, check), (xs, leaving) = prefix.by_segments(cross, carry, given, run.count, at.method.segment, reverse=not at.reverse)
        found.append((consts, jax.tree.map(jnp.add, some.xs, xs), leaving))
    return (behind, found[::-1]), check


def _solve_transposed_at_once(at: System, c: Unknowns, check: Check | None = None) -> tuple[Unknowns, Check | None]:
    offsets, end = [], c.start
    for run, some, entering in zip(at.runs, c.runs, at.entering(c), strict=True):
        offsets.append(jax.tree.map(jnp.add, entering, run.pull_outputs(some.ys)) if run.active_ys else entering)
        end = prefix.last(some.states, at.reverse) if run.count else end
    (swept, check), runs = _swept(at, end, offsets, check, transposed=True), []
    for run, some, values in reversed(list(zip(at.runs, c.runs, swept, strict=True))):
        leaving, end = _handed_on(end, values, run.count, not at.reverse)
        consts, xs = some.consts, some.xs
        if run.active_consts or run.active_xs:
            to_consts, to_xs = run.pull_inputs(leaving, some.ys)
            consts, xs = jax.tree.map(jnp.add, consts, to_consts), jax.tree.map(jnp.add, xs, to_xs)
        runs.append(RunUnknowns(consts, xs, leaving, some.ys))
    return Unknowns(end, runs[::-1]), check


def _swept(at: System, start: list[Array], offsets: list[list[Array]], check: Check | None, *, transposed: bool) -> tuple[list[list[Array]], Check | None]:
    """What leaves each map of the journey, in the coordinates of the layouts and back.

    check: of a journey of one run that this one goes on with, where nothing is mended before all is judged.
    """
    ends = [(run.after, run.before) if transposed else (run.before, run.after) for run in at.runs]
    first = ends[-1 if transposed else 0][0]
    vectors = [_vectors(after, some, run.count) for (_, after), some, run in zip(ends, offsets, at.runs, strict=True)]
    entering, chains, reverse = _vectors(first, start, None), at.chains(transposed=transposed), at.reverse != transposed
    if check is None:
        values = sweep(chains, entering, vectors, at.method, reverse=reverse)
    else:
        [chain], [vector], after = chains, vectors, ends[0][1]
        error = _vectors(first, check.error, None)
        value, check = sweep_on(chain, entering, vector, at.method, check._replace(error=error), reverse=reverse)
        values, check = [value], check._replace(error=after.from_vector(check.error))
    return [after.from_vector(some) for (_, after), some in zip(ends, values, strict=True)], check


def _vectors(layout: Layout, leaves: list[Array], count: int | None) -> Array:
    return layout.to_vector(leaves) if layout.size else jnp.zeros((0,) if count is None else (count, 0), layout.dtype)


def tangents(at: System, r: Unknowns) -> Unknowns:
    """Solves A U = r: forward mode, differentiable to any order, transposed by JAX into `cotangents`."""
    return _solved(_matrix(at), r, partial(solve, at), partial(solve_transposed, at))


def cotangents(at: System, c: Unknowns) -> Unknowns:
    """Solves Aᵀ W = c: reverse mode, differentiable to any order."""
    transposed = jax.linear_transpose(_matrix(at), c)
    return _solved(lambda w: transposed(w)[0], c, partial(solve_transposed, at), partial(solve, at))


def _solved(apply: Callable, given: Unknowns, forth: Callable, back: Callable) -> Unknowns:
    """Both the right-hand side and the solution are tied: transposed, the one becomes the other, of which parts may be unused, that is zero."""
    found = lax.custom_linear_solve(apply, _tied(given, nothing(given)), lambda _, r: forth(r), transpose_solve=lambda _, c: back(c))
    return _tied(found, nothing(found))


def zeros(at: System, like: Array) -> Unknowns:
    """A right-hand side of zeros, made of the scalar `like`: what does not depend on tangents would be kept for the backward pass, at full size."""

    def zero(shape: tuple[int, ...], dtype: Any) -> Array:  # `zeros_like` would keep a weak type
        return jnp.broadcast_to(like.astype(dtype), shape)

    runs = []
    for run in at.runs:
        ys, new = run.program.out_avals[1], [a for a in run.program.out_avals[0] if is_inexact(a)]
        runs.append(
            RunUnknowns(
                [zero(run.consts[i].shape, run.consts[i].dtype) for i in run.active_consts],
                [zero(run.xs[i].shape, run.xs[i].dtype) for i in run.active_xs],
                [zero((run.count, *a.shape), a.dtype) for a in new],
                [zero((run.count, *ys[i].shape), ys[i].dtype) for i in run.active_ys],
            )
        )
    first = at.runs[0].before
    return Unknowns([zero(shape, dtype) for shape, dtype in zip(first.shapes, first.dtypes, strict=True)], runs)
