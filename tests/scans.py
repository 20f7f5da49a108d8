"""Random scans, drawn by Hypothesis: a carry and inputs of any pytree, a step of random operations, and what is done to it all."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from operations import WIDE, Operation, Picker, Shape, Unfit, looped, window
from programs import drawn_operations, fitted

import parscan

METHODS = [
    *["auto", "tree", "walk", "associative", "chunked", "sequential", "lax", parscan.Walk(2)],
    *[parscan.Chunked(1), parscan.Chunked(3), parscan.Chunked(4, levels=1), parscan.Chunked(2, levels=0)],
    *[parscan.Sequential(segment=3), parscan.Tree(segment=4), parscan.Chunked(2, segment=5), parscan.Associative(segment=3)],
]
SHAPES: list[Shape] = [(3,), (2, 3), (3, 2), (2, 2, 2), (3, 3), (), (4,), (1, 2)]
KEY = jax.random.key(0).dtype
KINDS = ["float64"] * 8 + ["int32", "bool", "key", "float32", "bfloat16", "weak", "empty"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array: of a dtype, of keys, weakly typed or without entries."""

    kind: str
    shape: Shape

    @property
    def is_float(self) -> bool:
        return self.kind not in ("int32", "bool", "key")

    @property
    def dtype(self) -> Any:
        return {"weak": "float64", "empty": "float64", "key": KEY}.get(self.kind, self.kind)

    def spec(self, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def value(self, random: np.random.Generator, lead: Shape = ()) -> Any:
        shape = (*lead, *self.shape)
        if self.kind == "key":
            return jax.random.wrap_key_data(jnp.asarray(random.integers(0, 2**32, (*shape, 2), dtype=np.uint32)))
        if self.kind == "weak":
            return jnp.asarray(float(random.standard_normal()))
        return jnp.asarray(random.standard_normal(shape) if self.is_float else random.integers(0, 2, shape), self.dtype)


# --- operations that need more than floats, or that only a scan makes interesting ---------------------------------------------


def other(p: Picker, *kinds: str) -> int:
    """One of the leaves that are not floats: of the constants, those that come first."""
    fits = [i for i, leaf in enumerate(p.constants) if isinstance(leaf, Leaf) and leaf.kind in kinds]
    if not fits:
        raise Unfit
    return fits[p.integer(0, len(fits) - 1)]


def counted_index(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis, k = p.axis(shape), other(p, "int32")
    f = p.choice(
        lambda x, k: lax.dynamic_index_in_dim(x, k % shape[axis], axis, keepdims=False),
        lambda x, k: jnp.moveaxis(x, axis, 0).at[k].add(jnp.sin(jnp.moveaxis(x, axis, 0)[k - 1])),
        lambda x, k: jnp.roll(x, k, axis),
        lambda x, k: lax.fori_loop(0, 2, lambda j, x: x.at[(j + k) % shape[0]].multiply(0.5), x),
    )
    return lambda v, c: f(v[i], c[k])


def flagged(p: Picker) -> Operation:
    i, shape = p.value(0)
    j, _ = p.value(like=shape)
    k = other(p, "bool", "int32")
    f = p.choice(jnp.where, lambda k, a, b: lax.cond(k, lambda a, b: jnp.sin(a), lambda a, b: a * b, a, b))
    return lambda v, c: f(c[k] != 0, v[i], v[j])


def noise(p: Picker) -> Operation:
    i, shape = p.value(0)
    k = other(p, "key")
    f = p.choice(lambda x, r: x + 0.3 * r, lambda x, r: x * r, lambda x, r: jnp.where(r > 0, x, 0))
    return lambda v, c: f(v[i], jax.random.normal(c[k], shape, v[i].dtype))


def stopped(p: Picker) -> Operation:
    i, shape = p.value(0)
    j, _ = p.value(like=shape)
    return lambda v, c: v[i] + lax.stop_gradient(jnp.sin(v[j])) * v[j]


def activation(p: Picker) -> Operation:
    i, _ = p.value(1)
    f = p.choice(jax.nn.relu, jax.nn.softplus, jax.nn.silu, jax.nn.log_softmax, lambda x: jax.nn.logsumexp(x, -1), jax.nn.relu6, jax.nn.elu, jnp.arcsinh)
    return lambda v, c: f(v[i])


def cast(p: Picker) -> Operation:
    i, _ = p.value(0)
    return lambda v, c: v[i].astype(jnp.int32).astype(v[i].dtype) + 0.5 * v[i]


def rematerialised(p: Picker) -> Operation:
    i, shape = p.value(1)
    w = p.constant((shape[-1], shape[-1]))
    policy = p.choice(None, jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.everything_saveable)
    return lambda v, c: jax.checkpoint(lambda x: jnp.tanh(jnp.sin(x) @ c[w]), policy=policy)(v[i])


def gated(p: Picker) -> Operation:
    i, shape = p.value(1)
    w, u = p.constant((shape[-1], shape[-1])), p.constant((shape[-1], shape[-1]))
    return lambda v, c: (z := jax.nn.sigmoid(v[i] @ c[w])) * v[i] + (1 - z) * jnp.tanh(v[i] @ c[u])


@jax.custom_vjp
def damped(x):
    return jnp.sin(x)


damped.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.tanh(g) * jnp.cos(x),))


