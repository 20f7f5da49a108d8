"""Which elements of a linear program depend on which, proved equation by equation.

As `dependence`, the program is the derivative of a step, linear in its tangents, and all else in it is an unknown value; but where
`dependence` follows axes, this follows single elements (`nodes`). It costs time and memory linear in the number of elements that
depend on a tangent. Indices that are known when the program is traced (constants, `iota`, what is computed from them) are followed
with their values, so that `h[np.array([2, 0, 1])]` is the permutation that it is. A primitive without a rule of its own here is as exact as
the rule that it has in `axes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jax.extend import core

from parscan.jaxprs.axes import ELEMENTWISE, axes
from parscan.jaxprs.flow import inlined, scan_counts
from parscan.jaxprs.moves import MOVES, PER_OPERAND, computed, is_known, selected, slices, taps
from parscan.jaxprs.nodes import GivenUp, Graph, Nodes, labels, reachability
from parscan.jaxprs.program import AnyJaxpr, open_jaxpr, sub_jaxprs

UNROLLED = 3000  # equations, up to which an inner scan is followed trip by trip


class Value(NamedTuple):
    """What is known of a variable.

    nodes: for every element, the node of what it depends on; None: nothing in it depends on a tangent. known: its value, if that is known.
    columns: or else what is known of it at each index along the last dimension (`h[jnp.arange(n), k]` concatenates such indices).
    """

    nodes: Nodes | None = None
    known: np.ndarray | None = None
    columns: tuple[np.ndarray | None, ...] | None = None


NOTHING = Value()
Rule = Callable[[Graph, Any, list[Value]], list[Nodes]]


def components(closed: AnyJaxpr, tangents: Sequence[int], known: Mapping[int, np.ndarray], limit: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Which elements of the tangents and of the outputs are joined by a chain of dependences: those with the same label.

    An output element that depends on no tangent, and a tangent element that no output depends on, has a label of its own.

    Args:
        closed: closed jaxpr, linear in the inputs numbered `tangents`.
        known: position → value of inputs that are known, whole numbers or truth values.
        limit: how many elements may depend on a tangent, over all variables of the program.

    Returns:
        labels of the tangents' elements and of the outputs' elements, leaf after leaf, each raveled; None if the program is too large, or
        has mutable references.
    """
    try:
        return labels(*_analysed(closed, tangents, known, limit))
    except GivenUp:
        return None


def pattern(closed: AnyJaxpr, tangents: Sequence[int], known: Mapping[int, np.ndarray], limit: int) -> Any:
    """Where the derivative may be non-zero: a sparse boolean array (output elements, tangent elements); arguments as for `components`.

    `limit` also bounds the entries stored on the way; None where it is passed.
    """
    try:
        return reachability(*_analysed(closed, tangents, known, limit), limit)
    except GivenUp:
        return None


def _analysed(closed: AnyJaxpr, tangents: Sequence[int], known: Mapping[int, np.ndarray], limit: int) -> tuple[Graph, int, Nodes]:
    """(graph, number of tangent elements, which are nodes 1, 2, …; the nodes of the outputs)"""
    graph, body = Graph(limit), open_jaxpr(closed)
    inputs = [_constant(known[i]) if i in known else NOTHING for i in range(len(body.invars))]
    for position in tangents:
        inputs[position] = _dependent(graph, graph.fresh(body.invars[position].aval.shape))
    count = graph.count - 1
    outs = [_nodes(value, var) for value, var in zip(_evaluate(graph, closed, inputs), body.outvars, strict=True)]
    return graph, count, np.concatenate([np.zeros(0, np.int64), *(out.ravel() for out in outs)])


def _constant(value: Any) -> Value:
    return Value(known=np.asarray(value)) if is_known(value) else NOTHING


def _literal(atom: Any) -> Value:
    return _constant(np.asarray(atom.val, atom.aval.dtype)) if isinstance(atom.aval.dtype, np.dtype) else NOTHING


def _dependent(graph: Graph, nodes: Nodes) -> Value:
    if not nodes.any():
        return NOTHING
    graph.spend(nodes.size)
    return Value(nodes)


def _nodes(value: Value, var: Any) -> Nodes:
    return np.zeros(getattr(var.aval, "shape", ()), np.int64) if value.nodes is None else value.nodes


def _all_nodes(eqn: Any, ins: list[Value]) -> list[Nodes]:
    return [_nodes(value, var) for value, var in zip(ins, eqn.invars, strict=True)]


