"""`parallel_backward`: the engine called directly, on activations that the forward pass has stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from parscan import checks, prefix, system
from parscan.jaxprs import Flat, Program, is_batchable, jit_unless_staged, slice_spec, trace
from parscan.methods import Lax, Method, Sequential, parse_method
from parscan.planning import Plan, plan_for
from parscan.stacking import Stacked, check_layer, check_state, split_params
from parscan.structure import Layout, layout_of, parse_structure


@partial(jax.tree_util.register_dataclass, data_fields=["params", "activations"], meta_fields=["plan"])
@dataclass(frozen=True)
class Gradients:
    """What `parallel_backward` returns: a pytree.

    Attributes:
        params: like the parameters: ∂/∂θ_i stacked on the leading axis L, summed over all layers for shared leaves.
        activations: like the activations: the accumulated gradient at h_0 … h_L, leading axis L + 1.
        plan: what was chosen, and why; not part of the pytree.

    Integer, boolean and key leaves are `float0`, as in JAX.
    """

    params: Any
    activations: Any
    plan: Plan

    @property
    def input(self) -> Any:
        """∂/∂x: the accumulated gradient at h_0."""
        return jax.tree.map(lambda g: checks.float0_zeros(g.shape[1:]) if g.dtype == jax.dtypes.float0 else g[0], self.activations)


def parallel_backward(
    layer: Callable[[Any, Any], Any],
    params: Any,
    activations: Any,
    cotangent: Any,
    *,
    layer_cotangents: Any = None,
    params_axes: Any = 0,
    method: Method | str = "auto",
    structure: Any = "auto",
) -> Gradients:
    """The gradient of every layer of a chain h_i = layer(θ_i, h_{i-1}), from stored activations, in logarithmic depth.

        g_L = c_L,   g_{i-1} = J_iᵀ g_i + c_{i-1},   ∂/∂θ_i = (∂ layer / ∂θ_i)ᵀ g_i

    Args:
        layer: (params_i, h) -> h.
        params: pytree, leaves stacked on a leading axis L or shared.
        activations: the state's pytree, each leaf (L + 1, …): h_0 … h_L, as `forward` returns them.
        cotangent: like h_L: the loss's derivative there. None for zero. Leaves that are not floating-point are ignored.
        layer_cotangents: like `activations`, (L + 1, …): derivatives of losses read at inner layers; `cotangent` is added to the last.
        params_axes: prefix of `params`: 0 for stacked, None for shared by all layers.
        method: `"auto"`, `Lax`, `Sequential`, `Walk`, `Associative`, `Tree`, `Chunked`, as values or lower-case names.
        structure: `"auto"`, or a claim taken at its word: `"dense"`, `"diagonal"`, `Blocks(...)`.

    Returns:
        `Gradients` with `params`, `activations`, `input` and `plan`. A layer that cannot be differentiated in parallel (a custom VJP, a
        collective, an effect) is differentiated sequentially; `plan.reason` says why.

    Raises:
        ValueError: parameters not stacked alike, activations of the wrong count, cotangents that do not match, unknown method or
            structure, an explicit parallel method for a layer that has none. TypeError: a layer that changes the state's
            type, complex activations.

    Source: S. Wang, Y. Bai, G. Pekhimenko, BPPSA: Scaling back-propagation by parallel scan algorithm (MLSys 2020).

    Example:
        >>> layer = lambda w, h: jnp.tanh(h @ w)
        >>> w = jnp.ones((50, 3, 3)) / 3
        >>> y, activations = parscan.forward(layer, w, jnp.ones(3))
        >>> parscan.parallel_backward(layer, w, activations, jnp.ones(3)).params.shape
        (50, 3, 3)
    """
    parsed, claim = parse_method(method), parse_structure(structure)
    check_layer(layer)
    count = _check_activations(activations)
    stacked = split_params(params, params_axes, count, source="the leading axis of `activations`, one more than the number of layers,")
    states, tree = jax.tree.flatten(activations)
    cotangents = _cotangents(cotangent, layer_cotangents, activations)

    program, consts, _ = trace(
        lambda shared, h, p: check_state(h, layer(stacked.join(p, shared), h)),
        Flat.of(stacked.shared),
        Flat([slice_spec(leaf) for leaf in states], tree),
        Flat.of([slice_spec(leaf) for leaf in stacked.leaves]),
    )
    plan, layout = plan_for(program, count, parsed, claim, fallback=Sequential())
    by_jax = isinstance(plan.method, Lax) or (layout is None and not is_batchable(program))
    spec = Backward(program, None if by_jax else layout or layout_of(program, "dense"), plan.method, len(consts) - len(stacked.shared), layout is not None)
    to_shared, to_stacked, to_states = _compiled(spec, consts, stacked.leaves, states, cotangents)

    return Gradients(_as_params(stacked, to_stacked, to_shared), jax.tree.unflatten(tree, _scattered(states, to_states)), plan)


@dataclass(frozen=True)
class Backward:
    """All that is static about a backward pass. `layout` is None if JAX takes every step's whole VJP in one loop."""

    program: Program
    layout: Layout | None
    method: Method
    closed_over: int
    differentiable: bool


