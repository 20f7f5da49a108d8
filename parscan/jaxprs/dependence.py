"""Which axes of a linear program never mix, proved equation by equation.

The program is the *derivative* of a step, linear in some of its inputs (the tangent leaves); everything else, array constants
included, is an unknown value. For every variable we keep, for every tangent leaf that it depends on, where each axis of that
leaf went:

    {leaf: (d_0, d_1, …)}    axis a of the leaf is dimension d_a of the variable: an entry at index k along that
                             dimension depends only on entries at index k along that axis. `MIXED` if that cannot be said.

A leaf that is missing is not depended on. The cost is the number of equations, whatever the shapes. A primitive
without a rule mixes everything, which is right, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend import core

from parscan.jaxprs.program import AnyJaxpr, open_jaxpr, sub_jaxprs

MIXED = None
Dependence = dict[int, tuple[int | None, ...]]
Rule = Callable[[Any, list[Dependence]], list[Dependence]]


def dependence(jaxpr: AnyJaxpr, tangents: Sequence[int]) -> list[Dependence]:
    """What each output of a linear program depends on.

    Args:
        jaxpr: closed jaxpr, linear in the inputs numbered `tangents`.
        tangents: positions of the tangent leaves among the inputs; leaf i of the result is `tangents[i]`.
    """
    inputs: list[Dependence] = [{} for _ in open_jaxpr(jaxpr).invars]
    for leaf, position in enumerate(tangents):
        inputs[position] = {leaf: tuple(range(len(open_jaxpr(jaxpr).invars[position].aval.shape)))}
    return _evaluate(jaxpr, inputs)


def _evaluate(jaxpr: AnyJaxpr, inputs: Sequence[Dependence]) -> list[Dependence]:
    body = open_jaxpr(jaxpr)
    known: dict[Any, Dependence] = dict(zip(body.invars, inputs, strict=True))

    def read(atom):
        return {} if isinstance(atom, core.Literal) else known.get(atom, {})

    for eqn in body.eqns:
        ins = [read(a) for a in eqn.invars]
        outs = axis_rule(eqn)(eqn, ins) if any(ins) else [{} for _ in eqn.outvars]
        known.update((v, out if 0 not in getattr(v.aval, "shape", ()) else {}) for v, out in zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in body.outvars]


def _join(values: Iterable[Dependence]) -> Dependence:
    """The dependence of a sum."""
    joined: Dependence = {}
    for value in values:
        for leaf, dims in value.items():
            before = joined.get(leaf, dims)
            joined[leaf] = tuple(a if a == b else MIXED for a, b in zip(before, dims, strict=True))
    return joined


def _moved(value: Dependence, move: Callable[[int], int | None]) -> Dependence:
    """The dependence after every dimension d became `move(d)`."""
    return {leaf: tuple(MIXED if d is None else move(d) for d in dims) for leaf, dims in value.items()}


def _mixed(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    out = _moved(_join(ins), lambda d: MIXED)
    return [out for _ in eqn.outvars]


def _keeping(eqn: Any, ins: list[Dependence], kept: Callable[[int], bool]) -> list[Dependence]:
    out = _moved(_join(ins), lambda d: d if kept(d) else MIXED)
    return [out for _ in eqn.outvars]


def axis_rule(eqn: Any) -> Rule:
    """What turns the dependences of an equation's inputs into those of its outputs."""
    name = eqn.primitive.name
    if name in ELEMENTWISE:
        return _elementwise
    if name in _RULES:
        return _RULES[name]
    if inlined(eqn) is not None:
        return _call
    return _mixed


# --- rules -----------------------------------------------------------------------------------------------------------

ELEMENTWISE = frozenset(
    "add sub mul div neg max min rem pow integer_pow square sqrt rsqrt cbrt exp exp2 log log1p expm1 sin cos tan tanh sinh cosh asin acos "
    "atan atan2 asinh acosh atanh logistic abs sign floor ceil round erf erfc erf_inv lgamma digamma select_n clamp copy copy_p real imag "
    "conj complex convert_element_type reduce_precision add_any stop_gradient is_finite nextafter eq ne lt le gt ge and or not xor "
    "one_minus_square".split()
)


