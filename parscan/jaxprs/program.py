"""A user's step, traced once and from then on a value: flat, without closures, equal to any other with the same equations."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

AnyJaxpr = Any  # a ClosedJaxpr or a Jaxpr: one class in jax 0.12, two before


def open_jaxpr(jaxpr: AnyJaxpr) -> Any:
    """The equations of a jaxpr, closed or not."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def sub_jaxprs(value: Any) -> Iterator[AnyJaxpr]:
    """The jaxprs inside an equation's parameters."""
    if hasattr(open_jaxpr(value), "eqns"):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from sub_jaxprs(item)
    elif isinstance(value, dict):
        yield from sub_jaxprs(list(value.values()))


def equations(jaxpr: AnyJaxpr) -> Iterator[Any]:
    """Every equation, those of sub-jaxprs included."""
    for eqn in open_jaxpr(jaxpr).eqns:
        yield eqn
        for inner in sub_jaxprs(list(eqn.params.values())):
            yield from equations(inner)


class Program:
    """One step of a recurrence as a pure function of flat lists: `(consts, carry, x) -> (carry, y)`.

    Two programs are equal if their equations are, whatever function they were traced from: that is the key under which
    plans and compiled code are cached.
    """

    def __init__(self, closed: AnyJaxpr, num_consts: int, num_carry: int):
        jaxpr = open_jaxpr(closed)
        self.jaxpr = core.ClosedJaxpr(jaxpr.replace(constvars=(), invars=[*jaxpr.constvars, *jaxpr.invars]), ())
        self.num_consts, self.num_carry = num_consts, num_carry
        self._key = (num_consts, num_carry, _fingerprint(self.jaxpr))
        self._hash = hash(self._key)

    def __call__(self, consts: Sequence[Any], carry: Sequence[Any], x: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        outs = core.jaxpr_as_fun(self.jaxpr)(*consts, *carry, *x)
        return list(outs[: self.num_carry]), list(outs[self.num_carry :])

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._key == other._key

    @property
    def avals(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Abstract values of consts, carry and x."""
        avals, c, h = [v.aval for v in open_jaxpr(self.jaxpr).invars], self.num_consts, self.num_carry
        return avals[:c], avals[c : c + h], avals[c + h :]

    @property
    def out_avals(self) -> tuple[list[Any], list[Any]]:
        """Abstract values of the new carry and of y."""
        avals = [v.aval for v in open_jaxpr(self.jaxpr).outvars]
        return avals[: self.num_carry], avals[self.num_carry :]

    @property
    def forwarded(self) -> tuple[int | None, ...]:
        """For each leaf of y, the leaf of the new carry that it is, if it is one: those need not be stacked twice."""
        outvars = open_jaxpr(self.jaxpr).outvars
        carry = {var: i for i, var in reversed(list(enumerate(outvars[: self.num_carry]))) if isinstance(var, core.Var)}
        return tuple(carry.get(var) if isinstance(var, core.Var) else None for var in outvars[self.num_carry :])

    @property
    def recomputes(self) -> bool:
        """Whether a `jax.checkpoint` is in it."""
        return any(eqn.primitive.name in ("remat", "remat2", "checkpoint") for eqn in equations(self.jaxpr))

    @property
    def has_branches(self) -> bool:
        """Whether a `cond` is in it, which becomes a select of all branches when steps are batched."""
        return any(eqn.primitive.name == "cond" for eqn in equations(self.jaxpr))


class Flat(NamedTuple):
    """A pytree taken apart: arrays, tracers or `ShapeDtypeStruct`s, and how to put them together."""

    leaves: list[Any]
    tree: Any

    @classmethod
    def of(cls, tree: Any) -> Flat:
        return cls(*jax.tree.flatten(tree))


def trace(f: Callable, consts: Flat, carry: Flat, x: Flat) -> tuple[Program, list[Any], Any]:
    """Traces `f(consts, carry, x)` once. Containers of the user's are built of tracers only, as by `lax.scan`.

    Returns:
        the program; its constants: the values that f closes over, then the leaves of `consts`; and the structure of its output.
    """
    found = []

    def flat(*groups):
        out = f(*(jax.tree.unflatten(given.tree, leaves) for given, leaves in zip((consts, carry, x), groups, strict=True)))
        leaves, tree = jax.tree.flatten(out)
        found.append(tree)
        return leaves

    closed = jax.make_jaxpr(flat)(consts.leaves, carry.leaves, x.leaves)
    values = [*closed.consts, *consts.leaves]
    return Program(closed, len(values), len(carry.leaves)), values, found[-1]


def part(body: Any, invars: Sequence[Any], eqns: Sequence[Any], outvars: Sequence[Any]) -> Callable[..., list[Any]]:
    """Some equations of a jaxpr as a function from values of `invars` to values of `outvars`."""
    no_names = body.debug_info._replace(arg_names=None, result_paths=None)  # their number no longer fits
    cut = body.replace(constvars=(), invars=list(invars), outvars=list(outvars), eqns=list(eqns), debug_info=no_names)
    return core.jaxpr_as_fun(core.ClosedJaxpr(cut, ()))


def jit_unless_staged(f: Callable) -> Callable:
    """f compiled, its first argument being static; f itself while a `jit` or a loop is being traced, where another would add nothing."""
    compiled = jax.jit(f, static_argnums=0)
    return lambda *args: (f if core.unsafe_am_i_under_a_jit_DO_NOT_USE() else compiled)(*args)


def slice_spec(leaf: Any) -> jax.ShapeDtypeStruct:
    """The abstract value of one step of a stacked leaf."""
    return jax.ShapeDtypeStruct(np.shape(leaf)[1:], leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.result_type(leaf))


def _fingerprint(jaxpr: AnyJaxpr) -> Hashable:
    """Equations with variables numbered by appearance; what cannot be compared by value is compared by identity."""
    numbers: dict[Any, int] = {}

    def number(var):
        return numbers.setdefault(var, len(numbers))

    def atom(a):
        if isinstance(a, core.Literal):
            value = np.asarray(a.val)
            return (a.aval, value.tobytes()) if value.dtype != object else (a.aval, id(a.val))
        return number(a)

    def param(value, name=None):
        if name == "jvp_jaxpr_fun":
            return _rule(value)
        if hasattr(open_jaxpr(value), "eqns"):
            return (_fingerprint(value), tuple(map(_constant, getattr(value, "consts", ()))))
        if isinstance(value, (tuple, list)):
            return (type(value).__name__, *map(param, value))
        if isinstance(value, dict):
            return tuple(sorted((str(k), param(v)) for k, v in value.items()))
        if isinstance(value, np.ndarray):
            return _constant(value)
        try:
            hash(value)
        except TypeError:
            return _ById(value)
        return value

    body = open_jaxpr(jaxpr)
    heads = tuple((number(v), v.aval) for v in (*body.constvars, *body.invars))
    eqns = tuple(
        (e.primitive, tuple((k, param(v, k)) for k, v in sorted(e.params.items())), tuple(map(atom, e.invars)), tuple((number(v), v.aval) for v in e.outvars))
        for e in body.eqns
    )
    return heads, eqns, tuple(map(atom, body.outvars))


def _rule(wrapped: Any) -> Hashable:
    """The user's `custom_jvp` rule and the structure of its arguments. JAX wraps it anew in every trace, in closures of its own.

    Where a release keeps it elsewhere, and where arguments are bound to it (`nondiff_argnums`), the wrapper itself: equal to no other.
    """

    def closed_over(f):
        return [cell.cell_contents for cell in getattr(f, "__closure__", None) or ()]

    inside = [value for thunk in closed_over(getattr(wrapped, "f", None)) for value in closed_over(thunk)]
    found = [value for value in inside if hasattr(value, "transforms")]
    if len(found) != 1 or len(found[0].transforms) != 1:
        return wrapped
    ((_, flattening),) = found[0].transforms
    return (found[0].f, *(value for value in flattening if not callable(value)))


def _constant(value: Any) -> Hashable:
    if isinstance(value, np.ndarray) and value.dtype != object:
        return (value.dtype, value.shape, value.tobytes())
    return _ById(value)


class _ById:
    """Equal to itself alone; keeps its value alive, so that the identity is never reused."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.value is other.value
