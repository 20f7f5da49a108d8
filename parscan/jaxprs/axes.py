"""What every primitive does along every dimension: a table of facts, on which the analyses stand.

A primitive works *index by index* from dimension d of an operand to dimension e of its output if the output at index k along e
depends on that operand at index k along d alone. It does so *evenly* if, besides, it is the same function at every k: the batch of a
product, the rows of a sum over the columns. Reversal along d is neither; an update of the first row alone, seen from what is updated, is
index by index, but not even. A primitive without a rule is taken to do neither anywhere, which is right, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Place = dict[int, int]


class Axes(NamedTuple):
    """The facts about one equation; the dimensions are those of every output that has them.

    places: for each operand, the dimensions from which it works index by index, and the output's dimensions that they become.
    copied: the output's dimensions along which it holds copies. uneven: those along which it works index by index, but not evenly.
    """

    places: list[Place]
    copied: frozenset[int] = frozenset()
    uneven: frozenset[int] = frozenset()


def axes(eqn: Any) -> Axes:
    """What this equation does along each dimension."""
    return _RULES.get(eqn.primitive.name, _unknown)(eqn)


def has_rule(eqn: Any) -> bool:
    """Whether its primitive is in the table."""
    return eqn.primitive.name in _RULES


def _unknown(eqn: Any) -> Axes:
    return Axes([{} for _ in eqn.invars])


def _keeping(eqn: Any, kept: Callable[[int], bool]) -> Axes:
    """All operands and outputs have the same dimensions, of which these are worked on index by index."""
    return Axes([{d: d for d in range(len(a.aval.shape)) if kept(d)} for a in eqn.invars])


def _removing(eqn: Any, removed: Iterable[int]) -> Axes:
    gone = frozenset(removed)
    return Axes([{d: d - sum(r < d for r in gone) for d in range(len(a.aval.shape)) if d not in gone} for a in eqn.invars])


def _leading(core_rank: int) -> Callable[[Any], Axes]:
    """One problem for each index along the leading dimensions; the first operand's problem has so many dimensions."""

    def rule(eqn: Any) -> Axes:
        batch = len(eqn.invars[0].aval.shape) - core_rank
        return _keeping(eqn, lambda d: d < batch)

    return rule


# --- entry by entry ---------------------------------------------------------------------------------------------------

ELEMENTWISE = (
    "add sub mul div neg max min rem pow integer_pow square sqrt rsqrt cbrt exp exp2 log log2 log1p expm1 sin cos tan tanh sinh cosh asin acos "
    "atan atan2 asinh acosh atanh logistic abs sign floor ceil round erf erfc erf_inv lgamma digamma polygamma zeta igamma igammac igamma_grad_a "
    "random_gamma_grad bessel_i0e bessel_i1e regularized_incomplete_beta select_n clamp copy copy_p real imag conj complex convert_element_type "
    "reduce_precision mulhi add_any stop_gradient is_finite nextafter eq ne lt le gt ge and or xor not shift_left shift_right_logical "
    "shift_right_arithmetic population_count clz one_minus_square sharding_constraint"
).split()


def _elementwise(eqn: Any) -> Axes:
    rank = len(eqn.outvars[0].aval.shape)
    # A scalar operand beside a larger one is broadcast: it has no dimensions.
    return Axes([{d: d for d in range(rank)} if len(a.aval.shape) == rank else {} for a in eqn.invars])


def _bitcast(eqn: Any) -> Axes:
    both = min(len(eqn.invars[0].aval.shape), len(eqn.outvars[0].aval.shape))  # the bytes of an entry are a last dimension of one of them
    return Axes([{d: d for d in range(both)}])


# --- moving entries ---------------------------------------------------------------------------------------------------


def _iota(eqn: Any) -> Axes:
    return Axes([{} for _ in eqn.invars], copied=frozenset(range(len(eqn.outvars[0].aval.shape))) - {eqn.params["dimension"]})


def _broadcast_in_dim(eqn: Any) -> Axes:
    dims, before, after = eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape, eqn.params["shape"]
    place = {d: e for d, e in enumerate(dims) if before[d] == after[e]}
    return Axes([place, *({} for _ in eqn.invars[1:])], copied=frozenset(range(len(after))) - set(place.values()))


