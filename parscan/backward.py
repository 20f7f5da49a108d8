"""`parallel_backward`: the engine called directly, on activations that the forward pass has stored."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Generic, TypeVar, overload

import jax
import jax.numpy as jnp
from jax import Array, lax

from parscan import checks, system
from parscan.chains import Layers
from parscan.claims import parse_structure
from parscan.debug import Watch, check_runs
from parscan.jaxprs import is_batchable, jit_unless_staged
from parscan.methods import Lax, Method, Sequential, Travelling, parse_method
from parscan.network import Link, Network, is_sequence, like_sequence, read_sequence, read_stacked, stack
from parscan.planning import Stretch, plan_chain
from parscan.recurrence import Recurrence, Run
from parscan.report import Plan
from parscan.structure import structures_of

Params = TypeVar("Params")
State = TypeVar("State")

_shortly = reprlib.Repr()
_shortly.maxlevel, _shortly.maxstring, _shortly.maxother = 20, 1000, 1000
_shortly.maxlist = _shortly.maxtuple = 4
_shortly.maxdict = 20


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, repr=False)
class Gradients(Generic[Params, State]):
    """What `parallel_backward` returns: a pytree. Printed, it shows shapes and dtypes, and of long lists the beginning.

    Attributes:
        params: pytree like the parameters, in their shapes and dtypes: ∂/∂θ_i stacked on the leading axis L, summed over all layers for shared leaves.
            For a sequence of layers a sequence; an entry that stands in several places has the sum of their gradients in each.
        activations: pytree like the activations, in their shapes and dtypes: the accumulated gradient at h_0 … h_L, each leaf (L + 1, …); for a
            sequence of layers a list.
        plan: what was chosen, and why. It rides along, but does not tell two pytrees apart.
        stacked: whether `activations` are stacked rather than a list.

    Integer, boolean and key leaves are `float0`, as in JAX.

    Example:
        >>> parscan.parallel_backward(layer, params, activations, c, method="tree")
        Gradients(params=float32[16,4], activations=float32[17,4], plan=Plan(Diagonal, {1: 4}, Tree(), length 16))
    """

    params: Params
    activations: State
    plan: Plan
    stacked: bool = True

    @property
    def input(self) -> State:
        """The gradient of the input, accumulated at h_0."""
        if not self.stacked:
            some: Any = self.activations
            return some[0]
        return jax.tree.map(lambda g: checks.float0_zeros(g.shape[1:]) if g.dtype == jax.dtypes.float0 else g[0], self.activations)

    def __repr__(self) -> str:
        params, activations = (_shortly.repr(jax.tree.map(_InWords, some)) for some in (self.params, self.activations))
        return f"Gradients(params={params}, activations={activations}, plan={self.plan!r})"

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("params"), self.params), (key("activations"), self.activations)), (_Unseen(self.plan), self.stacked)

    @classmethod
    def tree_unflatten(cls, static, children):
        (params, activations), (plan, stacked) = children, static
        return cls(params, activations, plan.value, stacked)


class _InWords:
    """Stands for a leaf in what is printed."""

    def __init__(self, leaf: Any):
        known = hasattr(leaf, "shape") and hasattr(leaf, "dtype")  # in JAX's own hands a leaf may be anything
        self.text = checks.describe(leaf).replace(str(jax.dtypes.float0), "float0") if known else repr(leaf)

    def __repr__(self) -> str:
        return self.text


class _Unseen:
    """Equal to any other: pytrees that differ in it alone have the same structure."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unseen)

    def __hash__(self) -> int:
        return 0


@overload
def parallel_backward(
    layer: Callable[[Any, Any], Any],
    params: Params,
    activations: State,
    cotangent: Any,
    *,
    layer_cotangents: Any = None,
    params_axes: Any = 0,
    method: Method | str = "auto",
    structure: Any = "auto",
    debug: bool = False,
) -> Gradients[Params, State]: ...