def _elementwise(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    rank = len(eqn.outvars[0].aval.shape)
    # A scalar operand beside a larger one is broadcast; it has no dimensions that could be kept.
    return [_join(v if len(a.aval.shape) == rank else _moved(v, lambda d: MIXED) for a, v in zip(eqn.invars, ins, strict=True))]


def _per_operand(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    return list(ins)


def _broadcast_in_dim(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    dims, before, after = eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape, eqn.params["shape"]
    return [_moved(ins[0], lambda d: dims[d] if before[d] == after[dims[d]] else MIXED)]


def _reshape(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    if eqn.params.get("dimensions") is not None:
        return _mixed(eqn, ins)
    kept = _kept_by_reshape(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)
    return [_moved(ins[0], kept.get)]


def _kept_by_reshape(before: tuple[int, ...], after: tuple[int, ...]) -> dict[int, int]:
    """Dimensions whose size and stride a reshape leaves alone."""

    def strides(shape):
        out, total = [], 1
        for size in reversed(shape):
            out.append(total)
            total *= size
        return out[::-1]

    found = {(size, stride): d for d, (size, stride) in enumerate(zip(after, strides(after), strict=True)) if size != 1}
    pairs = {d: found.get((size, stride)) for d, (size, stride) in enumerate(zip(before, strides(before), strict=True)) if size != 1}
    return {d: e for d, e in pairs.items() if e is not None} if 0 not in before else {}


def _transpose(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    place = {d: i for i, d in enumerate(eqn.params["permutation"])}
    return [_moved(ins[0], place.__getitem__)]


def _without(removed: Iterable[int]) -> Callable[[int], int | None]:
    gone = frozenset(removed)
    return lambda d: MIXED if d in gone else d - sum(r < d for r in gone)


def _squeeze(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    return [_moved(ins[0], _without(eqn.params["dimensions"]))]


def _reduce(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    out = _moved(_join(ins), _without(eqn.params["axes"]))
    return [out for _ in eqn.outvars]


def _dot_general(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    contract, batch = eqn.params["dimension_numbers"]
    places: list[dict[int, int]] = []
    offset = len(batch[0])
    for side in (0, 1):
        free = [d for d in range(len(eqn.invars[side].aval.shape)) if d not in contract[side] and d not in batch[side]]
        places.append({d: i for i, d in enumerate(batch[side])} | {d: offset + i for i, d in enumerate(free)})
        offset += len(free)
    return [_join(_moved(value, place.get) for value, place in zip(ins, places, strict=True))]


def _concatenate(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    return _keeping(eqn, ins, lambda d: d != eqn.params["dimension"])


def _same_size(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    """slice, dynamic_slice: a dimension that is taken whole keeps its indices."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if any(ins[1:]):
        return _mixed(eqn, ins)
    return _keeping(eqn, ins, lambda d: before[d] == after[d])


def _dynamic_update_slice(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    operand, update = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    if any(ins[2:]):
        return _mixed(eqn, ins)
    return _keeping(eqn, ins, lambda d: operand[d] == update[d])


def _split(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    return _keeping(eqn, ins, lambda d: d != eqn.params["axis"])


def _stack(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    axis = eqn.params["axis"]
    return [_moved(_join(ins), lambda d: d + (d >= axis))]


def _unstack(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    out = _moved(ins[0], _without((eqn.params["axis"],)))
    return [out for _ in eqn.outvars]


def _tile(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    return _keeping(eqn, ins, lambda d: eqn.params["reps"][d] == 1)


def _pad(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    return _keeping(eqn, ins, lambda d: tuple(eqn.params["padding_config"][d]) == (0, 0, 0))


def _rev(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    return _keeping(eqn, ins, lambda d: d not in eqn.params["dimensions"])


def _along_axis(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    return _keeping(eqn, ins, lambda d: d != eqn.params["axis"])


def _sort(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    return _keeping(eqn, ins, lambda d: d != eqn.params["dimension"])


def _gather(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    """Batching dimensions, and dimensions taken whole, keep their indices."""
    numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    if ins[1]:
        return _mixed(eqn, ins)
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    windows = [d for d in range(len(shape)) if d not in numbers.collapsed_slice_dims and d not in batching]
    place: dict[int, int] = {d: o for d, o in zip(windows, numbers.offset_dims, strict=True) if sizes[d] == shape[d]}
    rank = len(eqn.outvars[0].aval.shape)
    outer = [d for d in range(rank) if d not in numbers.offset_dims]  # dimensions of the indices, the last left out
    for d, s in zip(batching, getattr(numbers, "start_indices_batching_dims", ()), strict=True):
        place[d] = outer[s]
    return [_moved(ins[0], place.get)]


def _scatter(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    """What is updated stays where it is; of the updates, batching dimensions and windows of full size keep their indices."""
    numbers, operand, updates = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
    if ins[1]:
        return _mixed(eqn, ins)
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    windows = [d for d in range(len(operand)) if d not in numbers.inserted_window_dims and d not in batching]
    place: dict[int, int] = {u: d for d, u in zip(windows, numbers.update_window_dims, strict=True) if updates[u] == operand[d]}
    outer = [u for u in range(len(updates)) if u not in numbers.update_window_dims]
    for d, s in zip(batching, getattr(numbers, "scatter_indices_batching_dims", ()), strict=True):
        place[outer[s]] = d
    return [_join([ins[0], _moved(ins[2], place.get)])]


def _reduce_window(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    params, rank = eqn.params, len(eqn.outvars[0].aval.shape)
    ones = (1,) * rank

    def untouched(d):
        strides, base, window = (params.get(k) or ones for k in ("window_strides", "base_dilation", "window_dilation"))
        return params["window_dimensions"][d] == strides[d] == base[d] == window[d] == 1 and tuple(params["padding"][d]) == (0, 0)

    return _keeping(eqn, ins, untouched)


def _conv(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    numbers = eqn.params["dimension_numbers"]
    if ins[1] or eqn.params["batch_group_count"] != 1:
        return _mixed(eqn, ins)
    return [_moved(ins[0], lambda d: numbers.out_spec[0] if d == numbers.lhs_spec[0] else MIXED)]


def _fft(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    return _keeping(eqn, ins, lambda d: d < len(eqn.outvars[0].aval.shape) - len(eqn.params["fft_lengths"]))


def _factorisation(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    """Of matrices, which are the last two dimensions."""
    return _keeping(eqn, ins, lambda d: d < len(eqn.invars[0].aval.shape) - 2)


def _triangular_solve(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    """Every matrix apart, and of the right-hand side every column; every row, if the unknown stands on the left."""
    rank = len(eqn.outvars[0].aval.shape)
    apart = rank - 1 if eqn.params["left_side"] else rank - 2
    return [_join([_moved(ins[0], lambda d: d if d < rank - 2 else MIXED), _moved(ins[1], lambda d: d if d < rank - 2 or d == apart else MIXED)])]


# --- control flow ----------------------------------------------------------------------------------------------------


def inlined(eqn: Any) -> AnyJaxpr | None:
    """The body of a call (jit, remat, custom_jvp, …): one sub-jaxpr with the equation's own inputs and outputs."""
    inner = list(sub_jaxprs(list(eqn.params.values())))
    if len(inner) != 1 or eqn.primitive.name in ("scan", "while", "cond"):
        return None
    body = open_jaxpr(inner[0])
    same = len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars)
    return inner[0] if same and all(a.aval.shape == b.aval.shape for a, b in zip(body.invars, eqn.invars, strict=True)) else None


def _call(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    return _evaluate(inlined(eqn), ins)


def _cond(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    if ins[0]:
        return _mixed(eqn, ins)
    branches = [_evaluate(branch, ins[1:]) for branch in eqn.params["branches"]]
    return [_join(outs) for outs in zip(*branches, strict=True)]


def _fixed_point(carry: list[Dependence], body: Callable[[list[Dependence]], list[Dependence]]) -> list[Dependence]:
    """The smallest carry that holds for every trip: joins only grow, so this ends."""
    while True:
        after = [_join([a, b]) for a, b in zip(carry, body(carry), strict=True)]
        if after == carry:
            return carry
        carry = after


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Numbers of consts and carries: two parameters up to jax 0.11, the groups of `ft_in` from 0.12 on."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def _scan(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    num_consts, num_carry = scan_counts(eqn.params)
    consts, carry = ins[:num_consts], ins[num_consts : num_consts + num_carry]
    xs = [_moved(x, _without((0,))) for x in ins[num_consts + num_carry :]]

    def body(carry):
        return _evaluate(eqn.params["jaxpr"], [*consts, *carry, *xs])

    carry = _fixed_point(list(carry), lambda c: body(c)[:num_carry])
    ys = [_moved(y, lambda d: d + 1) for y in body(carry)[num_carry:]]
    return [*carry, *ys]


def _while(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = ins[num_cond : num_cond + num_body], ins[num_cond + num_body :]
    carry = _fixed_point(list(carry), lambda c: _evaluate(eqn.params["body_jaxpr"], [*consts, *c]))
    if any(_evaluate(eqn.params["cond_jaxpr"], [*ins[:num_cond], *carry])):
        return _mixed(eqn, ins)
    return carry


def _linear_solve(eqn: Any, ins: list[Dependence]) -> list[Dependence]:
    """x with A x = b: a polynomial in A applied to b, so what b and A both keep, x keeps."""
    lengths, matvec = eqn.params["const_lengths"], eqn.params["jaxprs"].matvec
    consts = ins[: lengths.matvec]
    rhs = ins[sum(lengths) :]
    if any(ins[: sum(lengths)]) or len(rhs) != len(eqn.outvars):  # auxiliary outputs
        return _mixed(eqn, ins)
    return _fixed_point(list(rhs), lambda x: _evaluate(matvec, [*consts, *x]))


_RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "cholesky": _factorisation,
    "concatenate": _concatenate,
    "cond": _cond,
    "conv_general_dilated": _conv,
    "cumlogsumexp": _along_axis,
    "cummax": _along_axis,
    "cummin": _along_axis,
    "cumprod": _along_axis,
    "cumsum": _along_axis,
    "custom_linear_solve": _linear_solve,
    "dot_general": _dot_general,
    "dynamic_slice": _same_size,
    "dynamic_update_slice": _dynamic_update_slice,
    "eigh": _factorisation,
    "fft": _fft,
    "gather": _gather,
    "lu": _factorisation,
    "optimization_barrier": _per_operand,
    "pad": _pad,
    "qr": _factorisation,
    "reduce_and": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "reduce_or": _reduce,
    "reduce_prod": _reduce,
    "reduce_sum": _reduce,
    "reduce_window_max": _reduce_window,
    "reduce_window_min": _reduce_window,
    "reduce_window_sum": _reduce_window,
    "reshape": _reshape,
    "rev": _rev,
    "scan": _scan,
    "scatter": _scatter,
    "scatter-add": _scatter,
    "scatter-max": _scatter,
    "scatter-min": _scatter,
    "scatter-mul": _scatter,
    "scatter-sub": _scatter,
    "scatter_add": _scatter,
    "scatter_sub": _scatter,
    "slice": _same_size,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "svd": _factorisation,
    "tile": _tile,
    "transpose": _transpose,
    "triangular_solve": _triangular_solve,
    "unstack": _unstack,
    "while": _while,
}
