"""Two factorisations of a linear program, found by looking at its equations: a bottleneck, and one matrix an axis.

The program is the *derivative* of a step, linear in some of its inputs (the tangents); everything else, array constants included, is an
unknown value. Calls are written out first, and every equation that a tangent reaches must be of a kind known to be linear; where one is
not (control flow, a primitive missing from the table below), nothing is found, which is right, only slower.

A *bottleneck* is a set of variables through which all goes but an elementwise part, as v = W₁ t in t + W₂ v. Since F(t, v), the program with
v as a further input, is linear in both together, F(t, v) = F(t, 0) + F(0, v) whatever v is: the two parts are the program itself, run on zeros.

A *separable* program acts on every axis of an array by a matrix of its own, as A T B, and on the result elementwise at most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from parscan.checks import is_inexact
from parscan.jaxprs.dependence import dependence
from parscan.jaxprs.program import AnyJaxpr, open_jaxpr, part, sub_jaxprs

# --- linear programs -------------------------------------------------------------------------------------------------

_CALLS = frozenset("jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call".split())
_PRODUCTS = frozenset("mul dot_general conv_general_dilated".split())  # linear in each operand, not in two together
_LINEAR = {  # linear in these operands together, the others being fixed
    **dict.fromkeys("add add_any sub concatenate stack".split(), slice(None)),
    **dict.fromkeys("pad dynamic_update_slice".split(), slice(0, 2)),
    **dict.fromkeys("scatter scatter-add scatter_add scatter_sub".split(), slice(0, 3, 2)),
    **dict.fromkeys(
        "neg div convert_element_type reduce_precision copy copy_p name broadcast_in_dim reshape transpose squeeze slice dynamic_slice gather rev tile "
        "split unstack reduce_sum cumsum reduce_window_sum".split(),
        slice(0, 1),
    ),
    "select_n": slice(1, None),
}


@dataclass(frozen=True, eq=False)
class _Linear:
    """A linear program, calls written out, in two parts: `fixed` equations, which no tangent reaches, and `linear` ones."""

    body: Any
    consts: Sequence[Any]
    tangents: list[Any]
    fixed: list[Any]
    linear: list[Any]

    @functools.cached_property
    def others(self) -> list[Any]:
        """The inputs that are no tangents."""
        return [v for v in self.body.invars if v not in self.tangents]

    @functools.cached_property
    def moving(self) -> set[Any]:
        """The variables that depend on the tangents."""
        return {*self.tangents, *(v for eqn in self.linear for v in eqn.outvars)}

    def values(self, others: Sequence[Any]) -> dict[Any, Any]:
        """What the linear equations, or the outputs, use of the rest, given the inputs that are no tangents."""
        moving = self.moving
        atoms = (*(a for eqn in self.linear for a in eqn.invars), *self.body.outvars)
        used = list(dict.fromkeys(a for a in atoms if isinstance(a, core.Var) and a not in moving))
        inputs = [*self.body.constvars, *self.others]
        return dict(zip(used, part(self.body, inputs, self.fixed, used)(*self.consts, *others), strict=True))


def _linear_program(closed: AnyJaxpr, tangents: Sequence[int]) -> _Linear | None:
    """The program in two parts; None if an equation is not known to be linear."""
    body = open_jaxpr(closed)
    reached = [i in tangents for i in range(len(body.invars))]
    flat = jax.make_jaxpr(lambda *args: [x for x, _ in _written_out(closed, list(zip(args, reached, strict=True)))])(*(v.aval for v in body.invars))
    body = _alive(open_jaxpr(flat))
    moving, zeros = {body.invars[i] for i in tangents}, set()
    fixed, linear = [], []
    for eqn in body.eqns:
        if not moving.isdisjoint(_variables(eqn.invars)):
            if not _is_linear(eqn, moving, zeros):
                return None
            linear.append(eqn)
            moving.update(eqn.outvars)
        else:
            fixed.append(eqn)
            if eqn.primitive.name in ("broadcast_in_dim", "convert_element_type", "reshape") and _is_zero(eqn.invars[0], zeros):
                zeros.update(eqn.outvars)
    return _Linear(body, flat.consts, [body.invars[i] for i in tangents], fixed, linear)


def _written_out(jaxpr: AnyJaxpr, inputs: Sequence[tuple[Any, bool]]) -> list[tuple[Any, bool]]:
    """The outputs, and whether a tangent reaches them; calls that one reaches are looked into. Others stay whole, for some have derivatives of their own."""
    body, consts = open_jaxpr(jaxpr), getattr(jaxpr, "consts", ())
    known = dict(zip((*body.constvars, *body.invars), (*((c, False) for c in consts), *inputs), strict=True))

    def read(atom):
        return (atom.val, False) if isinstance(atom, core.Literal) else known[atom]

    for eqn in body.eqns:
        operands = [read(a) for a in eqn.invars]
        reached = any(moves for _, moves in operands)
        if reached and eqn.primitive.name in _CALLS:
            (inner,) = sub_jaxprs(list(eqn.params.values()))
            outs = _written_out(inner, operands)
        else:
            outs = [(x, reached) for x in _applied(body, eqn, [x for x, _ in operands])]
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in body.outvars]


def _applied(body: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """One equation of a jaxpr, on other operands."""
    given = {a: x for a, x in zip(eqn.invars, operands, strict=True) if isinstance(a, core.Var)}
    return part(body, list(given), [eqn], eqn.outvars)(*given.values())


def _alive(body: Any) -> Any:
    """A jaxpr without the equations that no output needs."""
    needed, eqns = _variables(body.outvars), []
    for eqn in reversed(body.eqns):
        if not needed.isdisjoint(eqn.outvars):
            eqns.append(eqn)
            needed |= _variables(eqn.invars)
    return body.replace(eqns=eqns[::-1])


def _is_linear(eqn: Any, moving: set[Any], zeros: set[Any]) -> bool:
    """Whether an equation is linear in the operands that move; what is added to them must be zero."""
    moves = [not isinstance(a, core.Literal) and a in moving for a in eqn.invars]
    if not all(is_inexact(v.aval) for v in eqn.outvars):
        return False
    if eqn.primitive.name in _PRODUCTS:
        return sum(moves) == 1
    together = range(len(moves))[_LINEAR.get(eqn.primitive.name, slice(0))]
    return all(moves[i] or _is_zero(eqn.invars[i], zeros) if i in together else not moves[i] for i in range(len(moves)))


def _is_zero(atom: Any, zeros: set[Any]) -> bool:
    return bool(atom.val == 0) if isinstance(atom, core.Literal) else atom in zeros


def _variables(atoms: Iterable[Any]) -> set[Any]:
    return {a for a in atoms if isinstance(a, core.Var)}


# --- bottlenecks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cut:
    """Variables of a linear program, through which all goes but an elementwise part: program = outer ∘ inner + rest.

    avals: of the variables. inner: (all inputs of the program) -> the variables, linear in the tangents. outer: (the variables, all inputs
    that are no tangents) -> the program's outputs, linear in the variables. rest: (all inputs) -> the outputs, the variables being zero; it
    keeps every axis of every tangent, perhaps in another order, and has one leaf act on another of the same size at most.
    """

    avals: tuple[Any, ...]
    inner: core.ClosedJaxpr
    outer: core.ClosedJaxpr
    rest: core.ClosedJaxpr


def cuts(closed: AnyJaxpr, tangents: Sequence[int]) -> Iterator[Cut]:
    """The narrowest bottlenecks of a linear program: none, unless narrower than the tangents and than the outputs.

    Of all sets of variables of the same, least number of coordinates: the one nearest the tangents, whose `inner` does least, and if it is
    another, the one nearest the outputs, whose `outer` does least.

    Args:
        closed: closed jaxpr, linear in the inputs numbered `tangents`.
    """
    program = _linear_program(closed, tangents)
    if program is None:
        return
    body, moving = program.body, program.moving
    limit = min(_size(program.tangents), _size(v for v in dict.fromkeys(v for v in body.outvars if isinstance(v, core.Var)) if v in moving))
    for through in _narrowest(program):
        if not through or _size(through) >= limit:
            continue
        rest = _without(program, body.invars, through, body.outvars)
        left = zip(body.outvars, dependence(rest, tangents), strict=True)
        if all(_is_elementwise(program.tangents[leaf], dims, out) for out, depends in left for leaf, dims in depends.items()):
            inner = _without(program, body.invars, (), through)
            outer = _without(program, [*through, *program.others], [v for v in program.tangents if v not in through], body.outvars)
            yield Cut(tuple(v.aval for v in through), inner, outer, rest)


def _size(variables: Iterable[Any]) -> int:
    return sum(math.prod(v.aval.shape) for v in variables)


def _is_elementwise(before: Any, dims: Sequence[int | None], after: Any) -> bool:
    """Whether every axis that has more than one index is kept, and no other is made."""
    shape = before.aval.shape
    return math.prod(shape) == math.prod(after.aval.shape) and all(d is not None or size == 1 for d, size in zip(dims, shape, strict=True))


def _without(program: _Linear, invars: Sequence[Any], zero: Sequence[Any], outvars: Sequence[Any]) -> core.ClosedJaxpr:
    """The program from `invars`, its inputs or variables of its linear part, to `outvars`, some variables being zero: without all that is then not needed."""
    body, others = program.body, program.others

    def run(*args):
        entering = dict(zip(invars, args, strict=True))
        values = {**program.values([entering[v] for v in others]), **entering, **dict.fromkeys(zero)}  # None: zero

        def read(atom):
            if isinstance(atom, core.Literal):
                return atom.val
            return jnp.zeros(atom.aval.shape, atom.aval.dtype) if values[atom] is None else values[atom]

        for eqn in program.linear:
            moves = any(values[a] is not None for a in _variables(eqn.invars) & program.moving)
            outs = _applied(body, eqn, list(map(read, eqn.invars))) if moves else [None] * len(eqn.outvars)
            for v, out in zip(eqn.outvars, outs, strict=True):
                values.setdefault(v, out)
        return list(map(read, outvars))

    traced = jax.make_jaxpr(run)(*(v.aval for v in invars))
    return core.ClosedJaxpr(_alive(open_jaxpr(traced)), traced.consts)


Graph = dict[Any, dict[Any, float]]  # how much may flow from a node to another


def _narrowest(program: _Linear) -> list[tuple[Any, ...]]:
    """The smallest sets of variables that all mixing passes: nearest the tangents, nearest the outputs.

    A minimum cut. A node is (variable, whether what flows has been mixed on its way, whether it has passed the variable). To pass takes the
    variable's size, and only what has been mixed is led to the end.
    """
    moving = program.moving
    graph: Graph = {"start": {}, "end": {}}
    for v in moving:
        for mixed in (False, True):
            graph[v, mixed, False], graph[v, mixed, True] = {(v, mixed, True): _size([v])}, {}
    graph["start"].update({(v, False, False): math.inf for v in program.tangents})
    for eqn in program.linear:
        for operand in _variables(eqn.invars) & moving:
            for out, mixes in _mixing(program.body, eqn, operand):
                for mixed in (False, True):
                    graph[operand, mixed, True][out, mixed or mixes, False] = math.inf
    for v in _variables(program.body.outvars) & moving:
        graph[v, True, True]["end"] = math.inf
    left = _saturated(graph, "start", "end")
    backwards: Graph = {node: {} for node in left}
    for a, edges in left.items():
        for b, room in edges.items():
            backwards[b][a] = room
    reached, reaching = set(_reached(left, "start")), set(_reached(backwards, "end"))
    order = [*program.tangents, *(v for eqn in program.linear for v in eqn.outvars)]
    early = tuple(v for v in order if any((v, m, False) in reached and (v, m, True) not in reached for m in (False, True)))
    late = tuple(v for v in order if any((v, m, False) not in reaching and (v, m, True) in reaching for m in (False, True)))
    return [early] if early == late else [early, late]


def _mixing(body: Any, eqn: Any, operand: Any) -> Iterator[tuple[Any, bool]]:
    """The outputs of an equation that depend on this operand, and whether they mix it."""
    given = list(dict.fromkeys(a for a in eqn.invars if isinstance(a, core.Var)))
    alone = body.replace(constvars=(), invars=given, outvars=eqn.outvars, eqns=[eqn], debug_info=body.debug_info._replace(arg_names=None, result_paths=None))
    for out, depends in zip(eqn.outvars, dependence(alone, [given.index(operand)]), strict=True):
        for dims in depends.values():
            yield out, not _is_elementwise(operand, dims, out)


def _saturated(graph: Graph, start: Any, end: Any) -> Graph:
    """What is left of every capacity under a maximum flow, by shortest augmenting paths (Edmonds and Karp)."""
    left: Graph = {node: dict(edges) for node, edges in graph.items()}
    for a, edges in graph.items():
        for b in edges:
            left[b].setdefault(a, 0)
    while end in (came := _reached(left, start)):
        path = [end]
        while path[-1] != start:
            path.append(came[path[-1]])
        steps = list(zip(path[1:], path, strict=False))
        flow = min(left[a][b] for a, b in steps)
        for a, b in steps:
            left[a][b] -= flow
            left[b][a] += flow
    return left


def _reached(left: Graph, start: Any) -> dict[Any, Any]:
    """Every node that more can flow to, and the one before it on a shortest path."""
    came, waiting = {start: start}, [start]
    for a in waiting:
        for b, room in left[a].items():
            if room > 0 and b not in came:
                came[b] = a
                waiting.append(b)
    return came


# --- one matrix an axis ----------------------------------------------------------------------------------------------

_CASTS = frozenset("convert_element_type copy copy_p name".split())
_POINTWISE = _CASTS | frozenset("add add_any sub mul div neg select_n".split())


class _Piece(NamedTuple):
    """Equations from one variable to another: a product, a transpose, or pointwise ones, which leave a multiple of what enters."""

    eqns: list[Any]
    entering: Any
    leaving: Any


class _Factor(NamedTuple):
    """What a piece multiplies with."""

    piece: _Piece
    axes: tuple[int, ...]  # for each axis of the tangent: the dimension of what enters the piece that it became
    along: tuple[int, ...]  # the axes of the tangent that are contracted, or along which the multiplier varies


@dataclass(frozen=True, eq=False)
class Separable:
    """A linear program of one tangent and one output: output = scale · (⊗ matrices) tangent.

    axes: for each axis of the tangent, the dimension of the output that it became.
    """

    axes: tuple[int, ...]
    _program: _Linear
    _factors: tuple[_Factor, ...]

    def factors(self, *others: Any) -> tuple[list[Array | None], Array | None]:
        """A matrix (out, in) for each axis of the tangent, None for one that is left alone, and the scale, shaped like the output, or None.

        Args:
            others: the program's inputs that are no tangents, in their order.
        """
        values = self._program.values(others)
        matrices: list[Any] = [None] * len(self.axes)
        scale: Any = None
        number: Any = None
        for factor in self._factors:
            x, along = self._multiplier(factor, values), factor.along
            if factor.piece.eqns[0].primitive.name == "dot_general":
                before = matrices[along[0]]
                matrices[along[0]] = x if before is None else jnp.matmul(x, before, precision="highest")
            elif len(along) > 1:
                scale = x if scale is None else scale * x
            elif along:
                before = matrices[along[0]]
                matrices[along[0]] = jnp.diag(x) if before is None else x[:, None] * before
            else:
                number = x if number is None else number * x
        return self._finished(matrices, scale, number)

    def _multiplier(self, factor: _Factor, values: dict[Any, Any]) -> Any:
        """A matrix (out, in); or an array with the axes of the tangent, if it varies along several of them; a vector; a number."""
        (eqns, entering, leaving), axes, along = factor
        if eqns[0].primitive.name == "dot_general":
            side = eqns[0].invars.index(entering)
            x = values[eqns[0].invars[1 - side]]
            return x.T if eqns[0].params["dimension_numbers"][0][1 - side] == (0,) else x
        given = {entering: jnp.ones(entering.aval.shape, entering.aval.dtype), **values}
        x = part(self._program.body, list(given), eqns, [leaving])(*given.values())[0].transpose(axes)
        return x if len(along) > 1 else x[tuple(slice(None) if axis in along else 0 for axis in range(len(axes)))]

    def _finished(self, matrices: list[Any], scale: Any, number: Any) -> tuple[list[Array | None], Array | None]:
        """The number goes where an array is already, and the axes of the scale into the output's order."""
        out = self._program.body.outvars[0].aval
        scale = None if scale is None else scale.transpose(sorted(range(len(self.axes)), key=self.axes.__getitem__))
        first = next((axis for axis, matrix in enumerate(matrices) if matrix is not None), None)
        if number is not None and first is not None:
            matrices[first] = number * matrices[first]
        elif number is not None:
            scale = jnp.full(out.shape, number) if scale is None else number * scale
        return [None if m is None else m.astype(out.dtype) for m in matrices], None if scale is None else scale.astype(out.dtype)