@overload
def parallel_backward(
    layer: Layers,
    params: Any,
    activations: Any,
    cotangent: Any,
    *,
    layer_cotangents: Any = None,
    params_axes: Any = 0,
    method: Method | str = "auto",
    structure: Any = "auto",
    debug: bool = False,
) -> Gradients[Any, Any]: ...


def parallel_backward(
    layer: Layers,
    params: Any,
    activations: Any,
    cotangent: Any,
    *,
    layer_cotangents: Any = None,
    params_axes: Any = 0,
    method: Method | str = "auto",
    structure: Any = "auto",
    debug: bool = False,
) -> Gradients:
    """The gradient of every layer of a chain h_i = layer_i(θ_i, h_{i-1}), from stored activations, in logarithmic depth.

    With J_i the Jacobian of layer i at the stored h_{i-1}, and c_i what the loss reads at h_i::

        g_L = c_L,   g_{i-1} = J_iᵀ g_i + c_{i-1},   ∂/∂θ_i = (∂ layer_i / ∂θ_i)ᵀ g_i

    Args:
        layer: (params_i, h) -> h, one for all layers, or a sequence of L of them, which may change the state's shapes and structure.
        params: pytree of arrays, any dtypes, leaves stacked on a leading axis L or shared. For a sequence of layers a sequence of L pytrees (None
            for a layer without parameters); the same object in several places is shared by these layers (under `jax.jit`
            that must be so inside: the arguments it is given are objects of their own).
        activations: h_0 … h_L, as `forward` returns them: the state's pytree, each leaf (L + 1, …), of any dtype but complex; for a sequence of
            layers a list.
        cotangent: pytree like h_L: the loss's derivative there. None for zero. Leaves that are not floating-point are ignored.
        layer_cotangents: like `activations`: derivatives of losses read at inner layers; `cotangent` is added to the last. For a sequence
            of layers a list of L + 1 entries, None for absent ones, or a dict from the index of an activation to its cotangent.
        params_axes: prefix of `params`: 0 for stacked, None for shared by all layers. Not for a sequence of layers.
        method: `"auto"`, `Lax`, `Sequential`, `Walk`, `Associative`, `Tree`, `Chunked`, as values or lower-case names. Where layers change the
            width, `Associative` takes the order of `Tree`.
        structure: `"auto"`, or a claim taken at its word: `"dense"`, `"diagonal"`, `Blocks(...)`, `Band(...)`.
        debug: as for `scan`.

    Returns:
        `Gradients`, a pytree with `params`, `activations`, `input` and `plan`, in the dtypes of what was given. A layer that cannot be
        differentiated in parallel (a custom VJP, a collective, an effect) is differentiated sequentially; `plan.reason` says why.

    Raises:
        ValueError: parameters not stacked alike or not as many as layers, activations of the wrong count or that do not fit their layer,
            cotangents that do not match or are for no layer, unknown method or structure, an explicit parallel method for a layer that has none.
        TypeError: a repeated layer that changes the state's type, a layer that is not callable, complex activations.

    Source: S. Wang, Y. Bai, G. Pekhimenko, BPPSA: Scaling back-propagation by parallel scan algorithm (MLSys 2020).

    Example:
        >>> layer = lambda w, h: jnp.tanh(h @ w)
        >>> w = jnp.ones((50, 3, 3)) / 3
        >>> y, activations = parscan.forward(layer, w, jnp.ones(3))
        >>> parscan.parallel_backward(layer, w, activations, jnp.ones(3)).params.shape
        (50, 3, 3)
        >>> layers, ws = [layer, layer], [jnp.ones((3, 4)), jnp.ones((4, 2))]
        >>> y, activations = parscan.forward(layers, ws, jnp.ones(3))
        >>> [g.shape for g in parscan.parallel_backward(layers, ws, activations, y).activations]
        [(3,), (4,), (2,)]
    """
    parsed, claim = parse_method(method), parse_structure(structure)
    if is_sequence(layer):
        if params_axes != 0:
            raise ValueError("`params_axes` is for one layer repeated; a sequence of layers has its own parameters for each.")
        network, states, cotangents = _of_sequence(layer, params, activations, cotangent, layer_cotangents)
    else:
        network, states, cotangents = _of_stacked(layer, params, params_axes, activations, cotangent, layer_cotangents)
    plan, stretches = plan_chain(network.steps, parsed, claim, fallback=Sequential())
    if not stretches:
        return Gradients(like_sequence(params, []), network.as_activations(_scattered(network.start, cotangents.start), []), plan, False)
    return _gradients(network, states, cotangents, plan, stretches, Watch("layer", claim) if debug else None)


