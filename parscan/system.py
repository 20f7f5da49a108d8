"""The derivative of a whole recurrence as one linear system, solved in parallel in both directions.

Linearised at its stored states, a recurrence h_i, y_i = f(θ, h_{i-1}, x_i) maps tangents (θ', x', h_0') to

    h_i' = J_i h_{i-1}' + B_i (θ', x_i'),      y_i' = C_i h_{i-1}' + D_i (θ', x_i').

With U = (θ', x', h', y') stacked this reads A U = r, A unit lower triangular and *local*: a step touches its
neighbour only. `lax.custom_linear_solve` is told A, how to solve with it (tangents: `sweep` along the chain) and how to solve with its
transpose (cotangents: `sweep` against it, then one batched pull-back to θ and x). JAX then knows everything else: jvp, transpose,
batching, and every higher derivative, since the derivative of a solve is a solve with the same A. Nothing of the sweeps is
ever differentiated, no Jacobian is kept from the forward pass, and each direction scales its matrices on its own side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from parscan import prefix
from parscan.checks import is_inexact
from parscan.jacobians import basis, kind_of
from parscan.jaxprs import Program, contracted, flops, staged
from parscan.methods import Method
from parscan.structure import Layout
from parscan.sweep import Chain, sweep


class Unknowns(NamedTuple):
    """U, and likewise its cotangents, for the active leaves: constants, inputs (leading axis L), states (L + 1), outputs (L).

    States are leaves, not vectors: A touches no coordinate that the step itself does not, so structure stays visible through it.
    """

    consts: list[Array]
    xs: list[Array]
    states: list[Array]
    ys: list[Array]


class Linearised(NamedTuple):
    """A recurrence at its stored states, and what of it is differentiated.

    program: the step; its carry leaves that are not floating-point are constants here.
    layout: coordinates of the differentiable carry.
    method: how to travel; sizes chosen.
    reverse: the recurrence runs from the last step to the first.
    consts, xs: all of them, xs with leading axis L.
    states: the carry entering each step, leading axis L.
    active_consts, active_states, active_xs, active_ys: positions of the leaves that take part. A floating-point leaf of the carry
        that does not (a clock that nothing differentiates) keeps its place in the layout; its derivatives are zero and never taken.
    """

    program: Program
    layout: Layout
    method: Method
    reverse: bool
    consts: Sequence[Any]
    xs: Sequence[Any]
    states: Sequence[Any]
    active_consts: tuple[int, ...]
    active_states: tuple[int, ...]
    active_xs: tuple[int, ...]
    active_ys: tuple[int, ...]

    @property
    def _floats(self) -> tuple[int, ...]:
        return tuple(i for i, aval in enumerate(self.program.avals[1]) if is_inexact(aval))

    def step(self, data: Any, consts: list[Any], state: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        """One step as a function of the active leaves; `data` is that step's (states, xs), which fills in the others."""
        states, xs = data
        moving = [value for i, value in zip(self._floats, state, strict=True) if i in self.active_states]
        new, ys = self.program(_filled(self.consts, self.active_consts, consts), _filled(states, self.active_states, moving), _filled(xs, self.active_xs, x))
        return [new[i] for i in self._floats], [ys[i] for i in self.active_ys]

    @property
    def data(self) -> tuple[list[Any], list[Any]]:
        """What tells one step from another, leading axis L."""
        return list(self.states), list(self.xs)

    def at(self, data: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """The point of linearisation, of a single step or of stacked ones: active consts, float states, active xs."""
        states, xs = data
        return [self.consts[i] for i in self.active_consts], [states[i] for i in self._floats], [xs[i] for i in self.active_xs]

    # --- one step -----------------------------------------------------------------------------------------------------

    def push(self, data: Any, vector: Array) -> Array:
        """J v for one step, in the coordinates of the layout."""
        consts, state, x = self.at(data)
        _, out = jax.jvp(lambda s: self.step(data, consts, s, x)[0], (state,), (self.layout.from_vector(vector),))
        return self.layout.to_vector(out)

    def pull(self, data: Any, vector: Array) -> Array:
        """Jᵀ g for one step, in the coordinates of the layout."""
        consts, state, x = self.at(data)
        _, back = jax.vjp(lambda s: self.step(data, consts, s, x)[0], state)
        return self.layout.to_vector(back(self.layout.from_vector(vector))[0])

    def chain(self, *, transposed: bool) -> Chain:
        """The steps as linear maps: their Jacobians, or the transposes."""
        layout = self.layout
        kind, columns = kind_of(layout.blocks, layout.width), basis(layout.blocks, layout.width, layout.dtype)
        vector = jax.ShapeDtypeStruct((layout.size,), layout.dtype)

        def crossing(transposed):
            return staged(self.pull if transposed else self.push, self.data, vector)

        def forming(transposed):
            data, linear = crossing(transposed)
            return data, lambda data: kind.from_columns(jax.vmap(jax.vmap(linear, (None, 0)), (0, None))(data, columns))

        def cheaper():
            """Rows or columns: a weight meets the basis before it meets anything of the step from one side only, and then once for all."""
            ways = [(way, *forming(way)) for way in (transposed, not transposed)]
            way, data, form = min(ways, key=lambda way: flops(jax.make_jaxpr(way[2])(way[1])))
            return data, form if way == transposed else lambda data: form(data).transpose()

        return Chain(lambda: crossing(transposed), cheaper, layout.blocks, layout.width)

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


# --- the system --------------------------------------------------------------------------------------------------------


def _apply(at: Linearised, u: Unknowns) -> Unknowns:
    """A U."""
    entering, leaving = prefix.entering(u.states, at.reverse), prefix.leaving(u.states, at.reverse)
    new, ys = at.push_all(u.consts, entering, u.xs)
    states = prefix.boundaries(prefix.first(u.states, at.reverse), jax.tree.map(jnp.subtract, leaving, new), at.reverse)
    out = Unknowns(u.consts, u.xs, states, [a - b for a, b in zip(u.ys, ys, strict=True)])
    return _tied(out, nothing(u) * nothing([at.consts, at.xs, at.states]))


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


def solve(at: Linearised, r: Unknowns) -> Unknowns:
    """A⁻¹ r: tangents, along the chain."""
    offsets = prefix.leaving(r.states, at.reverse)
    if at.active_consts or at.active_xs:
        offsets = jax.tree.map(jnp.add, offsets, at.push_inputs(r.consts, r.xs))
    states = _swept(at, prefix.first(r.states, at.reverse), offsets, transposed=False)
    ys = r.ys
    if at.active_ys:
        made = at.push_all(r.consts, prefix.entering(states, at.reverse), r.xs)[1]
        ys = jax.tree.map(jnp.add, ys, made)
    return Unknowns(r.consts, r.xs, states, ys)


def solve_transposed(at: Linearised, c: Unknowns) -> Unknowns:
    """A⁻ᵀ c: cotangents, against the chain, then one batched pull-back to constants and inputs."""
    offsets = prefix.entering(c.states, at.reverse)
    if at.active_ys:
        offsets = jax.tree.map(jnp.add, offsets, at.pull_outputs(c.ys))
    states = _swept(at, prefix.first(c.states, not at.reverse), offsets, transposed=True)
    consts, xs = c.consts, c.xs
    if at.active_consts or at.active_xs:
        to_consts, to_xs = at.pull_inputs(prefix.leaving(states, at.reverse), c.ys)
        consts, xs = jax.tree.map(jnp.add, consts, to_consts), jax.tree.map(jnp.add, xs, to_xs)
    return Unknowns(consts, xs, states, c.ys)


def _swept(at: Linearised, start: list[Array], offsets: list[Array], *, transposed: bool) -> list[Array]:
    """The journey's L + 1 boundary values, in the coordinates of the layout and back."""
    back, layout = at.reverse != transposed, at.layout
    if layout.size == 0:
        return prefix.boundaries(start, offsets, back)
    values = sweep(at.chain(transposed=transposed), layout.to_vector(start), layout.to_vector(offsets), at.method, reverse=back)
    return prefix.boundaries(start, layout.from_vector(values), back)


def tangents(at: Linearised, r: Unknowns) -> Unknowns:
    """Solves A U = r: forward mode, differentiable to any order, transposed by JAX into `cotangents`."""
    return lax.custom_linear_solve(partial(_apply, at), _tied(r, nothing(r)), lambda _, r: solve(at, r), transpose_solve=lambda _, c: solve_transposed(at, c))


def cotangents(at: Linearised, c: Unknowns) -> Unknowns:
    """Solves Aᵀ W = c: reverse mode, differentiable to any order."""
    transposed = jax.linear_transpose(partial(_apply, at), c)
    return lax.custom_linear_solve(
        lambda w: transposed(w)[0], _tied(c, nothing(c)), lambda _, c: solve_transposed(at, c), transpose_solve=lambda _, r: solve(at, r)
    )


def zeros(at: Linearised, count: int) -> Unknowns:
    """A right-hand side of zeros for a chain of `count` steps."""
    consts = [jnp.zeros_like(at.consts[i]) for i in at.active_consts]
    xs = [jnp.zeros_like(at.xs[i]) for i in at.active_xs]
    avals = at.program.out_avals[1]
    ys = [jnp.zeros((count, *avals[i].shape), avals[i].dtype) for i in at.active_ys]
    states = [jnp.zeros((count + 1, *shape), dtype) for shape, dtype in zip(at.layout.shapes, at.layout.dtypes, strict=True)]
    return Unknowns(consts, xs, states, ys)