def separable(closed: AnyJaxpr, tangents: Sequence[int]) -> Separable | None:
    """A matrix for each axis, if that is what a linear program of one tangent and one output is; None otherwise.

    A multiplier that varies along one axis belongs to the matrix of that axis. One that varies along several is the scale, after which
    no axis may be contracted any more.

    Args:
        closed: closed jaxpr, linear in the input numbered `tangents`.
    """
    program = _linear_program(closed, tangents) if len(tangents) == len(open_jaxpr(closed).outvars) == 1 else None
    if program is None or 0 in program.tangents[0].aval.shape:
        return None
    pieces = _chained(program)
    varying = _varying(program.fixed, {})
    axes, factors, scaled = tuple(range(len(program.tangents[0].aval.shape))), [], False
    for piece in pieces or ():
        eqn = piece.eqns[0]
        if eqn.primitive.name == "transpose":
            axes = tuple(map(eqn.params["permutation"].index, axes))
        elif eqn.primitive.name == "dot_general":
            side = eqn.invars.index(piece.entering)
            places = _places(eqn, side)
            if places is None or scaled:
                return None
            factors.append(_Factor(piece, axes, (axes.index(eqn.params["dimension_numbers"][0][side][0]),)))
            axes = tuple(places[d] for d in axes)
        elif not all(eqn.primitive.name in _CASTS for eqn in piece.eqns):
            dims = _varying(piece.eqns, {**varying, piece.entering: frozenset()})[piece.leaving]
            factors.append(_Factor(piece, axes, tuple(axis for axis, d in enumerate(axes) if d in dims)))
            scaled = scaled or len(dims) > 1
    return None if pieces is None else Separable(axes, program, tuple(factors))