# --- reading what is given ------------------------------------------------------------------------------------------------


@dataclass
class _Cotangents:
    """c_0, leaves of h_0, and what is injected at the states that leave every layer of each run (leading axis); floating-point leaves alone."""

    start: list[Array]
    leaving: list[list[Array]]


def _of_stacked(
    layer: Any, params: Any, params_axes: Any, activations: Any, cotangent: Any, layer_cotangents: Any
) -> tuple[Network, list[list[Any]], _Cotangents]:
    count = _check_activations(activations)
    abstract = jax.tree.map(lambda h: jax.ShapeDtypeStruct(checks.shape_of(h)[1:], checks.dtype_of(h)), activations)
    source = "the leading axis of `activations`, one more than the number of layers,"
    network = read_stacked(layer, params, abstract, params_axes, count, source=source)
    states = [jnp.asarray(h) for h in jax.tree.leaves(activations)]
    network.start = [h[0] for h in states]
    floats = _stacked_cotangents(cotangent, layer_cotangents, activations)
    return network, [[h[:-1] for h in states]], _Cotangents([c[0] for c in floats], [[c[1:] for c in floats]])


def _of_sequence(layers: Sequence[Any], params: Any, activations: Any, cotangent: Any, layer_cotangents: Any) -> tuple[Network, list[list[Any]], _Cotangents]:
    if not isinstance(activations, Sequence) or len(activations) != len(layers) + 1:
        got = f"{len(activations)} of them" if isinstance(activations, Sequence) else type(activations).__name__
        raise ValueError(
            f"`activations` must be the list h_0 … h_L, {len(layers) + 1} for {len(layers)} layers; got {got}. parscan.forward(layers, params, x) returns them."
        )
    _check_real([named for i, h in enumerate(activations) for named in checks.named_leaves(f"activations[{i}]", h)])
    network = read_sequence(layers, params, activations)
    leaves = [jax.tree.leaves(h) for h in activations]
    given = _listed_cotangents(cotangent, layer_cotangents, activations)
    states = [[stack([leaves[i][k] for i in range(link.lo, link.hi)]) for k in range(len(leaves[link.lo]))] for link in network.links]
    floats = [[(k, leaf) for k, leaf in enumerate(some) if checks.is_inexact(leaf)] for some in leaves]

    def injected(lo: int, hi: int) -> list[Array]:
        """c_lo … c_{hi-1}, stacked; absent ones are zero."""
        found = []
        for k, like in floats[lo]:
            zero, some = jnp.zeros_like(like, checks.dtype_of(like)), [given.get(i) for i in range(lo, hi)]
            present = any(c is not None for c in some)
            found.append(stack([zero if c is None else c[k] for c in some]) if present else jnp.zeros((hi - lo, *zero.shape), zero.dtype))
        return found

    start = [c[0] for c in injected(0, 1)]
    return network, states, _Cotangents(start, [injected(link.lo + 1, link.hi + 1) for link in network.links])