def _evaluate(graph: Graph, jaxpr: AnyJaxpr, inputs: Sequence[Value]) -> list[Value]:
    body = open_jaxpr(jaxpr)
    values: dict[Any, Value] = dict(zip(body.constvars, map(_constant, getattr(jaxpr, "consts", ())), strict=False))
    values.update(zip(body.invars, inputs, strict=True))

    def read(atom):
        return _literal(atom) if isinstance(atom, core.Literal) else values.get(atom, NOTHING)

    for eqn in body.eqns:
        values.update(zip(eqn.outvars, _equation(graph, eqn, [read(a) for a in eqn.invars]), strict=True))
    return [read(a) for a in body.outvars]


def _equation(graph: Graph, eqn: Any, ins: list[Value]) -> list[Value]:
    name, rule = eqn.primitive.name, _rule(eqn)
    if any(type(v.aval).__name__ == "AbstractRef" for v in (*eqn.invars, *eqn.outvars)):
        raise GivenUp  # what is written into a reference is read from it elsewhere
    if name in PER_OPERAND:
        return ins
    if name in _CONTROL:
        return _CONTROL[name](graph, eqn, ins)
    if rule is _by_axes and (body := inlined(eqn)) is not None:
        return _evaluate(graph, body, ins)
    if any(value.nodes is not None for value in ins):
        return [_dependent(graph, nodes) for nodes in rule(graph, eqn, ins)]
    arrays = [value.known for value in ins if value.known is not None]
    if name == "concatenate" and 0 < len(arrays) < len(ins) and eqn.params["dimension"] == len(eqn.outvars[0].aval.shape) - 1:
        sizes = [var.aval.shape[-1] for var in eqn.invars]
        columns = ([None] * size if v.known is None else np.moveaxis(v.known, -1, 0) for v, size in zip(ins, sizes, strict=True))
        return [Value(columns=tuple(column for some in columns for column in some))]
    outs = computed(eqn, arrays) if len(arrays) == len(ins) else None
    return [NOTHING for _ in eqn.outvars] if outs is None else [Value(known=out) for out in outs]


def _rule(eqn: Any) -> Rule:
    name = eqn.primitive.name
    if name in _RULES:
        return _RULES[name]
    if name in ELEMENTWISE:
        return _elementwise
    if name in MOVES:
        return _move
    return _scatter if name.startswith("scatter") else _by_axes


# --- rules -----------------------------------------------------------------------------------------------------------


def _by_axes(graph: Graph, eqn: Any, ins: list[Value]) -> list[Nodes]:
    """Apart along the axes that never mix; along the others everything meets."""
    places, outs = axes(eqn).places, []
    for var in eqn.outvars:
        out = np.zeros(getattr(var.aval, "shape", ()), np.int64)
        for value, place in zip(ins, places, strict=True):
            if value.nodes is not None and out.size:
                kept = {axis: d for axis, d in place.items() if d < out.ndim}
                out = graph.union([out, graph.spread(value.nodes, kept, out.shape)])
        outs.append(out)
    return outs


def _move(graph: Graph, eqn: Any, ins: list[Value]) -> list[Nodes]:
    return MOVES[eqn.primitive.name](eqn, _all_nodes(eqn, ins))


def _elementwise(graph: Graph, eqn: Any, ins: list[Value]) -> list[Nodes]:
    shape = eqn.outvars[0].aval.shape
    return [graph.union(np.broadcast_to(value.nodes, shape) for value in ins if value.nodes is not None)]


def _select_n(graph: Graph, eqn: Any, ins: list[Value]) -> list[Nodes]:
    which = ins[0].known
    return _elementwise(graph, eqn, ins) if which is None else [selected(which, _all_nodes(eqn, ins)[1:])]


def _cumulative(graph: Graph, eqn: Any, ins: list[Value]) -> list[Nodes]:
    return [graph.accumulate(_nodes(ins[0], eqn.invars[0]), eqn.params["axis"], eqn.params["reverse"])]


def _starts(operand: Sequence[int], sizes: Sequence[int], starts: list[Value]) -> list[int | None]:
    """Where a slice begins along each dimension, moved inside; None if that is unknown."""
    places = zip(operand, sizes, starts, strict=True)
    return [0 if room == size else None if s.known is None else min(max(int(s.known), 0), room - size) for room, size, s in places]