def _run(spec: Backward, consts: list, xs: list, states: list, cotangents: list) -> tuple[list, list, list]:
    """Gradients of the floating-point leaves: shared parameters, stacked parameters, activations."""
    program, entering = spec.program, [h[:-1] for h in states]
    shared = tuple(i for i in range(spec.closed_over, len(consts)) if checks.is_inexact(consts[i]))
    floats = tuple(i for i, h in enumerate(states) if checks.is_inexact(h))
    inputs = tuple(i for i, x in enumerate(xs) if checks.is_inexact(x))
    if spec.layout is None:
        return _by_jax(program, consts, xs, entering, cotangents, shared, floats, inputs)
    at = system.Linearised(program, spec.layout, spec.method, False, consts, xs, entering, shared, floats, inputs, ())
    right = system.zeros(at, entering[0].shape[0])._replace(states=cotangents)
    found = system.cotangents(at, right) if spec.differentiable else system.solve_transposed(at, right)
    return found.consts, found.xs, found.states


_compiled = jit_unless_staged(_run)


def _by_jax(program: Program, consts: list, xs: list, entering: list, cotangents: list, shared: tuple, floats: tuple, inputs: tuple) -> tuple[list, list, list]:
    """JAX's own order: one loop, each step's whole VJP in it."""
    at = system.Linearised(program, layout_of(program, "dense"), Sequential(), False, consts, xs, entering, shared, floats, inputs, ())

    def step(carry, one):
        after, total = carry
        data, injected = one
        to_consts, before, to_xs = jax.vjp(lambda *primal: at.step(data, *primal)[0], *at.at(data))[1](after)
        before = jax.tree.map(jnp.add, before, injected)
        return (before, jax.tree.map(jnp.add, total, to_consts)), (before, to_xs)

    last = [c[-1] for c in cotangents]
    zero = [jnp.zeros_like(consts[i]) for i in shared]
    (_, to_consts), (values, to_xs) = lax.scan(step, (last, zero), (at.data, [c[:-1] for c in cotangents]), reverse=True)
    return to_consts, to_xs, [prefix.boundaries(c, v, reverse=True) for c, v in zip(last, values, strict=True)]


# --- checks and containers ------------------------------------------------------------------------------------------------


def _check_activations(activations: Any) -> int:
    """The number of layers L."""
    named = checks.named_leaves("activations", activations)
    listed = ", ".join(f"{name}: {checks.describe(leaf)}" for name, leaf in named)
    fix = "parscan.forward(layer, params, x) returns them as needed"
    if not named or not all(checks.shape_of(leaf) for _, leaf in named) or len({checks.shape_of(leaf)[0] for _, leaf in named}) != 1:
        raise ValueError(
            f"`activations` must be h_0 … h_L stacked on a leading axis of length L + 1, the same in every leaf; got {listed or 'no array'}. {fix}."
        )
    if any(checks.is_complex(leaf) for _, leaf in named):
        raise TypeError(f"`activations` must be real; got {listed}. Split complex states into real and imaginary parts.")
    if checks.shape_of(named[0][1])[0] == 0:
        raise ValueError(f"`activations` must hold h_0 at least; got {listed}. {fix}.")
    return checks.shape_of(named[0][1])[0] - 1


def _cotangents(cotangent: Any, layer_cotangents: Any, activations: Any) -> list[Array]:
    """c_0 … c_L for the floating-point leaves, leading axis L + 1."""
    if cotangent is None and layer_cotangents is None:
        raise ValueError(
            "`cotangent` and `layer_cotangents` are both None: there is nothing to pull back. Give the loss's derivative at h_L, or at every layer."
        )
    states = jax.tree.leaves(activations)
    every = _matching("layer_cotangents", layer_cotangents, activations, lambda h: checks.shape_of(h))
    last = _matching("cotangent", cotangent, activations, lambda h: checks.shape_of(h)[1:])
    out = []
    for h, c, end in zip(states, every, last, strict=True):
        if checks.is_inexact(h):
            total = jnp.zeros_like(h) if c is None else jnp.asarray(c)
            out.append(total if end is None else total.at[-1].add(end))
    return out


def _matching(name: str, given: Any, activations: Any, shape: Callable[[Any], tuple[int, ...]]) -> list[Any]:
    """Leaves of a cotangent, checked against the activations; None for each if there is none."""
    states = jax.tree.leaves(activations)
    if given is None:
        return [None] * len(states)
    what = "`activations`" if name == "layer_cotangents" else "the last activation h_L"
    difference = checks.structure_difference(f"`{name}`", given, activations)
    if difference is not None:
        raise ValueError(f"`{name}` must match {what}: {difference}.")
    pairs = list(zip(checks.named_leaves(name, given), states, strict=True))
    wrong = [
        f"{leaf_name} is {checks.describe(c)}, where {checks.dtype_of(h)}[{','.join(map(str, shape(h)))}] is needed"
        for (leaf_name, c), h in pairs
        if checks.is_inexact(h) and (checks.shape_of(c) != shape(h) or (checks.dtype_of(c) != checks.dtype_of(h) and not jax.typeof(c).weak_type))
    ]
    if wrong:
        raise ValueError(f"`{name}` must match {what}: {'; '.join(wrong)}.")
    return [c for (_, c), _ in pairs]


def _scattered(like: list, floats: list) -> list:
    """Gradients for all leaves, `float0` for those that have none."""
    rest = iter(floats)
    return [next(rest) if checks.is_inexact(leaf) else checks.float0_zeros(checks.shape_of(leaf)) for leaf in like]


def _as_params(stacked: Stacked, to_stacked: list, to_shared: list) -> Any:
    return stacked.join(_scattered(stacked.leaves, to_stacked), _scattered(stacked.shared, to_shared))