def _reshape(eqn: Any) -> Axes:
    if eqn.params.get("dimensions") is not None:
        return _unknown(eqn)
    return Axes([_kept_by_reshape(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)])


def _kept_by_reshape(before: tuple[int, ...], after: tuple[int, ...]) -> Place:
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


def _transpose(eqn: Any) -> Axes:
    return Axes([{d: i for i, d in enumerate(eqn.params["permutation"])}])


def _squeeze(eqn: Any) -> Axes:
    return _removing(eqn, eqn.params["dimensions"])


def _but(parameter: str) -> Callable[[Any], Axes]:
    """All dimensions but the one, or those, that this parameter names."""

    def rule(eqn: Any) -> Axes:
        named = eqn.params[parameter]
        return _keeping(eqn, lambda d: d not in (named if isinstance(named, (tuple, list)) else (named,)))

    return rule


def _whole(eqn: Any) -> Axes:
    """slice, dynamic_slice: a dimension that is taken whole keeps its indices."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return Axes([{d: d for d in range(len(before)) if before[d] == after[d]}, *({} for _ in eqn.invars[1:])])


def _dynamic_update_slice(eqn: Any) -> Axes:
    """What is updated stays where it is; of the update, dimensions of full size keep their indices."""
    operand, update = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    whole = {d: d for d in range(len(operand)) if operand[d] == update[d]}
    uneven = frozenset(range(len(operand))) - set(whole)
    return Axes([{d: d for d in range(len(operand))}, whole, *({} for _ in eqn.invars[2:])], uneven=uneven)


def _stack(eqn: Any) -> Axes:
    axis = eqn.params["axis"]
    return Axes([{d: d + (d >= axis) for d in range(len(a.aval.shape))} for a in eqn.invars])


def _unstack(eqn: Any) -> Axes:
    return _removing(eqn, (eqn.params["axis"],))


def _tile(eqn: Any) -> Axes:
    return _keeping(eqn, lambda d: eqn.params["reps"][d] == 1)


def _pad(eqn: Any) -> Axes:
    return _keeping(eqn, lambda d: tuple(eqn.params["padding_config"][d]) == (0, 0, 0))


def _gather(eqn: Any) -> Axes:
    """Batching dimensions, dimensions taken whole, and those of the indices keep their indices."""
    numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    windows = [d for d in range(len(shape)) if d not in numbers.collapsed_slice_dims and d not in batching]
    place = {d: o for d, o in zip(windows, numbers.offset_dims, strict=True) if sizes[d] == shape[d]}
    outer = [d for d in range(len(eqn.outvars[0].aval.shape)) if d not in numbers.offset_dims]  # dimensions of the indices, the last left out
    for d, s in zip(batching, getattr(numbers, "start_indices_batching_dims", ()), strict=True):
        place[d] = outer[s]
    return Axes([place, dict(enumerate(outer))])


def _scatter(eqn: Any) -> Axes:
    """What is updated stays where it is; of the updates, batching dimensions and windows of full size keep their indices."""
    numbers, operand, updates = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    windows = [d for d in range(len(operand)) if d not in numbers.inserted_window_dims and d not in batching]
    place = {u: d for d, u in zip(windows, numbers.update_window_dims, strict=True) if updates[u] == operand[d]}
    outer = [u for u in range(len(updates)) if u not in numbers.update_window_dims]
    indices: Place = dict(zip(getattr(numbers, "scatter_indices_batching_dims", ()), batching, strict=True))
    place |= {outer[s]: d for s, d in indices.items()}
    uneven = frozenset(range(len(operand))) - set(place.values())
    return Axes([{d: d for d in range(len(operand))}, indices, place], uneven=uneven)


# --- sums -------------------------------------------------------------------------------------------------------------


def _reduce(eqn: Any) -> Axes:
    return _removing(eqn, eqn.params["axes"])


def _dot_general(eqn: Any) -> Axes:
    contract, batch = eqn.params["dimension_numbers"]
    places: list[Place] = []
    offset = len(batch[0])
    for side in (0, 1):
        free = [d for d in range(len(eqn.invars[side].aval.shape)) if d not in contract[side] and d not in batch[side]]
        places.append({d: i for i, d in enumerate(batch[side])} | {d: offset + i for i, d in enumerate(free)})
        offset += len(free)
    return Axes(places)


def _window(eqn: Any) -> Axes:
    """Windows of size 1 that touch every entry once leave a dimension alone."""
    params, ones = eqn.params, (1,) * len(eqn.outvars[0].aval.shape)
    strides, base, window = (params.get(k) or ones for k in ("window_strides", "base_dilation", "window_dilation"))
    sizes, padding = params["window_dimensions"], params["padding"]
    return _keeping(eqn, lambda d: sizes[d] == strides[d] == base[d] == window[d] == 1 and tuple(padding[d]) == (0, 0))


def _conv(eqn: Any) -> Axes:
    """The batch; spatial dimensions that the window has no extent in; the features, where each is an image of its own."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    lhs, rhs = numbers.lhs_spec, numbers.rhs_spec
    if params["batch_group_count"] != 1:
        return _unknown(eqn)
    image: Place = {lhs[0]: numbers.out_spec[0]}
    kernel: Place = {}
    for i, (a, b, out) in enumerate(zip(lhs[2:], rhs[2:], numbers.out_spec[2:], strict=True)):
        window = (eqn.invars[1].aval.shape[b], params["window_strides"][i], params["lhs_dilation"][i], *params["padding"][i])
        if window == (1, 1, 1, 0, 0):
            image[a] = out
    groups, features = params["feature_group_count"], (eqn.invars[0].aval.shape[lhs[1]], eqn.invars[1].aval.shape[rhs[0]])
    if groups == 1:
        kernel = {rhs[0]: numbers.out_spec[1]}
    elif features == (groups, groups):
        image[lhs[1]] = kernel[rhs[0]] = numbers.out_spec[1]
    return Axes([image, kernel])