def _dynamic_slice(graph: Graph, eqn: Any, ins: list[Value]) -> list[Nodes]:
    operand, shape = _nodes(ins[0], eqn.invars[0]), eqn.outvars[0].aval.shape
    if any(value.nodes is not None for value in ins[1:]):
        return _by_axes(graph, eqn, ins)
    starts = _starts(operand.shape, shape, ins[1:])
    cut = operand[tuple(slice(None) if start is None else slice(start, start + size) for start, size in zip(starts, shape, strict=True))]
    return [graph.spread(cut, {d: d for d, start in enumerate(starts) if start is not None}, shape)]


def _dynamic_update_slice(graph: Graph, eqn: Any, ins: list[Value]) -> list[Nodes]:
    operand, update = _all_nodes(eqn, ins)[:2]
    if any(value.nodes is not None for value in ins[2:]):
        return _by_axes(graph, eqn, ins)
    starts = _starts(operand.shape, update.shape, ins[2:])
    where = tuple(slice(None) if start is None else slice(start, start + size) for start, size in zip(starts, update.shape, strict=True))
    out = np.zeros_like(operand) if None in starts else operand.copy()
    if update.size:
        out[where] = graph.spread(update, {d: d for d, start in enumerate(starts) if start is not None}, out[where].shape)
    return [graph.union([operand, out]) if None in starts else out]


def _slice_starts(indices: Value, var: Any, dims: Sequence[int], batching: Sequence[int], indices_batching: Sequence[int]) -> dict[int, np.ndarray | None]:
    """For each dimension along which a gather or a scatter is told where to begin: where; None if that is unknown."""
    outer = var.aval.shape[:-1]
    columns = indices.columns or [None] * len(dims) if indices.known is None else np.moveaxis(indices.known, -1, 0)
    along = {d: np.arange(outer[o]).reshape([-1 if a == o else 1 for a in range(len(outer))]) for d, o in zip(batching, indices_batching, strict=True)}
    return {d: None if column is None else _signed(column) for d, column in zip(dims, columns, strict=True)} | along


def _signed(values: np.ndarray) -> np.ndarray:
    largest = np.iinfo(np.int64).max
    return np.where(values > largest, largest, values.astype(np.int64)) if values.dtype == np.uint64 else values.astype(np.int64)


def _gather(graph: Graph, eqn: Any, ins: list[Value]) -> list[Nodes]:
    if ins[1].nodes is not None:
        return _by_axes(graph, eqn, ins)
    operand, numbers, sizes = _nodes(ins[0], eqn.invars[0]), eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batching, outer = numbers.operand_batching_dims, eqn.invars[1].aval.shape[:-1]
    starts = _slice_starts(ins[1], eqn.invars[1], numbers.start_index_map, batching, numbers.start_indices_batching_dims)
    windows = [d for d in range(operand.ndim) if d not in numbers.collapsed_slice_dims and d not in batching]
    if anywhere := [d for d, start in starts.items() if start is None and sizes[d] != operand.shape[d]]:
        operand = graph.spread(operand, {d: d for d in range(operand.ndim) if d not in anywhere}, operand.shape)
    where, inside = slices(operand.shape, {d: start for d, start in starts.items() if start is not None}, outer, sizes, windows)
    if not operand.size:
        return [np.zeros(eqn.outvars[0].aval.shape, np.int64)]
    out = operand.ravel()[where]
    if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        out = np.where(inside, out, 0)
    return [np.moveaxis(out, range(len(outer), out.ndim), numbers.offset_dims)]