def pooled(p: Picker) -> Operation:
    """A window may be of padding alone, hence infinite."""
    run = window(p)
    return lambda v, c: jnp.clip(run(v, c), -9, 9)


def own_vjp(p: Picker) -> Operation:
    i, _ = p.value(0)
    return lambda v, c: damped(v[i])


MORE = [counted_index, counted_index, flagged, noise, stopped, activation, cast, rematerialised, gated, gated]
TABLE = [*(pooled if f is window else f for f in WIDE), *MORE, *MORE]


# --- transformations: of functions from a list of arrays to a pytree ----------------------------------------------------------


def is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def chosen(bits: int, i: int) -> bool:
    """Whether the i-th of several is in a set; 0 is the set of all."""
    return not bits >> i % 8 & 1


def scalar(tree: Any, unused: int) -> Any:
    """A loss that reads some of the leaves, each entry with another weight."""
    floats = [leaf.astype(float) for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]
    read = [(x, jnp.cos(jnp.arange(x.size) + i).reshape(x.shape)) for i, x in enumerate(floats) if chosen(unused, i)]
    return sum((jnp.sum(weight * x + 0.3 * x**2) for x, weight in read), jnp.zeros(()))


def along(case: Scan, f: Callable) -> Callable:
    """(arguments that are differentiated, how to fill in the others) of a function of all arguments."""

    def split(args):
        places = [i for i, x in enumerate(args) if is_inexact(x) and chosen(case.fixed, i)]

        def of_some(some):
            full = list(args)
            for i, x in zip(places, some, strict=True):
                full[i] = x
            return f(full)

        return of_some, [args[i] for i in places]

    return split


def grad(case: Scan, f: Callable) -> Callable:
    def transformed(args):
        of_some, some = along(case, f)(args)

        def loss(some):
            out = of_some(some)
            return scalar(out, case.unused), out

        grads, out = jax.grad(loss, has_aux=True)(some)
        return out, grads

    return transformed


def jvp(case: Scan, f: Callable) -> Callable:
    def transformed(args):
        of_some, some = along(case, f)(args)
        out, dots = jax.jvp(of_some, (some,), ([jnp.cos(x + i).astype(x.dtype) for i, x in enumerate(some)],))
        return out, [dot for dot in jax.tree.leaves(dots) if dot.dtype != jax.dtypes.float0]

    return transformed


def varied(x: Any) -> Any:
    """A batch of two."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.stack([jax.random.key_data(x), jax.random.key_data(x) + 1]))
    return jnp.stack([x, ~x if x.dtype == bool else (0.7 * x if is_inexact(x) else x + 1).astype(x.dtype)])


def vmap(case: Scan, f: Callable) -> Callable:
    def transformed(args):
        axes = [0 if chosen(case.unmapped, i) else None for i in range(len(args))]
        return jax.vmap(f, (axes,), axis_size=2)([x if axis is None else varied(x) for x, axis in zip(args, axes, strict=True)])

    return transformed


def jit(case: Scan, f: Callable) -> Callable:
    return jax.jit(f)


def checkpoint(case: Scan, f: Callable) -> Callable:
    return jax.checkpoint(f)


TRANSFORMATIONS = {f.__name__: f for f in (grad, jvp, vmap, jit, checkpoint)}
APPLIED = [*((name,) for name in TRANSFORMATIONS), *itertools.product(TRANSFORMATIONS, repeat=2)]
APPLIED += [names for names in APPLIED if "grad" in names or "jvp" in names] * 2  # more often than those that take no derivative


# --- scans -----------------------------------------------------------------------------------------------------------------------


def bounded(x: Any) -> Any:
    """Into (-1, 1), without the cancellation of a saturated tanh: gradients are as accurate as x."""
    return x * lax.rsqrt(1 + x * x)


def new_leaf(leaf: Leaf, how: int, h: Any, values: Sequence[Any]) -> Any:
    """The new carry's leaf; `how` is a value that enters the step or comes up in it, counted from the last, or a rule."""
    if leaf.kind in ("int32", "bool"):
        kept, grown = lambda h: h, lambda h: values[-1].sum() > 0.1 if values else h > 0
        rules = [lambda h: h + 1, lambda h: (3 * h + 1) % 7, lambda h: h + grown(h), kept] if leaf.kind == "int32" else [jnp.invert, grown, kept]
        return rules[how % len(rules)](h)
    if leaf.kind == "key":
        return [lambda h: jax.random.split(h)[0], lambda h: jax.random.fold_in(h, 1), lambda h: h][how % 3](h)
    if leaf.kind == "empty" or how == -1 or not values:
        return h * 0.5 if how % 2 else h
    return bounded(fitted(values[-1 - how % len(values)], leaf.shape, False)).astype(leaf.dtype)


