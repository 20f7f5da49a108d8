"""A chain of layers read into runs: neighbours that compute the same on states of the same shapes become one stack.

A chain comes in two forms. *Stacked*: one layer, parameters with a leading axis, one run. A *sequence*: any layers, each with its own
parameters; equal neighbours are found here, so that 500 equal blocks are one loop, not 500 pieces of program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from parscan import checks
from parscan.costs import Step
from parscan.debug import Watch, names_of
from parscan.jaxprs import Flat, Program, slice_spec, trace
from parscan.methods import Travelling
from parscan.planning import Stretch
from parscan.recurrence import Recurrence, Run
from parscan.stacking import Stacked, check_layer, check_state, split_params
from parscan.structure import Structure

_stack: Callable[[list], Array] = getattr(lax, "stack", jnp.stack)  # one equation, whose transpose is one, from jax 0.10.1 on
_unstack: Callable[[Array], Sequence[Array]] = getattr(lax, "unstack", jnp.unstack)


def stack(leaves: Sequence[Any]) -> Array:
    """Arrays of one shape on a new leading axis."""
    return jnp.asarray(leaves[0])[None] if len(leaves) == 1 else _stack([jnp.asarray(leaf) for leaf in leaves])


def unstack(leaf: Any, count: int) -> list[Any]:
    """The entries of a leading axis. One equation, which XLA makes a kernel for each entry of; of an array at hand, one kernel for all."""
    if isinstance(leaf, Tracer) and count > 1:
        return list(_unstack(leaf))
    return [leaf[i] for i in range(count)]


@dataclass
class Link:
    """A run of equal layers lo … hi - 1, and what they are given.

    consts: values closed over (the first `closed_over`), then leaves of parameters that the run's layers share.
    xs: leaves of parameters, leading axis hi - lo.
    tree: of the state that leaves it.
    """

    step: Step
    consts: list[Any]
    closed_over: int
    xs: list[Any]
    lo: int
    tree: Any

    @property
    def hi(self) -> int:
        return self.lo + self.step.count


@dataclass
class Network:
    """A chain of layers as runs.

    start: leaves of h_0, `tree` their structure. params: what the user gave; `stacked` how it is taken apart, None for a sequence of layers.
    """

    links: list[Link]
    start: list[Any]
    tree: Any
    params: Any
    stacked: Stacked | None

    @property
    def steps(self) -> list[Step]:
        return [link.step for link in self.links]

    def trees(self) -> list[Any]:
        """The structure of h_0 … h_L."""
        return [self.tree, *(link.tree for link in self.links for _ in range(link.step.count))]

    def as_activations(self, start: list[Any], leaving: list[list[Any]]) -> Any:
        """Leaves of h_0 and of what leaves every layer of each run (leading axis) in the form that the user knows: stacked, or a list."""
        if self.stacked is not None:
            return jax.tree.unflatten(self.tree, [_prepended(s, rest) for s, rest in zip(start, leaving[0], strict=True)])
        states = [start]
        for link, leaves in zip(self.links, leaving, strict=True):
            apart = [unstack(leaf, link.step.count) for leaf in leaves]
            states.extend([leaf[i] for leaf in apart] for i in range(link.step.count))
        return [jax.tree.unflatten(tree, leaves) for tree, leaves in zip(self.trees(), states, strict=True)]

    def as_params(self, consts: list[list[Any]], xs: list[list[Any]]) -> Any:
        """Gradients of each run's shared and stacked leaves in the form of the parameters."""
        if self.stacked is not None:
            return self.stacked.join(xs[0], consts[0])
        found: list[Any] = []
        for link, to_consts, to_xs in zip(self.links, consts, xs, strict=True):
            apart = [unstack(leaf, link.step.count) for leaf in to_xs]
            for i in range(link.step.count):
                tree = jax.tree.structure(self.params[link.lo + i])
                found.append(jax.tree.unflatten(tree, to_consts or [leaf[i] for leaf in apart]))
        return like_sequence(self.params, self._summed(found))

    def _summed(self, found: list[Any]) -> list[Any]:
        """An entry of `params` that stands in several places gets the sum of their gradients in each."""
        inside = {i: link.lo for link in self.links if link.step.count > 1 and len(link.consts) > link.closed_over for i in range(link.lo + 1, link.hi)}
        places: dict[int, list[int]] = {}
        for i, entry in enumerate(self.params):
            if is_shareable(entry):
                places.setdefault(id(entry), []).append(i)
        for some in places.values():
            first, *others = dict.fromkeys(inside.get(i, i) for i in some)  # a run that shares them has summed them already
            total = found[first]
            for i in others:
                total = jax.tree.map(lambda a, b: a if a.dtype == jax.dtypes.float0 else a + b, total, found[i])
            for i in some:
                found[i] = total
        return found

    def recurrence(self, stretch: Stretch, structures: Sequence[Structure] | None, method: Travelling, watch: Watch | None = None) -> Recurrence:
        """A stretch as what is compiled, with Jacobians of these structures; checked if there is a `watch`."""
        assert structures is not None
        links = self.links[stretch.lo : stretch.hi]
        runs = tuple(Run(link.step.program, one, link.step.count, link.step.repeats) for link, one in zip(links, structures, strict=True))
        return Recurrence(runs, method, debug=() if watch is None else tuple(self._watched(watch, link) for link in links))

    @staticmethod
    def _watched(watch: Watch, link: Link) -> Watch:
        return replace(watch, first=link.lo, leaves=names_of("h", jax.tree.unflatten(link.tree, link.step.program.out_avals[0])))