def _scatter(graph: Graph, eqn: Any, ins: list[Value]) -> list[Nodes]:
    """Every kind but `scatter` itself keeps what was there before, and so does a `scatter` that applies a function."""
    if ins[1].nodes is not None:
        return _by_axes(graph, eqn, ins)
    operand, _, updates = _all_nodes(eqn, ins)
    numbers, overwrites = eqn.params["dimension_numbers"], eqn.primitive.name == "scatter" and eqn.params["update_jaxpr"] is None
    batching, outer = numbers.operand_batching_dims, eqn.invars[1].aval.shape[:-1]
    starts = _slice_starts(ins[1], eqn.invars[1], numbers.scatter_dims_to_operand_dims, batching, numbers.scatter_indices_batching_dims)
    windows = [d for d in range(operand.ndim) if d not in numbers.inserted_window_dims and d not in batching]
    updates = np.moveaxis(updates, numbers.update_window_dims, range(len(outer), updates.ndim))
    sizes, shape = [1] * operand.ndim, list(operand.shape)
    for axis, d in enumerate(windows, len(outer)):
        sizes[d] = updates.shape[axis]
    # Where a slice may begin anywhere, what is written there is written everywhere: along such a dimension one index stands for all.
    anywhere = [d for d, start in starts.items() if start is None and sizes[d] != shape[d]]
    for d in anywhere:
        shape[d] = sizes[d] = 1
        if d in windows:
            updates = np.expand_dims(graph.reduce(updates, [len(outer) + windows.index(d)]), len(outer) + windows.index(d))
    where, inside = slices(shape, {d: start for d, start in starts.items() if start is not None}, outer, sizes, windows)
    some = np.broadcast_to(inside | (eqn.params["mode"] == lax.GatherScatterMode.CLIP), where.shape)
    where, moved = where[some], updates[some]
    if anywhere:
        size = int(np.prod(shape, dtype=np.int64))
        return [graph.union([operand, np.broadcast_to(graph.merge(moved, where, size).reshape(shape), operand.shape)])]
    kept = operand.flatten()
    if overwrites:
        kept[where] = 0
    return [graph.merge(np.concatenate([kept, moved]), np.concatenate([np.arange(kept.size), where]), kept.size).reshape(operand.shape)]


def _window_taps(eqn: Any, operand: Sequence[int], windows: Sequence[int]) -> list[Nodes]:
    """For each dimension, what every window reads along it."""
    params, ones = eqn.params, (1,) * len(operand)
    strides, base, dilation = (params.get(k) or ones for k in ("window_strides", "base_dilation", "window_dilation"))
    each = zip(operand, windows, params["window_dimensions"], strides, (low for low, _ in params["padding"]), base, dilation, strict=True)
    return [taps(*some) for some in each]


def _reduce_window(graph: Graph, eqn: Any, ins: list[Value]) -> list[Nodes]:
    shape, count = eqn.outvars[0].aval.shape, len(eqn.outvars)
    if any(value.nodes is not None for value in ins[count:]) and eqn.primitive.name == "reduce_window":
        return _by_axes(graph, eqn, ins)  # initial values
    out = graph.union(value.nodes for value in ins if value.nodes is not None)
    for axis, each in enumerate(_window_taps(eqn, out.shape, shape)):
        out = graph.windows(out, axis, each)
    return [out for _ in eqn.outvars]


def _select_and_scatter_add(graph: Graph, eqn: Any, ins: list[Value]) -> list[Nodes]:
    """Every source is added to one element of its window."""
    if ins[1].nodes is not None:
        return _by_axes(graph, eqn, ins)
    out, shape = _nodes(ins[0], eqn.invars[0]), eqn.outvars[0].aval.shape
    for axis, each in enumerate(_window_taps(eqn, shape, out.shape)):
        out = graph.written(out, axis, each, shape[axis])
    return [out]