@dataclasses.dataclass(repr=False)
class Scan:
    """A scan and what is done to it. Of 8 bits each: which arguments are not differentiated, not mapped, which outputs no loss reads."""

    carry: Any
    xs: Any
    length: int
    reverse: bool
    unroll: int | bool
    method: Any
    structure: str
    transformations: tuple[str, ...]
    is_jitted: bool
    fixed: int
    unmapped: int
    unused: int
    dtype: str
    operations: list[tuple[str, list, Operation]] = dataclasses.field(default_factory=list)
    constants: list[Any] = dataclasses.field(default_factory=list)
    news: list[int] = dataclasses.field(default_factory=list)
    emits: list[int] = dataclasses.field(default_factory=list)
    emitted_as: int = 0

    @functools.cached_property
    def leaves(self) -> list[Leaf]:
        """Of the carry, then of xs."""
        return jax.tree.leaves((self.carry, self.xs))

    @property
    def given(self) -> list[Any]:
        """Arrays that the step closes over."""
        return [c for c in self.constants if not isinstance(c, Leaf)]

    @property
    def precision(self) -> str:
        """The lowest."""
        used = {self.dtype, *(str(leaf.dtype) for leaf in self.leaves if leaf.is_float)}
        return min(used, key=lambda dtype: jnp.finfo(dtype).bits)

    def step(self, given: Sequence[Any], h: Any, x: Any) -> tuple[Any, Any]:
        old, entering = jax.tree.leaves(h), jax.tree.leaves((h, x))
        numbers = [leaf.is_float and leaf.kind != "empty" for leaf in self.leaves]
        values = [value.astype(self.dtype) for value, is_number in zip(entering, numbers, strict=True) if is_number]
        constants = [*(value for value, leaf in zip(entering, self.leaves, strict=True) if not leaf.is_float), *given]
        for _, _, operation in self.operations:
            values.append(operation(values, constants))
        new = [new_leaf(*one, values) for one in zip(self.leaves[: len(old)], self.news, old, strict=True)]
        choices = [*values, *new, *old, *constants[: len(constants) - len(given)], None, 1.0, np.arange(3)]
        ys = nested([choices[-1 - i % len(choices)] for i in self.emits], self.emitted_as)
        return jax.tree.unflatten(jax.tree.structure(h), new), ys

    def args(self, seed: int = 0, nudge: float = 0.0) -> list[Any]:
        """Random leaves of carry and xs, and constants; floats are nudged, relative to their size."""
        random, count = np.random.default_rng(seed), len(jax.tree.leaves(self.carry))
        values = [leaf.value(random, () if i < count else (self.length,)) for i, leaf in enumerate(self.leaves)]
        values += [jnp.asarray(c.value(random)).astype(c.spec(self.dtype).dtype) for c in self.given]
        moved = np.random.default_rng(1)
        return [x * (1 + nudge * moved.standard_normal(x.shape)).astype(x.dtype) if nudge and is_inexact(x) else x for x in values]

    def parts(self, args: Sequence[Any]) -> tuple[Callable, Any, Any]:
        """The step, init and xs."""
        init, xs = jax.tree.unflatten(jax.tree.structure((self.carry, self.xs)), args[: len(self.leaves)])
        return functools.partial(self.step, args[len(self.leaves) :]), init, xs

    def transformed(self, scan: Callable) -> Callable:
        """A function of `args`."""

        def f(args):
            return scan(*self.parts(args), length=self.length, reverse=self.reverse, unroll=self.unroll)

        for name in reversed(self.transformations):
            f = TRANSFORMATIONS[name](self, f)
        return jax.jit(f) if self.is_jitted else f

    def __str__(self) -> str:
        drawn = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in ("operations", "constants"))
        made = "; ".join(f"{name}{tuple(log)}" for name, log, _ in self.operations)
        return f"Scan({', '.join(f'{name}={value!r}' for name, value in drawn)})\n  {made}"

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        """For Hypothesis."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        """With the step's program, as JAX prints it."""
        args = self.args()
        _, init, xs = self.parts(args)
        x = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
        return f"{self}\n  step: {jax.make_jaxpr(self.step)(args[len(self.leaves) :], init, x)}"


