"""A user's step, traced once and from then on a value: flat, without closures, equal to any other with the same equations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import core

from parscan.checks import dtype_of, is_inexact

MOST_KNOWN = 2**16  # entries of an array of indices that is looked at

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
    """One step of a chain as a pure function of flat lists: `(consts, carry, x) -> (new carry, y)`.

    The step of a recurrence returns a carry like the one it is given; a layer of a network may return another.

    Two programs are equal if their equations are, whatever function they were traced from: that is the key under which
    plans and compiled code are cached.

    known: by position, the values of constants at hand that tell which entries of the carry are taken or set: such indices are part of the structure.
        No other constant is looked at: it may be a weight.
    """

    def __init__(self, closed: AnyJaxpr, num_consts: int, num_carry: int, num_new: int, values: dict[int, np.ndarray] | None = None):
        jaxpr = open_jaxpr(closed)
        self.jaxpr = core.ClosedJaxpr(jaxpr.replace(constvars=(), invars=[*jaxpr.constvars, *jaxpr.invars]), ())
        self.num_consts, self.num_carry, self.num_new = num_consts, num_carry, num_new
        if values is None:
            values = {i: value for i, given in enumerate(getattr(closed, "consts", ())) if (value := _whole_numbers(given)) is not None}
        self.known = {i: values[i] for i in sorted(_indexing(self.jaxpr, values, range(num_consts, num_consts + num_carry)))}
        known = tuple((i, _constant(value)) for i, value in self.known.items())
        self._key = (num_consts, num_carry, num_new, known, _fingerprint(self.jaxpr))
        self._hash = hash(self._key)
        self.is_portable = not any(_closes_over_tracers(eqn) for eqn in equations(self.jaxpr))  # may be compiled apart from where it was traced

    def __call__(self, consts: Sequence[Any], carry: Sequence[Any], x: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        outs = self.flat([*consts, *carry, *x])
        return outs[: self.num_new], outs[self.num_new :]

    def flat(self, leaves: Sequence[Any]) -> list[Any]:
        """The new carry and y, from consts, carry and x in one list."""
        return list(core.jaxpr_as_fun(self.jaxpr)(*leaves))

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
        return avals[: self.num_new], avals[self.num_new :]

    @property
    def forwarded(self) -> tuple[int | None, ...]:
        """For each leaf of y, the leaf of the new carry that it is, if it is one: those need not be stacked twice."""
        outvars = open_jaxpr(self.jaxpr).outvars
        carry = {var: i for i, var in reversed(list(enumerate(outvars[: self.num_new]))) if isinstance(var, core.Var)}
        return tuple(carry.get(var) if isinstance(var, core.Var) else None for var in outvars[self.num_new :])

    def with_fixed_leaves_as_constants(self) -> tuple[Program, list[int]]:
        """The same step, the leaves of the carry that it hands on as they are being constants, after its own; and the leaves that are left.

        Frameworks keep the weights of a layer in the carry of its loop: they belong to no Jacobian.
        """
        body, first = open_jaxpr(self.jaxpr), self.num_consts
        before, carry, after = body.invars[:first], body.invars[first : first + self.num_carry], body.invars[first + self.num_carry :]
        left = [i for i, (old, new) in enumerate(zip(carry, body.outvars, strict=False)) if old is not new]
        if len(left) in (0, self.num_carry):  # without any left there would be no recurrence to speak of
            return self, list(range(self.num_carry))
        consts = [*before, *(v for i, v in enumerate(carry) if i not in left)]
        invars = [*consts, *(carry[i] for i in left), *after]
        outvars = [*(body.outvars[i] for i in left), *body.outvars[self.num_new :]]
        cut = body.replace(invars=invars, outvars=outvars, debug_info=_nameless(body))
        return Program(cut, len(consts), len(left), len(left), self.known), left

    @property
    def is_square(self) -> bool:
        """Whether it may follow itself: the new carry has the shapes and dtypes of the old one, and is made of arrays."""
        old, new = self.avals[1], self.out_avals[0]
        arrays = all(hasattr(a, "dtype") for a in (*old, *new))
        return arrays and len(old) == len(new) and all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(old, new, strict=True))

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


def trace(f: Callable, consts: Flat, carry: Flat, x: Flat, *, emits: bool = False) -> tuple[Program, list[Any], Any]:
    """Traces `f(consts, carry, x)` once. Containers of the user's are built of tracers only, as by `lax.scan`.

    Args:
        emits: f returns (new carry, y), the new carry with as many leaves as the old one; otherwise the new carry alone.

    Returns:
        the program; its constants: the values that f closes over, then the leaves of `consts`; and the structure of its output.
    """
    found = []

    def flat(*groups):
        out = f(*(jax.tree.unflatten(given.tree, leaves) for given, leaves in zip((consts, carry, x), groups, strict=True)))
        leaves, tree = jax.tree.flatten(out)
        found.append(tree)
        return leaves

    functools.update_wrapper(flat, f, assigned=("__name__", "__qualname__"))
    closed = jax.make_jaxpr(flat)(consts.leaves, carry.leaves, x.leaves)
    values = [*closed.consts, *consts.leaves]
    new = len(carry.leaves) if emits else found[-1].num_leaves
    return Program(closed, len(values), len(carry.leaves), new), values, found[-1]


def in_floats(f: Callable[[list[Any]], Sequence[Any]], leaves: Sequence[Any]) -> tuple[Callable[[Sequence[Any]], list[Any]], list[int]]:
    """f as a function of the floating-point ones among its `leaves`, to those of what it returns; and which ones these leaves are."""
    places = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]

    def of_floats(some):
        full = list(leaves)
        for i, value in zip(places, some, strict=True):
            full[i] = value
        return [leaf for leaf in f(full) if is_inexact(leaf)]

    return of_floats, places


def part(body: Any, invars: Sequence[Any], eqns: Sequence[Any], outvars: Sequence[Any]) -> Callable[..., list[Any]]:
    """Some equations of a jaxpr as a function from values of `invars` to values of `outvars`."""
    return core.jaxpr_as_fun(piece(body, invars, eqns, outvars))


def piece(body: Any, invars: Sequence[Any], eqns: Sequence[Any], outvars: Sequence[Any]) -> AnyJaxpr:
    """Some equations of a jaxpr as one of their own."""
    cut = body.replace(constvars=(), invars=list(invars), outvars=list(outvars), eqns=list(eqns), debug_info=_nameless(body))
    return core.ClosedJaxpr(cut, ())


def _nameless(body: Any) -> Any:
    """For a jaxpr whose inputs and outputs are others than its names were given for."""
    return body.debug_info._replace(arg_names=None, result_paths=None)


def jit_unless_staged(f: Callable) -> Callable:
    """f(spec, …) compiled for its `spec`, which says whether it `is_portable`; f itself while a `jit` or a loop is being traced, where another would
    add nothing, and if the program cannot leave the trace it was made in."""
    compiled = jax.jit(f, static_argnums=0)
    return lambda spec, *args: (compiled if spec.is_portable and not is_staged() else f)(spec, *args)


def is_staged() -> bool:
    """Whether a `jit` or a loop is being traced."""
    return core.unsafe_am_i_under_a_jit_DO_NOT_USE()


def slice_spec(leaf: Any) -> jax.ShapeDtypeStruct:
    """The abstract value of one step of a stacked leaf."""
    aval, more = jax.typeof(leaf) if isinstance(leaf, jax.Array) else None, {}
    if aval is not None:
        if (varying := getattr(aval, "mat", None)) is not None:  # over which axes of a `shard_map`, as JAX's releases call it
            more = {} if varying.empty else {"manual_axis_type": varying}
        elif getattr(aval, "vma", None):
            more = {"vma": aval.vma}
        if more or any(axis is not None for axis in aval.sharding.spec):  # over explicit mesh axes
            more["sharding"] = aval.sharding.update(spec=jax.sharding.PartitionSpec(*aval.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(np.shape(leaf)[1:], dtype_of(leaf), weak_type=getattr(leaf, "weak_type", False), **more)


def _fingerprint(jaxpr: AnyJaxpr, unfolded: frozenset[int] = frozenset()) -> Hashable:
    """Equations with variables numbered by appearance; what cannot be compared by value is compared by identity.

    unfolded: the rules of `custom_jvp` functions that this jaxpr is itself found in.
    """
    numbers: dict[Any, int] = {}

    def number(var):
        return numbers.setdefault(var, len(numbers))

    def atom(a):
        if isinstance(a, core.Literal):
            value = np.asarray(a.val)
            return (a.aval, value.tobytes()) if value.dtype != object else (a.aval, id(a.val))
        return number(a)

    def params(eqn):
        own = {"jvp_jaxpr_fun": _rule(eqn, unfolded)} if eqn.primitive.name == "custom_jvp_call" else {}
        return tuple((k, own[k] if k in own else param(v)) for k, v in sorted(eqn.params.items()))

    def param(value):
        if hasattr(open_jaxpr(value), "eqns"):
            return _closed(value, unfolded)
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
    eqns = tuple((e.primitive, params(e), tuple(map(atom, e.invars)), tuple((number(v), v.aval) for v in e.outvars)) for e in body.eqns)
    return heads, eqns, tuple(map(atom, body.outvars))


def _closed(jaxpr: AnyJaxpr, unfolded: frozenset[int]) -> Hashable:
    return (_fingerprint(jaxpr, unfolded), tuple(map(_constant, getattr(jaxpr, "consts", ()))))


def _rule(eqn: Any, unfolded: frozenset[int]) -> Hashable:
    """A `custom_jvp` rule: the user's function, by identity, and what it computes now, since it may read what has changed.

    JAX wraps the rule anew in every trace, in closures of its own. Where a release keeps it elsewhere, and where arguments are bound to it
    (`nondiff_argnums`), the wrapper itself: equal to no other. A rule that calls its own function is unfolded once.
    """
    wrapped = _users(eqn.params["jvp_jaxpr_fun"])
    if wrapped is not None and hasattr(wrapped.f, "depends_on"):
        return wrapped.f.depends_on
    computed = _linearised(eqn)
    if wrapped is None or len(wrapped.transforms) != 1 or computed is None:
        return _ById(eqn.params["jvp_jaxpr_fun"])
    rule, ((_, flattening),) = wrapped.f, wrapped.transforms
    key = (_ById(rule), *(value for value in flattening if not callable(value)))
    return key if id(rule) in unfolded else (*key, _closed(computed, unfolded | {id(rule)}))


def _users(wrapped: Any) -> Any:
    """The wrapper right around the user's rule, which knows its arguments, inside those that JAX puts around it; None if not found."""

    def closed_over(f):
        return [cell.cell_contents for cell in getattr(f, "__closure__", None) or ()]

    while hasattr(wrapped, "transforms") and not wrapped.transforms:
        inside = [value for f in (wrapped.f, *closed_over(wrapped.f)) for value in closed_over(f) if hasattr(value, "transforms")]
        wrapped = inside[0] if len(inside) == 1 else None
    return wrapped