def _conv(graph: Graph, eqn: Any, ins: list[Value]) -> list[Nodes]:
    """Dimensions in canonical order: batch, features, space; kernels: output features, input features, space."""
    params, numbers, var = eqn.params, eqn.params["dimension_numbers"], eqn.outvars[0]
    shape = [var.aval.shape[d] for d in numbers.out_spec]  # batch, features, space
    image, kernel = (eqn.invars[side].aval.shape for side in (0, 1))
    sizes = zip(
        (image[d] for d in numbers.lhs_spec[2:]),
        shape[2:],
        (kernel[d] for d in numbers.rhs_spec[2:]),
        params["window_strides"],
        (low for low, _ in params["padding"]),
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    )
    each, groups, batches, outs = [taps(*some) for some in sizes], params["feature_group_count"], params["batch_group_count"], []
    if 0 in shape or 0 in image or 0 in kernel:
        return [np.zeros(var.aval.shape, np.int64)]
    if ins[0].nodes is not None:
        x = ins[0].nodes.transpose(numbers.lhs_spec)
        space = x.shape[2:]
        x = graph.reduce(x.reshape(x.shape[0], groups, x.shape[1] // groups, *space), (2,))  # features of a group meet
        for axis, some in enumerate(each):
            x = graph.windows(x, 2 + axis, some)
        # Features come group by group; of a batch in groups, each group has its own.
        x = x.reshape(batches, shape[0], groups, *x.shape[2:]) if batches > 1 else x[None]
        x = np.moveaxis(x, 0, 1).reshape(shape[0], batches * groups, *x.shape[3:])
        outs.append(np.repeat(x, shape[1] // (batches * groups), axis=1))
    if ins[1].nodes is not None:
        x = graph.reduce(ins[1].nodes.transpose(numbers.rhs_spec), (1,))
        for axis, some in enumerate(each):
            x = graph.windows(x, 1 + axis, np.where(some >= 0, np.arange(some.shape[1]), -1))
        outs.append(np.broadcast_to(x, shape))
    return [graph.union(outs).transpose([numbers.out_spec.index(d) for d in range(len(shape))])]


_RULES: dict[str, Rule] = {
    "conv_general_dilated": _conv,
    "cumlogsumexp": _cumulative,
    "cummax": _cumulative,
    "cummin": _cumulative,
    "cumprod": _cumulative,
    "cumsum": _cumulative,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "reduce_window": _reduce_window,
    "reduce_window_max": _reduce_window,
    "reduce_window_min": _reduce_window,
    "reduce_window_sum": _reduce_window,
    "select_and_gather_add": _reduce_window,
    "select_and_scatter_add": _select_and_scatter_add,
    "select_n": _select_n,
}


# --- control flow ----------------------------------------------------------------------------------------------------


def _mixed(graph: Graph, eqn: Any, ins: list[Value]) -> list[Value]:
    parts = [value.nodes.ravel() for value in ins if value.nodes is not None]
    hub = graph.reduce(np.concatenate([np.zeros(0, np.int64), *parts]), (0,))
    return [_dependent(graph, np.broadcast_to(hub, getattr(var.aval, "shape", ()))) for var in eqn.outvars]


def _cond(graph: Graph, eqn: Any, ins: list[Value]) -> list[Value]:
    branches = eqn.params["branches"]
    if ins[0].nodes is not None:
        return _mixed(graph, eqn, ins)
    if ins[0].known is not None:
        return _evaluate(graph, branches[min(max(int(ins[0].known), 0), len(branches) - 1)], ins[1:])
    outs = zip(*(_evaluate(graph, branch, ins[1:]) for branch in branches), strict=True)
    return [_dependent(graph, graph.union(_nodes(value, var) for value in some)) for var, some in zip(eqn.outvars, outs, strict=True)]


Body = Callable[[list[Value]], list[Value]]


def _fixed_point(graph: Graph, carry: list[Value], variables: Sequence[Any], body: Body) -> tuple[list[Value], list[Value]]:
    """Carries that hold before every trip, and what the body makes of them.

    All trips share their nodes: an element of the carry depends on the first one and on whatever the body writes there. Which variables
    depend on anything at all, and which keep their known values, is found first.
    """
    depends, known = [value.nodes is not None for value in carry], [value.known for value in carry]
    while True:
        mark = graph.mark()
        held = [Value(graph.fresh(var.aval.shape)) if some else Value(None, same) for some, same, var in zip(depends, known, variables, strict=True)]
        outs = body(held)
        after = outs[: len(carry)]
        grown = [some or out.nodes is not None for some, out in zip(depends, after, strict=True)]
        kept = [
            same if same is not None and out.known is not None and np.array_equal(same, out.known) else None for same, out in zip(known, after, strict=True)
        ]
        if grown == depends and [a is None for a in kept] == [b is None for b in known]:
            break
        graph.reset(mark)
        depends, known = grown, kept
    for value, first, out, var in zip(held, carry, after, variables, strict=True):
        if value.nodes is not None:
            graph.connect(_nodes(first, var), value.nodes)
            graph.connect(_nodes(out, var), value.nodes)
    return held, outs


def _while(graph: Graph, eqn: Any, ins: list[Value]) -> list[Value]:
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = ins[num_cond : num_cond + num_body], ins[num_cond + num_body :]
    if all(value.nodes is None for value in ins):
        return [NOTHING for _ in eqn.outvars]
    held, _ = _fixed_point(graph, carry, eqn.outvars, lambda values: _evaluate(graph, eqn.params["body_jaxpr"], [*consts, *values]))
    stops = _evaluate(graph, eqn.params["cond_jaxpr"], [*ins[:num_cond], *held])
    return held if stops[0].nodes is None else _mixed(graph, eqn, ins)


def _work(jaxpr: AnyJaxpr) -> int:
    """How many equations are followed, inner loops trip by trip."""
    trips = ((eqn.params["length"] if eqn.primitive.name == "scan" else 1, sub_jaxprs(list(eqn.params.values()))) for eqn in open_jaxpr(jaxpr).eqns)
    return sum(1 + length * sum(map(_work, inner)) for length, inner in trips)


def _scan(graph: Graph, eqn: Any, ins: list[Value]) -> list[Value]:
    num_consts, num_carry = scan_counts(eqn.params)
    consts, carry, xs = ins[:num_consts], ins[num_consts : num_consts + num_carry], ins[num_consts + num_carry :]
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    if all(value.nodes is None for value in ins):
        return [NOTHING for _ in eqn.outvars]
    if length == 0:
        return [*carry, *(NOTHING for _ in eqn.outvars[num_carry:])]

    def step(carry, x):
        return _evaluate(graph, body, [*consts, *carry, *x])

    if length * _work(body) <= UNROLLED:
        carry, ys = _unrolled(step, carry, xs, length, eqn.params["reverse"])
    else:
        carry, ys = _looped(graph, step, carry, xs, length, open_jaxpr(body).invars[num_consts : num_consts + num_carry])
    each = zip(ys, eqn.outvars[num_carry:], strict=True)
    return [*carry, *(NOTHING if y is None else _dependent(graph, np.broadcast_to(y, var.aval.shape)) for y, var in each)]


Step = Callable[[list[Value], list[Value]], list[Value]]


def _unrolled(step: Step, carry: list[Value], xs: list[Value], length: int, reverse: bool) -> tuple[list[Value], list[Nodes | None]]:
    """Trip by trip: exact, and a counter is known."""

    def at(part, t):
        return None if part is None else part[t]

    trips: list[list[Value]] = []
    for t in reversed(range(length)) if reverse else range(length):
        outs = step(carry, [Value(at(x.nodes, t), at(x.known, t)) for x in xs])
        carry, ys = outs[: len(carry)], outs[len(carry) :]
        trips.append(ys)
    stacked: list[Nodes | None] = []
    for some in zip(*(trips[::-1] if reverse else trips), strict=True):
        shape = next((y.nodes.shape for y in some if y.nodes is not None), None)
        stacked.append(None if shape is None else np.stack([np.zeros(shape, np.int64) if y.nodes is None else y.nodes for y in some]))
    return carry, stacked


def _looped(graph: Graph, step: Step, carry: list[Value], xs: list[Value], length: int, variables: Sequence[Any]) -> tuple[list[Value], list[Nodes | None]]:
    """All trips share their nodes; where no carry depends on a tangent, each trip gets a copy of its own."""
    slices = [NOTHING if x.nodes is None else Value(graph.reduce(x.nodes, (0,))) for x in xs]
    held, outs = _fixed_point(graph, carry, variables, lambda values: step(values, slices))
    if any(value.nodes is not None for value in held):
        return held, [y.nodes for y in outs[len(carry) :]]
    mark = graph.mark()
    own = [NOTHING if x.nodes is None else Value(graph.fresh(x.nodes.shape[1:])) for x in xs]
    ys = step(held, own)[len(carry) :]
    copies = iter(graph.repeated(mark, length, [value.nodes for value in (*own, *ys) if value.nodes is not None]))
    for x in xs:
        if x.nodes is not None:
            graph.connect(x.nodes, next(copies))
    return held, [None if y.nodes is None else next(copies) for y in ys]


def _linear_solve(graph: Graph, eqn: Any, ins: list[Value]) -> list[Value]:
    """x with A x = b: a polynomial in A applied to b."""
    lengths, matvec = eqn.params["const_lengths"], eqn.params["jaxprs"].matvec
    consts, rhs = ins[: lengths.matvec], [Value(value.nodes) for value in ins[sum(lengths) :]]
    if any(value.nodes is not None for value in ins[: sum(lengths)]) or len(rhs) != len(eqn.outvars):  # auxiliary outputs
        return _mixed(graph, eqn, ins)
    return _fixed_point(graph, rhs, eqn.outvars, lambda x: _evaluate(graph, matvec, [*consts, *x]))[0]


_CONTROL: dict[str, Callable[[Graph, Any, list[Value]], list[Value]]] = {"cond": _cond, "custom_linear_solve": _linear_solve, "scan": _scan, "while": _while}