def _prepended(start: Any, rest: Any) -> Any:
    return jnp.concatenate([start[None], rest]) if rest.dtype != jax.dtypes.float0 else checks.float0_zeros((rest.shape[0] + 1, *rest.shape[1:]))


def is_shareable(entry: Any) -> bool:
    """Whether an entry of `params` that stands in several places means shared weights: it is, or holds, an array."""
    return any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(entry))


def check_layers(layers: Any) -> None:
    """Raises TypeError for what is no layer, and no sequence of layers."""
    if not is_sequence(layers):
        check_layer(layers)
        return
    for i, layer in enumerate(layers):
        if not callable(layer):
            raise TypeError(f"`layers[{i}]` must be a callable (params_i, h) -> h; got {layer!r}.")


def like_sequence(params: Sequence[Any], entries: list[Any]) -> Any:
    """A sequence of the kind of `params`, with other entries: a list, unless it is a pytree."""
    tree = jax.tree.structure(params, is_leaf=lambda entry: entry is not params)
    return entries if jax.tree_util.treedef_is_leaf(tree) else jax.tree.unflatten(tree, entries)


def is_sequence(layers: Any) -> TypeGuard[Sequence[Any]]:
    """Whether `layers` is a sequence of layers rather than one."""
    return isinstance(layers, (list, tuple)) and not callable(layers)


# --- one layer, parameters stacked --------------------------------------------------------------------------------------


def read_stacked(layer: Any, params: Any, state: Any, params_axes: Any, length: int | None, *, source: str = "`length`") -> Network:
    """A chain of `length` equal layers. `state` is h_0, or its abstract values."""
    check_layer(layer)
    stacked = split_params(params, params_axes, length, source=source)
    start, tree = jax.tree.flatten(state)
    _check_arrays(checks.named_leaves("h", state), "the state")
    program, consts, _ = trace(
        lambda shared, h, p: check_state(h, layer(stacked.join(p, shared), h)),
        Flat.of(stacked.shared),
        Flat([_strong(leaf) for leaf in start], tree),
        Flat.of([slice_spec(leaf) for leaf in stacked.leaves]),
    )
    step = Step(program, stacked.length, True)
    return Network([Link(step, consts, len(consts) - len(stacked.shared), stacked.leaves, 0, tree)], start, tree, params, stacked)


# --- a sequence of layers -------------------------------------------------------------------------------------------------


@dataclass
class _Layer:
    """One layer, traced: its program, the values it closes over, the structure of its output; `shared`: its parameters, if they are among `consts`."""

    program: Program
    consts: list[Any]
    closed_over: int
    xs: list[Any]
    tree: Any
    shared: Any


def read_sequence(layers: Sequence[Any], params: Any, states: Sequence[Any]) -> Network:
    """A chain of any layers.

    Args:
        layers: callables (params_i, h) -> h.
        params: as many entries; None for a layer without parameters.
        states: h_0, or h_0 … h_L where they are known; or their abstract values.

    Raises:
        ValueError: numbers of layers and parameters that differ, a state that does not fit its layer. TypeError: a layer that is not
            callable.
    """
    _check_sequence(layers, params)
    traced: dict[Any, _Layer] = {}
    found, state = [], states[0]
    for i, (layer, entry) in enumerate(zip(layers, params, strict=True)):
        if len(states) > 1:
            state = states[i]
        one = _traced_layer(i, layer, entry, state, _shares(layers, params, i), traced)
        found.append(one)
        state = jax.tree.unflatten(one.tree, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in one.program.out_avals[0]])
        if len(states) > 1:
            _check_fits(i, layer, state, states[i + 1])
    start, tree = jax.tree.flatten(states[0])
    return Network(_linked(found), start, tree, params, None)


def _check_sequence(layers: Sequence[Any], params: Any) -> None:
    check_layers(layers)
    if not isinstance(params, Sequence) or isinstance(params, (str, bytes)):
        raise TypeError(f"`params` must be a sequence with one entry a layer, None for a layer without parameters; got {type(params).__name__}.")
    if len(params) != len(layers):
        raise ValueError(
            f"`params` must have one entry a layer: got {len(params)} for {len(layers)} layers. Give None for a layer without parameters; "
            "for one layer repeated with stacked parameters, give the layer itself instead of a list."
        )
    for i, entry in enumerate(params):
        _check_arrays(checks.named_leaves(f"params[{i}]", entry), f"`params[{i}]`")