def _linearised(eqn: Any) -> AnyJaxpr | None:
    """The values and tangents of a `custom_jvp` equation. None if its rule fails, or asks which tangents are zero."""
    if eqn.params["symbolic_zeros"]:
        return None
    floats = [i for i, a in enumerate(eqn.invars) if is_inexact(a.aval)]

    def call(primals, tangents):
        def of_floats(*some):
            full = list(primals)
            for i, value in zip(floats, some, strict=True):
                full[i] = value
            return eqn.primitive.bind(*full, **eqn.primitive.get_bind_params(eqn.params))

        return jax.jvp(of_floats, [primals[i] for i in floats], tangents)

    avals = [jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in eqn.invars]
    try:
        return jax.make_jaxpr(call)(avals, [avals[i] for i in floats])
    except Exception:  # the user's own rule: whatever it raises, it raises again where it is needed
        return None


def _closes_over_tracers(eqn: Any) -> bool:
    """Whether a `custom_jvp` rule reads what an outer transformation is about to replace."""
    if eqn.primitive.name != "custom_jvp_call":
        return False
    computed = _linearised(eqn)
    return computed is not None and any(isinstance(value, Tracer) for value in computed.consts)


def _whole_numbers(value: Any) -> np.ndarray | None:
    """The value of an array of integers or booleans that is at hand, and not too large to be compared."""
    if isinstance(value, Tracer) or not isinstance(value, (np.ndarray, jax.Array)) or value.size > MOST_KNOWN:
        return None
    return np.asarray(value) if _is_whole(value.dtype) else None