NESTED: list[Callable[[list], Any]] = [
    tuple,
    list,
    lambda some: dict(zip("dacb", some, strict=False)) if len(some) <= 4 else {"all": some},
    lambda some: {"b": (None, *some[1:]), "a": some[:1]},
    lambda some: (some[:1], (), {"c": [{"d": tuple(some[1:])}]}),
    lambda some: some[0] if len(some) == 1 else tuple(some),
]


def nested(some: list, how: int) -> Any:
    return NESTED[how](some)


@st.composite
def leaves(draw, kinds: Sequence[str], most: int, single: Sequence[Shape] = SHAPES) -> Any:
    """A pytree of up to `most` leaves."""
    some = []
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(kinds))
        special = {"int32": (), "bool": (), "key": (), "weak": (), "empty": (0, 3)}
        some.append(Leaf(kind, special[kind] if kind in special else draw(st.sampled_from(single))))
    return nested(some, draw(st.integers(0, len(NESTED) - 1)))


@st.composite
def scans(draw, most: int = 3) -> Scan:
    """Scans whose steps are of up to `most` operations."""
    transformations = draw(st.sampled_from(APPLIED))
    bits = lambda *readers: draw(st.one_of(st.just(0), st.integers(0, 255))) if set(readers) & set(transformations) else 0
    case = Scan(
        carry=draw(leaves(KINDS, 4)),
        xs=draw(st.one_of(st.none(), leaves([kind for kind in KINDS if kind != "weak"], 2))),
        length=(length := draw(st.sampled_from([3, 2, 1, 0, *range(4, 21)]))),
        reverse=draw(st.booleans()),
        unroll=draw(st.sampled_from([1] * 9 + [2, False, length <= 8])),
        method=draw(st.sampled_from(METHODS)),
        structure=draw(st.sampled_from(["auto"] * 5 + ["dense"])),
        transformations=transformations,
        is_jitted=draw(st.integers(0, 59)) < 59,
        fixed=bits("grad", "jvp"),
        unmapped=bits("vmap"),
        unused=bits("grad"),
        dtype=draw(st.sampled_from(["float64"] * 7 + ["float32"])),
    )
    shapes = [leaf.shape for leaf in case.leaves if leaf.is_float and leaf.kind != "empty"]
    case.constants = [leaf for leaf in case.leaves if not leaf.is_float]
    table = [f for f in TABLE if f is not looped or "grad" not in transformations]  # a while loop has no reverse mode,
    table = table if "jvp" in transformations else [*table, own_vjp]  # a custom VJP no forward mode
    if shapes:
        case.operations = drawn_operations(draw, table, shapes, case.constants, most, case.dtype)
    carried = len(jax.tree.leaves(case.carry))
    case.news = draw(st.lists(st.one_of(st.integers(0, 2), st.integers(-1, 9)), min_size=carried, max_size=carried))
    case.emits = draw(st.lists(st.integers(0, 30), min_size=1, max_size=3))
    case.emitted_as = draw(st.integers(0, len(NESTED) - 1))
    return case


# --- beside `lax.scan` ---------------------------------------------------------------------------------------------------------

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.05}  # of a leaf's norm
FLOOR = 100  # of the precision, relative to the norm of everything: a leaf may cancel to nearly nothing
NUDGE = 4  # of the precision: what the sequential pass itself makes of such a change is held against nobody
REFUSED = "cannot be used for this function"  # an explicit method, for a step with an obstacle