def _chained(program: _Linear) -> list[_Piece] | None:
    """The linear equations one after another, all that is pointwise between two products in one piece: there multiples of what entered may be
    added to one another, as in the derivative of `tanh`. None if they are no such chain."""
    pieces, within, entering = [], [], program.tangents[0]
    multiples = {entering}
    for eqn in program.linear:
        name, moving, out = eqn.primitive.name, _variables(eqn.invars) & program.moving, eqn.outvars[0]
        if not moving <= multiples:
            return None
        if name in _POINTWISE and all(a.aval.shape == out.aval.shape for a in moving):
            within.append(eqn)
            multiples.add(out)
        elif name in ("dot_general", "transpose"):
            (leaving,) = moving
            pieces += [_Piece(within, entering, leaving)] if within else []
            pieces.append(_Piece([eqn], leaving, out))
            within, entering, multiples = [], out, {out}
        else:
            return None
    (out,) = program.body.outvars
    pieces += [_Piece(within, entering, out)] if within else []
    return pieces if not isinstance(out, core.Literal) and out in multiples else None


def _places(eqn: Any, side: int) -> dict[int, int] | None:
    """Where the dimensions of an operand are after a product with a matrix, the contracted one becoming the matrix's other. None for any other product."""
    contract, batch = eqn.params["dimension_numbers"]
    rank = len(eqn.invars[side].aval.shape)
    if batch[side] or len(contract[side]) != 1 or len(eqn.invars[1 - side].aval.shape) != 2:
        return None
    free = [d for d in range(rank) if d != contract[side][0]]
    return {contract[side][0]: 0 if side else rank - 1} | {d: i + side for i, d in enumerate(free)}


Dimensions = dict[Any, frozenset[int]]
_COMPUTED = _POINTWISE | frozenset("exp log tanh logistic sqrt rsqrt integer_pow".split())


def _varying(eqns: Sequence[Any], known: Dimensions) -> Dimensions:
    """The dimensions along which the variables of some equations may vary; of a variable that is missing, all."""
    found = dict(known)

    def read(atom):
        every = frozenset(d for d, size in enumerate(atom.aval.shape) if size > 1)
        return every if isinstance(atom, core.Literal) else found.get(atom, every)

    for eqn in eqns:
        if eqn.primitive.name == "broadcast_in_dim":
            found[eqn.outvars[0]] = frozenset(eqn.params["broadcast_dimensions"][d] for d in read(eqn.invars[0]))
        elif eqn.primitive.name in _COMPUTED:
            found[eqn.outvars[0]] = frozenset().union(*map(read, eqn.invars))
    return found