def _listed_cotangents(cotangent: Any, layer_cotangents: Any, activations: Sequence[Any]) -> dict[int, list[Any]]:
    """By the index of the activation: the leaves of its cotangent, in the activation's dtypes."""
    _check_any(cotangent, layer_cotangents)
    last = len(activations) - 1
    if isinstance(layer_cotangents, dict):
        strange = [i for i in layer_cotangents if isinstance(i, bool) or not isinstance(i, Integral) or not 0 <= int(i) <= last]
        if strange:
            raise ValueError(f"`layer_cotangents` has a cotangent for {strange[0]!r}, but the activations are h_0 … h_{last}: give an index from 0 to {last}.")
        given = {int(i): c for i, c in layer_cotangents.items()}
    elif layer_cotangents is None:
        given = {}
    elif isinstance(layer_cotangents, Sequence) and len(layer_cotangents) == last + 1:
        given = dict(enumerate(layer_cotangents))
    else:
        got = f"{len(layer_cotangents)} entries" if isinstance(layer_cotangents, Sequence) else type(layer_cotangents).__name__
        raise ValueError(
            f"`layer_cotangents` must be a list of {last + 1} entries, None for absent ones, or a dict from the index of an activation to its cotangent; "
            f"got {got}."
        )
    found = {i: _matching(f"layer_cotangents[{i}]", c, activations[i], f"`activations[{i}]`", checks.shape_of) for i, c in given.items() if c is not None}
    if cotangent is not None:
        end = _matching("cotangent", cotangent, activations[last], "the last activation h_L", checks.shape_of)
        found[last] = [a if b is None else b if a is None else a + b for a, b in zip(found.get(last, [None] * len(end)), end, strict=True)]
    return found


def _check_activations(activations: Any) -> int:
    """The number of layers L."""
    named = checks.named_leaves("activations", activations)
    _check_real(named)
    listed = ", ".join(f"{name}: {checks.describe(leaf)}" for name, leaf in named)
    fix = "parscan.forward(layer, params, x) returns them as needed"
    if not named or not all(checks.shape_of(leaf) for _, leaf in named) or len({checks.shape_of(leaf)[0] for _, leaf in named}) != 1:
        raise ValueError(
            f"`activations` must be h_0 … h_L stacked on a leading axis of length L + 1, the same in every leaf; got {listed or 'no array'}. {fix}."
        )
    if checks.shape_of(named[0][1])[0] == 0:
        raise ValueError(f"`activations` must hold h_0 at least; got {listed}. {fix}.")
    return checks.shape_of(named[0][1])[0] - 1


def _check_real(named: list[tuple[str, Any]]) -> None:
    strange = checks.not_arrays(named)
    if strange:
        raise TypeError(f"`activations` must hold arrays alone; got {strange}. parscan.forward returns them as needed.")
    if any(checks.is_complex(leaf) for _, leaf in named):
        listed = ", ".join(f"{name}: {checks.describe(leaf)}" for name, leaf in named)
        raise TypeError(f"`activations` must be real; got {listed}. Split complex states into real and imaginary parts.")


def _check_any(cotangent: Any, layer_cotangents: Any) -> None:
    if cotangent is None and layer_cotangents is None:
        raise ValueError(
            "`cotangent` and `layer_cotangents` are both None: there is nothing to pull back. Give the loss's derivative at h_L, or at every layer."
        )


def _stacked_cotangents(cotangent: Any, layer_cotangents: Any, activations: Any) -> list[Array]:
    """c_0 … c_L for the floating-point leaves, leading axis L + 1."""
    _check_any(cotangent, layer_cotangents)
    states = jax.tree.leaves(activations)
    absent = [None] * len(states)
    every = absent if layer_cotangents is None else _matching("layer_cotangents", layer_cotangents, activations, "`activations`", checks.shape_of)
    shape = lambda h: checks.shape_of(h)[1:]  # noqa: E731
    last = absent if cotangent is None else _matching("cotangent", cotangent, activations, "the last activation h_L", shape)
    out = []
    for h, c, end in zip(states, every, last, strict=True):
        if checks.is_inexact(h):
            total = jnp.zeros_like(h, checks.dtype_of(h)) if c is None else c
            out.append(total if end is None else total.at[-1].add(end))
    return out


