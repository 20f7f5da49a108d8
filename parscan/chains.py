"""`forward` and `chain`: layers one after another, differentiated in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
from jax import lax

from parscan import checks
from parscan.claims import Claim, parse_structure
from parscan.costs import Step
from parscan.debug import Watch
from parscan.jaxprs import Program, jit_unless_staged
from parscan.methods import Lax, Method, Travelling, parse_method
from parscan.network import Network, check_layers, is_sequence, read_sequence, read_stacked
from parscan.planning import plan_chain
from parscan.recurrence import run_recurrence, run_recurrence_stored, run_steps, shifted

State = TypeVar("State")
Layers = Callable[[Any, Any], Any] | Sequence[Callable[[Any, Any], Any]]


@overload
def forward(
    layer: Callable[[Any, State], State],
    params: Any,
    x: State,
    *,
    params_axes: Any = 0,
    length: int | None = None,
    method: Method | str = "auto",
    structure: Any = "auto",
    debug: bool = False,
) -> tuple[State, State]: ...


@overload
def forward(
    layer: Sequence[Callable[[Any, Any], Any]],
    params: Any,
    x: Any,
    *,
    params_axes: Any = 0,
    length: int | None = None,
    method: Method | str = "auto",
    structure: Any = "auto",
    debug: bool = False,
) -> tuple[Any, list[Any]]: ...


def forward(
    layer: Layers,
    params: Any,
    x: Any,
    *,
    params_axes: Any = 0,
    length: int | None = None,
    method: Method | str = "auto",
    structure: Any = "auto",
    debug: bool = False,
) -> tuple[Any, Any]:
    """Runs a chain of layers and keeps every activation; differentiable, with the same parallel rule.

    Args:
        layer: (params_i, h) -> h, one for all layers: the state keeps its structure, shapes and dtypes. Or a sequence of L such callables,
            each of which may return another state than it is given.
        params: for one layer, a pytree of arrays, any dtypes, whose leaves are stacked on a leading axis L or shared. For a sequence, a sequence of
            L pytrees, None for a layer without parameters.
        x: h_0, pytree of arrays, any shapes and dtypes; a complex one leaves the chain to the sequential pass.
        params_axes: prefix of `params`: 0 for stacked, None for shared by all layers. Not for a sequence.
        length: L, needed if all parameters are shared. Not for a sequence.
        method, structure, debug: as for `scan`.

    Returns:
        h_L, a pytree, and the activations h_0 … h_L in the same dtypes, each leaf (L + 1, …), or for a sequence of layers as a list.

    Raises:
        ValueError: parameters that are not stacked alike, or not as many as layers; unknown method or structure.
        TypeError: a layer that is not callable, or changes the state's type where all layers are one.

    Example:
        >>> y, activations = parscan.forward(lambda w, h: jnp.tanh(w * h), jnp.ones((10, 3)), jnp.ones(3))
        >>> activations.shape
        (11, 3)
        >>> dense = lambda w, h: jnp.tanh(h @ w)
        >>> y, activations = parscan.forward([dense, dense], [jnp.ones((3, 5)), jnp.ones((5, 2))], jnp.ones(3))
        >>> [h.shape for h in activations]
        [(3,), (5,), (2,)]
    """
    parsed, claim = parse_method(method), parse_structure(structure)
    network = read(layer, params, x, params_axes, length)
    final, leaving = _run(network, parsed, claim, Watch("layer", claim) if debug else None, stored=True)
    start = [jnp.asarray(leaf) for leaf in network.start]
    return jax.tree.unflatten(network.trees()[-1], final), network.as_activations(start, leaving)


@overload
def chain(
    layer: Callable[[Any, State], State],
    *,
    params_axes: Any = 0,
    length: int | None = None,
    return_activations: Literal[False] = False,
    method: Method | str = "auto",
    structure: Any = "auto",
    debug: bool = False,
) -> Callable[[Any, State], State]: ...


@overload
def chain(
    layer: Callable[[Any, State], State],
    *,
    params_axes: Any = 0,
    length: int | None = None,
    return_activations: Literal[True],
    method: Method | str = "auto",
    structure: Any = "auto",
    debug: bool = False,
) -> Callable[[Any, State], tuple[State, State]]: ...


@overload
def chain(
    layer: Layers,
    *,
    params_axes: Any = 0,
    length: int | None = None,
    return_activations: bool = False,
    method: Method | str = "auto",
    structure: Any = "auto",
    debug: bool = False,
) -> Callable[[Any, Any], Any]: ...


def chain(
    layer: Layers,
    *,
    params_axes: Any = 0,
    length: int | None = None,
    return_activations: bool = False,
    method: Method | str = "auto",
    structure: Any = "auto",
    debug: bool = False,
) -> Callable[[Any, Any], Any]:
    """A chain of layers as one differentiable function `apply(params, x)`.

    Args:
        layer: (params_i, h) -> h, one for all layers, or a sequence of them; as for `forward`.
        params_axes, length, method, structure, debug: as for `forward`.
        return_activations: give `(h_L, h_0 … h_L)` instead of h_L.

    Returns:
        (params, x) -> h_L, where x is h_0; with `return_activations` (params, x) -> (h_L, h_0 … h_L). Pytrees in shapes and dtypes as for `forward`.

    Raises:
        ValueError: unknown method or structure.
        TypeError: a layer that is not callable. Both at once; the rest when applied, as `forward` does.

    Example:
        >>> apply = parscan.chain(lambda w, h: h + jnp.tanh(h @ w))
        >>> jax.grad(lambda w: apply(w, jnp.ones((4, 3))).sum())(jnp.ones((50, 3, 3))).shape
        (50, 3, 3)
        >>> apply = parscan.chain([lambda w, h: h @ w, lambda _, h: h.sum()])
        >>> jax.grad(lambda w: apply([w, None], jnp.ones(4)))(jnp.ones((4, 3))).shape
        (4, 3)
    """
    parsed, claim = parse_method(method), parse_structure(structure)
    check_layers(layer)

    def apply(params: Any, x: Any) -> Any:
        if return_activations:
            return forward(layer, params, x, params_axes=params_axes, length=length, method=method, structure=structure, debug=debug)
        network = read(layer, params, x, params_axes, length)
        final, _ = _run(network, parsed, claim, Watch("layer", claim) if debug else None, stored=False)
        return jax.tree.unflatten(network.trees()[-1], final)

    return apply


def read(layer: Layers, params: Any, x: Any, params_axes: Any, length: int | None) -> Network:
    """The chain that starts from x."""
    if not is_sequence(layer):
        return read_stacked(layer, params, x, params_axes, length)
    if params_axes != 0 or length is not None:
        raise ValueError("`params_axes` and `length` are for one layer repeated; a sequence of layers has its own parameters for each.")
    return read_sequence(layer, params, [x])


def _run(network: Network, method: Method | None, claim: Claim | None, watch: Watch | None, *, stored: bool) -> tuple[list, list[list]]:
    """h_L; and with `stored` what leaves every layer of each run (leading axis)."""
    h = [jnp.asarray(leaf) for leaf in network.start]
    leaving: list[list] = []
    _, stretches = plan_chain(network.steps, method, claim, fallback=Lax())
    for stretch in stretches:
        links = network.links[stretch.lo : stretch.hi]
        consts, xs = [link.consts for link in links], [link.xs for link in links]
        spec = None
        if stretch.structures is not None and isinstance(stretch.plan.method, Travelling):
            spec = network.recurrence(stretch, stretch.structures, stretch.plan.method, watch)
        if spec is not None and stored:
            h, _, entering = run_recurrence_stored(spec, consts, h, xs)
        elif spec is not None:
            h, _ = run_recurrence(spec, consts, h, xs)
            continue
        else:
            entering = []
            for link in links:
                h, before = _by_jax(link.step, link.consts, h, link.xs, stored)
                entering.append(before)
        leaving += _leaving(entering, h) if stored else []
    return h, leaving


@dataclass(frozen=True)
class _Loop:
    """Equal layers that are left to JAX. stored: keep what enters each."""

    program: Program
    count: int
    stored: bool

    @property
    def is_portable(self) -> bool:
        return self.program.is_portable

    def run(self, consts: list, h: list, xs: list) -> tuple[list, list]:
        if self.stored:
            h, _, entering = run_steps(self.program, consts, h, xs, self.count, repeats=True)
            return h, entering
        return lax.scan(lambda h, x: self.program(consts, h, x), h, xs, self.count)[0], []


_looped = jit_unless_staged(_Loop.run)


def _by_jax(step: Step, consts: list, h: list, xs: list, stored: bool) -> tuple[list, list]:
    if step.repeats:
        return _looped(_Loop(step.program, step.count, stored), consts, h, xs)
    h, _, entering = run_steps(step.program, consts, h, xs, step.count, repeats=False)
    return h, entering


def _leaving(entering: list[list], final: list) -> list[list]:
    """What leaves each layer of each run, from what enters it: the next one's entrance."""
    ends = [*([leaf[0] if leaf.shape[0] else None for leaf in states] for states in entering[1:]), final]
    return [_moved_on(states, end) for states, end in zip(entering, ends, strict=True)]


def _moved_on(states: list, end: list) -> list:
    count = checks.shape_of(states[0])[0] if states else None
    if count == 1 or count is None:
        return [leaf[None] for leaf in end]
    return [shifted(last, leaf, reverse=True) for leaf, last in zip(states, end, strict=True)]