def _is_whole(dtype: Any) -> bool:
    return jax.dtypes.issubdtype(dtype, np.integer) or jax.dtypes.issubdtype(dtype, np.bool_)


_INDEXED = {"gather": (1, 2), "dynamic_slice": (1, None), "dynamic_update_slice": (2, None)} | dict.fromkeys(
    ("scatter", "scatter-add", "scatter_add", "scatter_sub", "scatter_mul", "scatter_min", "scatter_max"), (1, 2)
)  # which operands are indices


def _indexing(jaxpr: AnyJaxpr, candidates: Iterable[int], carry: Iterable[int]) -> set[int]:
    """Of the inputs `candidates` those that are, or make, indices into what depends on the inputs `carry`."""
    body, found = open_jaxpr(jaxpr), set()
    makes = {body.invars[i]: {i} for i in candidates}
    moving = {body.invars[i] for i in carry}
    for eqn in body.eqns if makes else ():
        ins = [a if isinstance(a, core.Var) else None for a in eqn.invars]
        if any(a in moving for a in ins):
            moving.update(eqn.outvars)
            lo, hi = _INDEXED.get(eqn.primitive.name, (0, 0))
            found.update(*(makes.get(a, ()) for a in ins[lo:hi]))
        elif all(_is_whole(getattr(v.aval, "dtype", object)) for v in eqn.outvars):
            made = set().union(*(makes.get(a, ()) for a in ins))
            makes.update((v, made) for v in eqn.outvars if made)
        for inner in sub_jaxprs(list(eqn.params.values())):
            if len(open_jaxpr(inner).invars) == len(ins):
                own = _indexing(inner, [i for i, a in enumerate(ins) if a in makes], [i for i, a in enumerate(ins) if a in moving])
                found.update(*(makes[ins[i]] for i in own))
    return found


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