def _matching(name: str, given: Any, like: Any, what: str, shape: Callable[[Any], tuple[int, ...]]) -> list[Any]:
    """Leaves of a cotangent in the dtypes of the activations', checked against these; None where they have no derivative."""
    states = jax.tree.leaves(like)
    difference = checks.structure_difference(f"`{name}`", given, like)
    if difference is not None:
        raise ValueError(f"`{name}` must match {what}: {difference}.")
    pairs = list(zip(checks.named_leaves(name, given), states, strict=True))
    strange = checks.not_arrays([one for one, h in pairs if checks.is_inexact(h)])
    if strange:
        raise TypeError(f"`{name}` must hold arrays like those of {what}; got {strange}.")
    wrong = [
        f"{leaf_name} is {checks.describe(c)}, where {checks.dtype_of(h)}[{','.join(map(str, shape(h)))}] is needed"
        for (leaf_name, c), h in pairs
        if checks.is_inexact(h) and (checks.shape_of(c) != shape(h) or (checks.dtype_of(c) != checks.dtype_of(h) and not jax.typeof(c).weak_type))
    ]
    if wrong:
        raise ValueError(f"`{name}` must match {what}: {'; '.join(wrong)}.")
    return [jnp.asarray(c, checks.dtype_of(h)) if checks.is_inexact(h) else None for (_, c), h in pairs]