# --- linear algebra ---------------------------------------------------------------------------------------------------


def _fft(eqn: Any) -> Axes:
    return _leading(len(eqn.params["fft_lengths"]))(eqn)


def _triangular_solve(eqn: Any) -> Axes:
    """A X = B column by column; X A = B row by row."""
    rank = len(eqn.invars[1].aval.shape)
    batch = {d: d for d in range(rank - 2)}
    apart = rank - 1 if eqn.params["left_side"] else rank - 2
    return Axes([batch, {**batch, apart: apart}])


def _tridiagonal_solve(eqn: Any) -> Axes:
    """Three diagonals, then a right-hand side, column by column."""
    rank = len(eqn.invars[3].aval.shape)
    batch = {d: d for d in range(rank - 2)}
    return Axes([batch, batch, batch, {**batch, rank - 1: rank - 1}])


_VECTORS = "lu_pivots_to_permutation".split()
_MATRICES = "cholesky lu eig eigh svd qr geqrf geqp3 householder_product schur hessenberg tridiagonal".split()

_RULES: dict[str, Callable[[Any], Axes]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(_VECTORS, _leading(1)),
    **dict.fromkeys(_MATRICES, _leading(2)),
    **dict.fromkeys("reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or reduce_xor argmax argmin".split(), _reduce),
    **dict.fromkeys("reduce_window_sum reduce_window_max reduce_window_min select_and_gather_add select_and_scatter_add".split(), _window),
    **dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp split top_k".split(), _but("axis")),
    **dict.fromkeys("scatter scatter-add scatter_add scatter-sub scatter_sub scatter-mul scatter_mul scatter-min scatter-max".split(), _scatter),
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _but("dimension"),
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    "dynamic_slice": _whole,
    "dynamic_update_slice": _dynamic_update_slice,
    "fft": _fft,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _but("dimensions"),
    "slice": _whole,
    "sort": _but("dimension"),
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "triangular_solve": _triangular_solve,
    "tridiagonal_solve": _tridiagonal_solve,
    "unstack": _unstack,
}