def _check_arrays(named: list[tuple[str, Any]], what: str) -> None:
    strange = checks.not_arrays(named)
    if strange:
        raise TypeError(f"{what} must hold arrays alone; got {strange}. Let the layer close over what is no array.")


def _shares(layers: Sequence[Any], params: Sequence[Any], i: int) -> bool:
    """Whether a neighbour is the same layer with the same parameters."""
    neighbours = [j for j in (i - 1, i + 1) if 0 <= j < len(layers)]
    return is_shareable(params[i]) and any(layers[j] is layers[i] and params[j] is params[i] for j in neighbours)


def _strong(leaf: Any) -> jax.ShapeDtypeStruct:
    """The abstract value of a leaf, without a weak type: what layer meets layer with."""
    sharding = leaf.sharding if isinstance(leaf, jax.Array) and any(axis is not None for axis in jax.typeof(leaf).sharding.spec) else None
    return jax.ShapeDtypeStruct(checks.shape_of(leaf), checks.dtype_of(leaf), sharding=sharding)


def _traced_layer(i: int, layer: Any, entry: Any, state: Any, shared: bool, traced: dict[Any, _Layer]) -> _Layer:
    """Traced once for every callable, shapes of parameters and shapes of the state."""
    leaves, tree = jax.tree.flatten(entry)
    h, h_tree = jax.tree.flatten(state)
    _check_arrays(checks.named_leaves("h", state), f"The state that layer {i} ({_name(layer)}) is given")
    h, p = [_strong(leaf) for leaf in h], [_strong(leaf) for leaf in leaves]
    key = (id(layer), tree, h_tree, *((a.shape, a.dtype, a.sharding) for a in (*h, *p)), id(entry) if shared else None)
    if key not in traced:
        try:
            program, consts, out = trace(
                lambda c, h, x: _checked_output(i, layer, layer(jax.tree.unflatten(tree, c or x), h)),
                Flat.of(leaves if shared else []),
                Flat(h, h_tree),
                Flat.of([] if shared else p),
            )
        except Exception as error:
            error.add_note(f"in layer {i} ({_name(layer)}) of the chain")
            raise
        traced[key] = _Layer(program, consts, len(consts) - (len(leaves) if shared else 0), [], out, entry if shared else None)
    return replace(traced[key], xs=[] if shared else leaves)


def _checked_output(i: int, layer: Any, new: Any) -> Any:
    strange = checks.not_arrays(checks.named_leaves("h", new))
    if strange:
        raise TypeError(f"Layer {i} ({_name(layer)}) must return arrays, or a pytree of them; got {strange}.")
    return jax.tree.map(lambda leaf: lax.convert_element_type(leaf, checks.dtype_of(leaf)) if checks.is_inexact(leaf) else jnp.asarray(leaf), new)


def _check_fits(i: int, layer: Any, made: Any, given: Any) -> None:
    """That activation i + 1 is what layer i makes of activation i."""
    what = f"`activations[{i + 1}]` does not fit: layer {i} ({_name(layer)}) makes"
    difference = checks.structure_difference(f"`activations[{i + 1}]`", given, made)
    if difference is not None:
        raise ValueError(f"{what} another structure of `activations[{i}]`: {difference}. parscan.forward(layers, params, x) returns them as needed.")
    wrong = [
        f"{name} is {checks.describe(leaf)}, where {checks.describe(want)} is needed"
        for (name, leaf), want in zip(checks.named_leaves(f"activations[{i + 1}]", given), jax.tree.leaves(made), strict=True)
        if (checks.shape_of(leaf), checks.dtype_of(leaf)) != (want.shape, want.dtype)
    ]
    if wrong:
        raise ValueError(f"{what} another of `activations[{i}]`: {'; '.join(wrong)}. parscan.forward(layers, params, x) returns them as needed.")


def _name(layer: Any) -> str:
    return getattr(layer, "__name__", None) or type(layer).__name__


def _linked(found: list[_Layer]) -> list[Link]:
    """Neighbours with equal programs, the same values closed over and a state that keeps its shape go together."""
    links: list[Link] = []
    for lo, hi in _runs(found):
        first, count = found[lo], hi - lo
        xs = [stack([found[i].xs[k] for i in range(lo, hi)]) for k in range(len(first.xs))]
        links.append(Link(Step(first.program, count, count > 1), first.consts, first.closed_over, xs, lo, first.tree))
    return links


def _runs(found: list[_Layer]) -> Iterator[tuple[int, int]]:
    lo = 0
    for hi in range(1, len(found) + 1):
        if hi == len(found) or not _alike(found[lo], found[hi]):
            yield lo, hi
            lo = hi


def _alike(a: _Layer, b: _Layer) -> bool:
    closed_over = zip(a.consts[: a.closed_over], b.consts[: b.closed_over], strict=False)
    same = a.shared is b.shared and a.closed_over == b.closed_over and all(x is y for x, y in closed_over)
    return same and a.tree == b.tree and len(a.xs) == len(b.xs) and a.program.is_square and a.program == b.program