def loop(f: Callable, init: Any, xs: Any, length: int, reverse: bool = False, unroll: int | bool = 1) -> tuple[Any, Any]:
    """A scan in plain Python, which JAX differentiates step by step."""
    if length == 0:
        return lax.scan(f, init, xs, length, reverse)
    h, ys = init, [None] * length
    for i in reversed(range(length)) if reverse else range(length):
        h, ys[i] = f(h, jax.tree.map(lambda x, i=i: x[i], xs))
    return h, jax.tree.map(lambda *some: jnp.stack(some), *ys)


def check_types(case: Scan, got: Any, want: Any) -> None:
    """That structures, shapes and dtypes are equal; and, where nothing is differentiated, weak types: those of derivatives are nobody's promise."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    kind = jax.typeof if not {"grad", "jvp"} & set(case.transformations) else lambda x: (x.shape, x.dtype)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert kind(g) == kind(w), f"{kind(g)}, lax.scan {kind(w)}"


def excess(case: Scan, got: Any, want: Any) -> float:
    """The largest difference of two results' leaves, in units of what is tolerated; infinite if any that are not floats differ.

    Where the sequential pass is not finite nothing is compared.
    """
    pairs, plain = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)), lambda x: jax.random.key_data(x) if x.dtype == KEY else x
    if not all(np.array_equal(plain(g), plain(w)) for g, w in pairs if not is_inexact(w)):
        return np.inf
    floats = [(np.asarray(g, np.float64)[np.isfinite(w)], np.asarray(w, np.float64)[np.isfinite(w)]) for g, w in pairs if is_inexact(w)]
    whole = np.sqrt(sum(np.sum(w**2) for _, w in floats))
    floor = FLOOR * float(jnp.finfo(case.precision).eps) * whole + np.finfo(float).tiny
    gaps = [np.linalg.norm(g - w) / (TOLERANCE[case.precision] * np.linalg.norm(w) + floor) for g, w in floats]
    return float(np.max([np.inf if np.isnan(gap) else gap for gap in gaps], initial=0.0))


def outcome(case: Scan, scan: Callable, nudge: float = 0.0) -> tuple[Any, Exception | None]:
    """The result, or what was raised."""
    try:
        return jax.block_until_ready(case.transformed(scan)(case.args(nudge=nudge))), None
    except Exception as error:
        return None, error


def disagreement(case: Scan) -> tuple[str | None, list[str]]:
    """What `parscan.scan` and `lax.scan` disagree on, if anything, and what there is to count in this case."""
    counts = [" of ".join(case.transformations), f"method {case.method}"]
    want, error = outcome(case, lax.scan)
    got, raised = outcome(case, functools.partial(parscan.scan, method=case.method, structure=case.structure))
    if REFUSED in str(raised):
        counts.append("handed over")
        got, raised = outcome(case, parscan.scan)
    if error is not None or raised is not None:
        same = type(raised) is type(error) and str(raised) == str(error)
        return None if same else f"parscan.scan raises {raised!r},\n  lax.scan {error!r}", [*counts, "error in both"] if same else counts
    if not all(np.isfinite(np.asarray(w, float)).all() for w in jax.tree.leaves(want) if is_inexact(w)):
        counts.append("not finite in lax.scan")
    try:
        check_types(case, got, want)
    except AssertionError as difference:
        return str(difference), counts
    found = excess(case, got, want)
    if found <= 1:
        return None, counts
    if found <= 10 * max(sensitivity(case, want)):
        return None, [*counts, "ill-conditioned"]
    by_hand, _ = outcome(case, loop)
    if by_hand is not None and excess(case, got, by_hand) <= 1:  # before JAX 0.12 `lax.scan` forgets `custom_jvp` rules at second order
        return None, [*counts, "as a loop, unlike lax.scan"]
    return f"{found:.1e} times what is tolerated", counts


def sensitivity(case: Scan, want: Any) -> list[float]:
    """What the sequential pass itself makes of some rounding errors in its arguments."""
    nudges = (NUDGE * sign * float(jnp.finfo(case.precision).eps) for sign in (1, -1, 0.5))
    return [excess(case, outcome(case, lax.scan, nudge)[0], want) for nudge in nudges]


class ScanTally:
    """What random scans have shown so far."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.distinct: set[str] = set()
        self.violations: list[str] = []

    def add(self, case: Scan) -> None:
        problem, counts = disagreement(case)
        self.counts.update(["scans", *counts])
        self.distinct.add(str(case))
        if problem is not None:
            self.violations.append(f"{problem}\n{case!r}")