# --- running ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """All that is static about a stretch's backward pass.

    closed_over: for each run, how many of its constants are no parameters. by_jax: every layer's whole VJP in one loop. differentiable: proved
    to be linear, so that the pass itself may be differentiated.
    """

    recurrence: Recurrence
    closed_over: tuple[int, ...]
    by_jax: bool
    differentiable: bool


@dataclass(frozen=True)
class Backward:
    """All that is static about a backward pass: the stretches, in the order of the layers."""

    parts: tuple[Part, ...]

    @property
    def is_portable(self) -> bool:
        return all(part.recurrence.is_portable for part in self.parts)


def _gradients(network: Network, states: list[list[Any]], cotangents: _Cotangents, plan: Plan, stretches: list[Stretch], watch: Watch | None) -> Gradients:
    spec = Backward(tuple(_part(network, stretch, watch) for stretch in stretches))
    consts, xs = [link.consts for link in network.links], [link.xs for link in network.links]
    to_consts, to_xs, start, leaving = _compiled(spec, consts, xs, states, (cotangents.start, cotangents.leaving))
    shared = [_scattered(link.consts[link.closed_over :], some) for link, some in zip(network.links, to_consts, strict=True)]
    stacked = [_scattered(link.xs, some) for link, some in zip(network.links, to_xs, strict=True)]
    every = [_scattered(_states_after(link), some) for link, some in zip(network.links, leaving, strict=True)]
    activations = network.as_activations(_scattered(network.start, start), every)
    return Gradients(network.as_params(shared, stacked), activations, plan, network.stacked is not None)


def _states_after(link: Link) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((link.step.count, *a.shape), a.dtype) for a in link.step.program.out_avals[0]]


def _part(network: Network, stretch: Stretch, watch: Watch | None) -> Part:
    links = network.links[stretch.lo : stretch.hi]
    closed_over = tuple(link.closed_over for link in links)
    if stretch.structures is not None and isinstance(stretch.plan.method, Travelling):
        return Part(network.recurrence(stretch, stretch.structures, stretch.plan.method, watch), closed_over, False, True)
    by_jax = isinstance(stretch.plan.method, Lax) or not all(is_batchable(link.step.program) for link in links)
    dense = structures_of([(link.step.program, link.step.repeats) for link in links], "dense")
    return Part(network.recurrence(stretch, dense, Sequential()), closed_over, by_jax, False)


def _run(spec: Backward, consts: list[list], xs: list[list], states: list[list], cotangents: tuple[list, list[list]]) -> tuple:
    """Gradients of the floating-point leaves, by run: shared parameters, stacked parameters; h_0; the states leaving every layer."""
    start, leaving = cotangents
    bounds = [0]
    for part in spec.parts:
        bounds.append(bounds[-1] + len(part.recurrence.runs))
    ends = [[leaf[-1] for leaf in some] if some and some[0].shape[0] else None for some in leaving]
    found, entering = [], None
    for i, part in reversed(list(enumerate(spec.parts))):
        lo, hi = bounds[i], bounds[i + 1]
        if entering is not None:  # what the stretch behind has accumulated takes the place of what was injected between the two
            last = [leaf.at[-1].set(g) for leaf, g in zip(leaving[hi - 1], entering, strict=True)]
            leaving = [*leaving[: hi - 1], last, *leaving[hi:]]
        given = zip(part.recurrence.runs, consts[lo:hi], xs[lo:hi], states[lo:hi], part.closed_over, strict=True)
        runs = [_linearised(run, c, x, h, closed) for run, c, x, h, closed in given]
        before = start if lo == 0 else ends[lo - 1] or []
        entering, some = (_by_jax if part.by_jax else _by_system)(part, runs, before, leaving[lo:hi])
        found = some + found
    return [run.consts for run in found], [run.xs for run in found], entering, [run.states for run in found]


def _linearised(run: Run, consts: list, xs: list, states: list, closed_over: int) -> system.Linearised:
    shared = tuple(i for i in range(closed_over, len(consts)) if checks.is_inexact(consts[i]))
    floats = tuple(i for i, h in enumerate(states) if checks.is_inexact(h))
    inputs = tuple(i for i, x in enumerate(xs) if checks.is_inexact(x))
    return system.Linearised(run.program, run.structure, consts, xs, states, shared, floats, inputs, (), run.count)


def _by_system(part: Part, runs: list[system.Linearised], start: list, leaving: list[list]) -> tuple[list, list[system.RunUnknowns]]:
    check_runs(runs, part.recurrence.debug)
    at = system.System(runs, part.recurrence.method)
    zero = system.zeros(at, jnp.float32(0))
    right = system.Unknowns(start, [some._replace(states=given) for some, given in zip(zero.runs, leaving, strict=True)])
    with jax.numpy_rank_promotion("allow"):  # a setting for the user's layers, which have been traced
        solved = system.cotangents(at, right) if part.differentiable else system.solve_transposed(at, right)
    return solved.start, solved.runs


def _by_jax(part: Part, runs: list[system.Linearised], start: list, leaving: list[list]) -> tuple[list, list[system.RunUnknowns]]:
    """JAX's own order: layer by layer, each one's whole VJP."""
    found: list[system.RunUnknowns] = []
    befores = [start, *([leaf[-1] for leaf in some] for some in leaving[:-1])]
    after = None
    for run, before, some in reversed(list(zip(runs, befores, leaving, strict=True))):
        if run.count == 0:
            return before, [system.RunUnknowns([jnp.zeros_like(run.consts[i]) for i in run.active_consts], [run.xs[i] for i in run.active_xs], some, [])]
        after = [leaf[-1] for leaf in some] if after is None else after

        def step(carry, one, run=run):
            after, total = carry
            data, injected = one
            to_consts, before, to_xs = jax.vjp(lambda *primal: run.step(data, *primal)[0], *run.at(data))[1](after)
            before = jax.tree.map(jnp.add, before, injected)
            return (before, jax.tree.map(jnp.add, total, to_consts)), (after, to_xs)

        zero = [jnp.zeros_like(run.consts[i]) for i in run.active_consts]
        if run.count == 1:
            (entering, to_consts), (states, to_xs) = step((after, zero), (jax.tree.map(lambda x: x[0], run.data), before))
            states, to_xs = jax.tree.map(lambda leaf: leaf[None], (states, to_xs))
        else:
            injected = [jnp.concatenate([b[None], leaf[:-1]]) for b, leaf in zip(before, some, strict=True)]
            (entering, to_consts), (states, to_xs) = lax.scan(step, (after, zero), (run.data, injected), reverse=True)
        found.insert(0, system.RunUnknowns(to_consts, to_xs, states, []))
        after = entering
    return after or [], found


_compiled = jit_unless_staged(_run)


def _scattered(like: list, floats: list) -> list:
    """Gradients for all leaves, `float0` for those that have none."""
    rest = iter(floats)
    return [next(rest) if checks.is_inexact(leaf) else checks.float0_zeros(checks.shape_of(leaf)) for leaf in like]
