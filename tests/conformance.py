"""What `lax.scan` takes, case by case: each is a function of the scan to be used, and gives everything that is to be compared.

A case returns a pytree of arrays (values, gradients, tangents, whatever was seen on the way), or raises. Nothing here knows of parscan.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Case = Callable[[Any], Any]

START = jnp.array([0.3, -0.2, 0.5])
XS = jnp.sin(jnp.arange(12.0)).reshape(4, 3)
WEIGHTS = jnp.cos(jnp.arange(9.0)).reshape(3, 3) / 2
HALF, SINGLE = jnp.bfloat16, jnp.float32


def cell(h, x):
    """Mixes, reads its input, emits what it was given and what it made."""
    new = jnp.tanh(h @ WEIGHTS + x)
    return new, (new, jnp.cos(h).sum())


def keep(h, x):
    """Elementwise, in the dtype of the carry."""
    return jnp.tanh(h + x).astype(h.dtype), h


# --- everything about one scan ------------------------------------------------------------------------------------------------


def differentiable(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating)


def floats(tree: Any) -> tuple[list, Callable[[list], Any]]:
    """The floating-point leaves, and how to put others in their place."""
    leaves, structure = jax.tree.flatten(tree)

    def rebuild(some):
        rest = iter(some)
        return jax.tree.unflatten(structure, [next(rest) if differentiable(leaf) else leaf for leaf in leaves])

    return [leaf for leaf in leaves if differentiable(leaf)], rebuild


def magnitude(tree: Any) -> Any:
    """A number that every floating-point or complex leaf has a part in."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return sum((jnp.sum(jnp.sin(jnp.abs(leaf) if jnp.iscomplexobj(leaf) else leaf)).astype(float) for leaf in leaves), jnp.zeros(()))


def strong(tree: Any) -> Any:
    """Without weak types: those of derivatives are not compared."""
    return jax.tree.map(lambda leaf: lax.convert_element_type(leaf, leaf.dtype), tree)


def of(f: Any, init: Any, xs: Any = None, length: int | None = None, *, pushes: bool = True, **options: Any) -> Case:
    """Values, gradients and tangents of one scan, under `jit`; and what it is said to return. pushes: whether there is a forward mode."""

    def run(scan):
        given, rebuild = floats((init, xs))

        def outputs(leaves):
            h, x = rebuild(leaves)
            return scan(f, h, x, length, **options)

        def with_values(leaves):
            out = outputs(leaves)
            return [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.inexact)], out

        @jax.jit
        def everything(leaves):
            if not leaves:
                return outputs(leaves)
            if not pushes:
                moving, pull, out = jax.vjp(with_values, leaves, has_aux=True)
                return out, strong(pull(jax.tree.map(jnp.cos, moving)))
            moving, push, out = jax.linearize(with_values, leaves, has_aux=True)
            return out, strong((jax.linear_transpose(push, leaves)(jax.tree.map(jnp.cos, moving)), push(leaves)))

        return avals_of(jax.eval_shape(outputs, given)), everything(given)

    return run


backwards = functools.partial(of, pushes=False)


def values(f: Any, init: Any, xs: Any = None, length: int | None = None, **options: Any) -> Case:
    """Of one scan as it stands, not under `jit`."""
    return lambda scan: scan(f, init, xs, length, **options)


def under(context: Callable[[], contextlib.AbstractContextManager], case: Case) -> Case:
    def run(scan):
        with context():
            return case(scan)

    return run


def with_scan(make: Callable[[Any], Callable], *arguments: Any, transform: Callable = jax.jit) -> Case:
    """`transform(make(scan))(*arguments)`."""
    return lambda scan: transform(make(scan))(*arguments)


def through(scan: Any) -> Callable:
    """A loss with a weight closed over, an initial carry and inputs."""

    def loss(weights, h, xs):
        def f(h, x):
            h = jnp.tanh(h @ weights + x)
            return h, (h, h.sum())

        return magnitude(scan(f, h, xs))

    return loss


# --- the arguments ----------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "a length that is a string": values(lambda h, _: (h, None), START, None, "4"),
    "a length that is a float": values(lambda h, _: (h, None), START, None, 4.0),
    "a negative length": values(lambda h, _: (h, None), START, None, -1),
    "forward": of(cell, START, XS),
    "reverse": of(cell, START, XS, reverse=True),
    "reverse is 1": of(cell, START, XS, reverse=1),
    "xs=None with a length": of(lambda h, _: (jnp.tanh(h @ WEIGHTS), h), START, None, 4),
    "xs=None in reverse": of(lambda h, _: (jnp.tanh(h @ WEIGHTS), h), START, None, 4, reverse=True),
    "a length that agrees with xs": of(cell, START, XS, 4),
    "a length of numpy's": of(cell, START, XS, np.int64(4)),
    "a length that is an array": of(lambda h, _: (jnp.tanh(h), h), START, None, jnp.int32(4)),
    "a length that is True": of(lambda h, _: (jnp.tanh(h), h), START, None, True),
    "length 0": of(cell, START, XS[:0]),
    "length 0 in reverse": of(cell, START, XS[:0], reverse=True),
    "length 0 without xs": of(lambda h, _: (jnp.sin(h), (h, h.sum())), START, None, 0),
    "length 0 of a weak carry": of(lambda h, x: (h * x, h), 0.5, XS[:0, 0]),
    "length 1": of(cell, START, XS[:1]),
    "length 1 in reverse": of(cell, START, XS[:1], reverse=True),
    "length 2": of(cell, START, XS[:2]),
    "unroll=2": of(cell, START, XS, unroll=2),
    "unroll that does not divide": of(cell, START, XS, unroll=3),
    "unroll beyond the length": of(cell, START, XS, unroll=9),
    "unroll=0": of(cell, START, XS, unroll=0),
    "unroll=True": of(cell, START, XS, unroll=True),
    "unroll=False": of(cell, START, XS, unroll=False),
    "unroll=True of length 0": of(cell, START, XS[:0], unroll=True),
    "unroll of numpy's": of(cell, START, XS, unroll=np.int32(2)),
    "unrolled in reverse": of(cell, START, XS, unroll=2, reverse=True),
    "_split_transpose": of(cell, START, XS, _split_transpose=True),
    "arguments by name": lambda scan: scan(f=cell, init=START, xs=XS, length=None, reverse=False, unroll=1),
    "numpy arrays": values(cell, np.asarray(START), np.asarray(XS)),
    "single precision from numpy": values(keep, np.float32([1, 2]), np.ones((3, 2), np.float32)),
}

# --- the function ---------------------------------------------------------------------------------------------------------------


class Callables:
    """Functions that are no functions."""

    scale = 0.5

    def __call__(self, h, x):
        return jnp.tanh(self.scale * h + x), h

    def method(self, h, x):
        return jnp.sin(h * self.scale), x

    @staticmethod
    def of_the_class(h, x):
        return h * 0.5 + x, None


def scaled(scale, h, x, *, shift=0.0, twice=False):
    new = jnp.tanh(scale * h + x + shift)
    return new, (new, new) if twice else h


FUNCTIONS = {
    "a pair that is a dict": values(lambda h, x: {"carry": h, "y": x}, START, XS),
    "a partial": of(functools.partial(scaled, 0.7, twice=True), START, XS),
    "a Partial of JAX's": of(jax.tree_util.Partial(scaled, 0.7), START, XS),
    "a jitted function": of(jax.jit(cell), START, XS),
    "an inlined one": of(jax.jit(cell, inline=True), START, XS),
    "an object": of(Callables(), START, XS),
    "a bound method": of(Callables().method, START, XS),
    "a static method": of(Callables.of_the_class, START, XS),
    "a builtin": of(divmod, jnp.int32(100), jnp.arange(1, 5, dtype=jnp.int32)),
    "variadic": of(lambda *args, **kwargs: (jnp.tanh(args[0] + args[1]), None), START, XS),
    "a pair that is a list": of(lambda h, x: [jnp.tanh(h + x), h], START, XS),
    "named scopes": of(jax.named_call(cell, name="cell"), START, XS),
    "the carry returned as it is": of(lambda h, x: (h, h * x), START, XS),
    "the carry overwritten": of(lambda h, x: (x, h), START, XS),
    "a constant carry": of(lambda h, x: (jnp.zeros(3), h * x), START, XS),
    "a carry that ignores everything": of(lambda h, x: (jnp.full(3, 2.0), None), START, XS),
    "ys that are constants": of(lambda h, x: (jnp.tanh(h + x), (1.0, 2, True, np.arange(3), jnp.ones(2))), START, XS),
    "ys that are x": of(lambda h, x: (jnp.tanh(h + x), (x, x)), START, XS),
    "ys that are the old carry": of(lambda h, x: (jnp.tanh(h @ WEIGHTS), h), START, XS),
    "ys that are the new carry, twice": of(lambda h, x: ((g := jnp.tanh(h @ WEIGHTS + x)), (g, g)), START, XS),
    "ys that are a closed-over constant": of(lambda h, x: (jnp.tanh(h + x), WEIGHTS), START, XS),
    "no ys": of(lambda h, x: (jnp.tanh(h + x), None), START, XS),
    "ys of an empty tuple": of(lambda h, x: (jnp.tanh(h + x), ()), START, XS),
    "the same leaf at two places": of(lambda c, x: ((jnp.tanh(c[0] * x),) * 2, c[1]), (START, 2 * START), XS),
    "leaves exchanged": of(lambda c, x: ((c[1], c[0]), c[0] * x), (START, 2 * START), XS),
    "a stopped gradient": of(lambda h, x: (jnp.tanh(h + lax.stop_gradient(h) * x), h), START, XS),
    "a gradient stopped wholly": of(lambda h, x: (lax.stop_gradient(jnp.tanh(h + x)), h), START, XS),
    "linear algebra": of(lambda h, x: (jnp.linalg.solve(jnp.eye(3) * 3 + jnp.outer(h, h), x), jnp.linalg.norm(h)), START, XS),
    "a sort": of(lambda h, x: (jnp.sort(h * x), jnp.argmax(h)), START, XS),
    "an index that is carried": of(lambda c, x: ((c[0].at[c[1]].mul(x[0]), (c[1] + 1) % 3), c[0][c[1]]), (START, jnp.int32(0)), XS),
    "a dynamic slice": of(lambda c, x: ((lax.dynamic_update_slice(c[0], x[:1], (c[1],)), c[1] + 1), c[0]), (jnp.ones(6), jnp.int32(0)), XS),
    "a convolution": of(lambda h, x: (jnp.tanh(jnp.convolve(h, x, mode="same")), None), START, XS),
    "an einsum": of(lambda h, x: (jnp.tanh(jnp.einsum("ab,bc,c->ac", h, WEIGHTS, x)), None), jnp.stack([START, START[::-1]]), XS),
    "a fourier transform": of(lambda h, x: (jnp.tanh(jnp.fft.irfft(jnp.fft.rfft(h) * 0.9, 3) + x), None), START, XS),
}

# --- pytrees ----------------------------------------------------------------------------------------------------------------------

Point = collections.namedtuple("Point", ["a", "b"])


@functools.partial(jax.tree_util.register_dataclass, data_fields=["h", "n"], meta_fields=["name"])
@dataclasses.dataclass(frozen=True)
class State:
    h: Any
    n: Any
    name: str = "state"


@jax.tree_util.register_pytree_node_class
class Converts:
    """A container that converts what it is given."""

    def __init__(self, a):
        self.a = jnp.asarray(a)

    def tree_flatten(self):
        return (self.a,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Typed(NamedTuple):
    x: Any
    y: Any = None


TREES = {
    "a dict": of(lambda c, x: ({"b": c["a"] * x, "a": jnp.sin(c["b"])}, c), {"a": START, "b": START}, XS),
    "a dict of dicts": of(lambda c, x: ({"a": {"b": jnp.tanh(c["a"]["b"] + x["u"]["v"])}}, x), {"a": {"b": START}}, {"u": {"v": XS}, "w": XS[:, 0]}),
    "keys that are integers": of(lambda c, x: ({2: c[1] * x, 1: jnp.sin(c[2])}, None), {1: START, 2: START}, XS),
    "an ordered dict": of(lambda c, x: (collections.OrderedDict(z=c["z"] * x, a=c["z"]), None), collections.OrderedDict(z=START, a=START), XS),
    "a default dict": of(lambda c, x: (collections.defaultdict(list, k=c["k"] * x), c), collections.defaultdict(list, k=START), XS),
    "a namedtuple": of(lambda c, x: (Point(c.b * x, jnp.sin(c.a)), c), Point(START, 2 * START), XS),
    "a typed namedtuple with a None": of(lambda c, x: (Typed(jnp.tanh(c.x + x.x)), Typed(c.x, x.x)), Typed(START), Typed(XS)),
    "a dataclass": of(lambda c, x: (State(jnp.tanh(c.h @ WEIGHTS + x), c.n + 1, c.name), c), State(START, jnp.int32(0)), XS),
    "dataclasses for xs": of(lambda h, x: (jnp.tanh(h + x.h * x.n), x), START, State(XS, jnp.arange(4))),
    "a container that converts": of(lambda c, x: (Converts(jnp.tanh(c.a + x.a)), c.a), Converts(START), Converts(XS)),
    "a Partial that is carried": of(lambda c, x: (jax.tree_util.Partial(scaled, c.args[0] * 0.9), c(x, x)), jax.tree_util.Partial(scaled, START), XS),
    "a list": of(lambda c, x: ([c[1] * x, jnp.sin(c[0])], c), [START, START], XS),
    "a None beside an array": of(lambda c, x: ((jnp.tanh(c[0] + x[1]), None), (None, c[0])), (START, None), (None, XS)),
    "a carry that is None": of(lambda c, x: (None, jnp.sin(x)), None, XS),
    "a carry that is an empty tuple": of(lambda c, x: ((), jnp.sin(x)), (), XS),
    "a carry of empty dicts": of(lambda c, x: (({}, [{}]), x * 2), ({}, [{}]), XS),
    "xs that are an empty tuple": of(lambda h, x: (jnp.tanh(h), x), START, (), 4),
    "xs of Nones": of(lambda h, x: (jnp.tanh(h), x), START, {"a": None, "b": (None, ())}, 4),
    "nothing at all": of(lambda c, x: (c, x), None, None, 4),
    "deeply nested ys": of(lambda h, x: (jnp.tanh(h + x), [{"a": (h, None, [x]), "b": {}}]), START, XS),
    "leaves of many shapes": of(
        lambda c, x: ((jnp.tanh(c[0] + c[1].sum()), c[1] * x[0], c[2] + jnp.outer(x, c[0])), c[2].sum(0)), (START, jnp.float64(0.3), WEIGHTS), XS
    ),
}

# --- leaves that are not differentiated -------------------------------------------------------------------------------------------


def keyed(carry, x):
    h, key, i = carry
    key, sub = jax.random.split(key)
    h = jnp.tanh(h + x * jax.random.normal(sub, h.shape, h.dtype)) * jnp.where(i % 2 == 0, 1.0, 0.5).astype(h.dtype)
    return (h, key, i + 1), (h, i, sub)


def dropped(key, h, x):
    return jnp.tanh(h @ WEIGHTS + x) * jax.random.bernoulli(key, 0.7, h.shape)


FLOAT0 = np.zeros((3,), jax.dtypes.float0)

LEAVES = {
    "a counter": of(lambda c, x: ((jnp.tanh(c[0] + x * c[1]), c[1] + 1), c[1]), (START, jnp.int32(0)), XS),
    "a counter that is a Python integer": of(lambda c, x: ((jnp.tanh(c[0] + x * c[1]), c[1] + 1), c[1]), (START, 0), XS),
    "an integer carry alone": of(lambda n, x: (n + 1, x * n), jnp.int32(0), XS),
    "an integer carry and integer xs": of(lambda n, x: (n + x, n * x), jnp.int32(0), jnp.arange(4, dtype=jnp.int32)),
    "unsigned, and it wraps around": of(lambda n, x: (n * x + x, n), jnp.uint8(250), jnp.arange(4, dtype=jnp.uint8)),
    "small integers": of(lambda c, x: ((c[0] * x, c[1] + jnp.int8(100)), c[1]), (START, jnp.int8(0)), XS),
    "four bits": of(lambda c, x: ((jnp.tanh(c[0] + x), c[1] + jnp.ones((), jnp.int4)), c[1].astype(jnp.int8)), (START, jnp.ones((), jnp.int4)), XS),
    "a boolean": of(lambda c, x: ((jnp.where(c[1], c[0] * x, c[0]), ~c[1]), c[1]), (START, jnp.bool_(True)), XS),
    "a boolean of Python's": of(lambda c, x: ((jnp.where(c[1], c[0] * x, c[0]), ~c[1]), c[1]), (START, True), XS),
    "booleans for xs": of(lambda h, x: (jnp.where(x, jnp.tanh(h), h), x), START, jnp.array([True, False, True, True])),
    "integers for xs": of(lambda h, x: (jnp.tanh(h * x), x), START, jnp.arange(4)),
    "a key that is split every step": of(keyed, (START, jax.random.key(0), jnp.int32(0)), XS),
    "a raw key that is split every step": of(keyed, (START, jax.random.PRNGKey(0), jnp.int32(0)), XS),
    "a key that is folded into": of(lambda c, x: ((dropped(jax.random.fold_in(c[1], 1), c[0], x), c[1]), None), (START, jax.random.key(3)), XS),
    "keys for xs": of(lambda h, x: (dropped(x[0], h, x[1]), x[0]), START, (jax.random.split(jax.random.key(1), 4), XS)),
    "raw keys for xs": of(lambda h, x: (dropped(x[0], h, x[1]), x[0]), START, (jax.random.split(jax.random.PRNGKey(1), 4), XS)),
    "keys of another kind": of(lambda c, x: ((dropped(c[1], c[0], x), jax.random.split(c[1])[0]), c[1]), (START, jax.random.key(0, impl="rbg")), XS),
    "a key that is closed over": of(lambda c, x: ((dropped(jax.random.fold_in(KEY, c[1]), c[0], x), c[1] + 1), None), (START, 0), XS),
    "float0 in the carry": of(lambda c, x: ((jnp.tanh(c[0] + x), c[1]), None), (START, FLOAT0), XS),
    "float0 among xs": of(lambda h, x: (jnp.tanh(h + x[0]), None), START, (XS, np.zeros((4, 3), jax.dtypes.float0))),
    "float0 among ys": of(lambda h, x: (jnp.tanh(h + x), FLOAT0), START, XS),
    "a clock in floating point": of(lambda c, x: ((jnp.tanh(c[0] * jnp.sqrt(c[1]) + x), c[1] + 1.0), None), (START, jnp.float64(1.0)), XS),
    "a leaf that nothing changes": of(lambda c, x: ((jnp.tanh(c[0] * c[1]), c[1]), None), (START, 0.5 * START), XS),
    "a leaf without coordinates": of(lambda c, x: ((jnp.tanh(c[0] + x), c[1]), c[1]), (START, jnp.zeros((0, 3))), XS),
    "a carry without coordinates": of(lambda h, x: (h * 2, x + h.sum()), jnp.zeros((0, 3)), XS),
    "xs without coordinates": of(lambda h, x: (jnp.tanh(h) + x.sum(), x), START, jnp.zeros((4, 0))),
    "ys without coordinates": of(lambda h, x: (jnp.tanh(h + x), h[:0]), START, XS),
    "no coordinates and no steps": of(lambda h, x: (h, h), jnp.zeros(0), jnp.zeros((0, 0))),
    "a scalar": of(lambda h, x: (jnp.tanh(h * x), h), jnp.float64(0.3), XS[:, 0]),
    "five axes": of(lambda h, x: (jnp.tanh(h * x.sum()), h.sum()), jnp.ones((1, 2, 1, 2, 1)), XS),
}
KEY = jax.random.key(7)

# --- dtypes and weak types -------------------------------------------------------------------------------------------------------


def as_(dtype, *arrays):
    return tuple(a.astype(dtype) for a in arrays)


WEAK = jnp.broadcast_to(1.5, (4,))  # weakly typed
ONES = jnp.ones(4, SINGLE)

DTYPES = {
    **{f"{dtype}": of(keep, *as_(dtype, START, XS)) for dtype in ("float32", "float16", "bfloat16")},
    "bfloat16 that mixes": of(lambda h, x: (jnp.tanh(h @ WEIGHTS.astype(HALF) + x), h), *as_(HALF, START, XS)),
    "float16 in reverse, emitted in single precision": of(lambda h, x: (jnp.tanh(h * x), h.astype(SINGLE)), *as_(jnp.float16, START, XS), reverse=True),
    "eight bits of floating point": of(lambda h, x: ((h.astype(SINGLE) * x).astype(h.dtype), h), START.astype(jnp.float8_e4m3fn), XS.astype(SINGLE)),
    "single precision beside a counter beside a key": of(keyed, (START.astype(SINGLE), jax.random.key(0), jnp.int32(0)), XS.astype(SINGLE)),
    "single and double precision": of(lambda c, x: ((jnp.tanh(c[0] + x + c[1]), (c[1] * 0.5 + x.sum()).astype(SINGLE)), c), (START, START.astype(SINGLE)), XS),
    "half and single precision": of(
        lambda c, x: ((jnp.tanh(c[0] + x), c[1] + c[0].astype(SINGLE)), c[1]), (START.astype(HALF), START.astype(SINGLE)), XS.astype(HALF)
    ),
    "a carry in half precision under single": of(lambda h, x: (jnp.tanh(h * x).astype(HALF), h * x), START.astype(HALF), XS.astype(SINGLE)),
    "sums in another precision": of(lambda s, x: (s + x.astype(SINGLE).sum(), s.astype(HALF)), SINGLE(0), XS.astype(HALF)),
    "a weak carry that stays weak": of(lambda h, _: (h * 0.5, h), 0.5, None, 4),
    "a weak carry promoted to single": of(lambda h, x: (h * 0.5 * x, h), 0.5, ONES),
    "a weak carry promoted to half": of(lambda h, x: (h * x, h), 0.5, ONES.astype(HALF)),
    "a weak integer promoted to floating point": of(lambda h, x: (h * x, h), 1, ONES),
    "a weak integer that stays": of(lambda n, x: (n + 1, n * x), 0, XS),
    "a weak integer promoted to eight bits": of(lambda n, x: (n + x, n), 0, jnp.arange(4, dtype=jnp.int8)),
    "a weak carry promoted to complex": of(lambda h, x: (h * x, jnp.abs(h)), 0.5, 1j * ONES),
    "weak beside strong": of(lambda c, x: ((c[0] * 0.5 + x, c[1] * x), c), (0.0, jnp.ones(3, SINGLE)), ONES),
    "two weak leaves, one promoted": of(lambda c, x: ((c[0] * x, c[1] * 2.0), c), (0.5, 0.25), ONES),
    "a promotion that goes on": of(lambda c, x: ((c[0] * x, c[1] + c[0]), c), (0.5, 0.25), ONES),
    "a promotion to whole numbers": of(lambda h, x: (x, h), 0.5, jnp.arange(4)),
    "a promotion too far": of(lambda c, x: ((c[0] * x, c[1] + c[0], c[2] * c[1]), c), (0.5, 0.25, 0.125), ONES),
    "a weak array": of(lambda h, x: (h * x, h), jnp.broadcast_to(0.5, (3,)), ONES),
    "a strong carry that comes out weak": of(lambda h, x: (jnp.asarray(2.0), h * x), jnp.float64(0.3), XS),
    "a numpy scalar": of(lambda h, x: (h * x, h), np.float32(0.5), ONES),
    "weak xs": of(lambda h, x: (h * x, h), jnp.ones(3, SINGLE), WEAK),
    "weak xs under half precision": of(lambda h, x: (jnp.tanh(h * x), (h * x, x)), jnp.ones(3, HALF), WEAK),
    "weak integers for xs": of(lambda h, x: (jnp.tanh(h * x), (x * jnp.int8(2), x)), jnp.ones(3, HALF), jnp.broadcast_to(2, (4,))),
    "weak ys": of(lambda h, x: (jnp.tanh(h + x), (1.0, 2, h.sum() * 0 + 1.0)), START, XS),
    "weak ys of a weak carry": of(lambda h, _: ((g := h * 0.5), (g, h * 2.0, h > 0)), 0.5, None, 4),
    "weak ys of closed-over scalars": of(lambda h, x: (jnp.tanh(h + x), jnp.sin(0.5)), START, XS),
    "a complex carry": of(lambda z, x: (z * jnp.exp(1j * x.sum()) * 0.9, jnp.abs(z)), START + 0j, XS),
    "a complex leaf beside a real one": of(lambda c, x: ((c[0] * 1j, jnp.tanh(c[1] + x)), c), (START + 0j, START), XS),
    "complex xs of a real carry": of(lambda h, x: (jnp.tanh(h + jnp.abs(x)), x * h), START, XS * (1 + 2j)),
    "complex inside": of(lambda h, x: (jnp.tanh(h + jnp.real(jnp.exp(1j * x))), jnp.exp(1j * h)), START, XS),
    "complex single precision": of(lambda z, x: (z * x, z), jnp.complex64(1 + 1j), jnp.ones(4, jnp.complex64)),
}

# --- transformations --------------------------------------------------------------------------------------------------------------

BATCH = jnp.stack([START, -START])
BATCHES = jnp.stack([XS, 0.5 * XS])


def final_only(scan):
    return lambda h, xs: scan(cell, h, xs)[0].sum()


def some_ys(scan):
    return lambda h, xs: scan(lambda h, x: (jnp.tanh(h @ WEIGHTS + x), (h, jnp.sin(x), h * x)), h, xs)[1][2].sum()


def sums(scan):
    """Of one x at a time, summed: linear in the carry and in x."""
    return lambda h, xs: scan(lambda h, x: (h @ WEIGHTS + x, 2 * h), h, xs)


def batched(**options: Any) -> Callable:
    return lambda f: jax.vmap(f, **options)


def tangents_of(f):
    """Pushed through the linearisation."""
    return lambda *args: (lambda linear: (linear[0], linear[1](*args)))(jax.linearize(f, *args))


def pulled(f):
    """Cotangents of ones, with a value beside."""

    def run(*args):
        out, pull, aux = jax.vjp(lambda *args: (f(*args)[0], f(*args)[1]), *args, has_aux=True)
        return out, aux, pull(jnp.ones_like(out))

    return run


def grads(*places: int) -> Callable:
    return lambda f: jax.jit(jax.grad(f, places))


def avals_of(tree):
    """Shapes, dtypes and weak types as arrays that can be compared."""
    return jax.tree.map(lambda a: (np.array(a.shape, int), np.array(str(a.dtype) + str(getattr(a, "weak_type", None)))), tree)


def donated(scan):
    run = jax.jit(lambda h, xs: scan(cell, h, xs)[0], donate_argnums=0)
    return run(START + 0, XS)


def statically(scan):
    run = jax.jit(lambda h, n, options: scan(lambda h, _: (jnp.tanh(h @ WEIGHTS), h), h, None, n, **dict(options)), static_argnums=(1, 2))
    return run(START, 3, (("reverse", True),)), run(START, 5, (("unroll", 2),))


LOSS = (WEIGHTS, START, XS)
TRANSFORMATIONS = {
    "grad by all": with_scan(through, *LOSS, transform=grads(0, 1, 2)),
    "grad not under jit": with_scan(through, *LOSS, transform=lambda f: jax.grad(f, (0, 1, 2))),
    "grad by the closure alone": with_scan(through, *LOSS, transform=grads(0)),
    "grad by the carry alone": with_scan(through, *LOSS, transform=grads(1)),
    "grad by xs alone": with_scan(through, *LOSS, transform=grads(2)),
    "value_and_grad": with_scan(through, *LOSS, transform=lambda f: jax.jit(jax.value_and_grad(f))),
    "grad of the final carry alone": with_scan(final_only, START, XS, transform=grads(0, 1)),
    "grad of some ys": with_scan(some_ys, START, XS, transform=grads(0, 1)),
    "grad of one step's y": with_scan(lambda scan: lambda h, xs: scan(cell, h, xs)[1][0][1].sum(), START, XS, transform=grads(0, 1)),
    "grad of nothing": with_scan(lambda scan: lambda h, xs: 0.0 * scan(cell, h, xs)[0].sum(), START, XS, transform=grads(0)),
    "grad of what does not depend": with_scan(lambda scan: lambda w: scan(cell, START, XS)[0].sum() + w, 1.0, transform=grads(0)),
    "integers allowed": with_scan(
        lambda scan: lambda n: scan(lambda c, x: ((c[0] * x, c[1] + 1), None), (START, n), XS)[0][0].sum(),
        jnp.int32(2),
        transform=lambda f: lambda n: np.array(str(jax.grad(f, allow_int=True)(n).dtype)),
    ),
    "jvp": with_scan(through, *LOSS, transform=lambda f: jax.jit(lambda *a: jax.jvp(f, a, a))),
    "jvp by xs alone": with_scan(through, *LOSS, transform=lambda f: lambda w, h, x: jax.jvp(lambda x: f(w, h, x), (x,), (x,))),
    "linearize": with_scan(through, *LOSS, transform=tangents_of),
    "vjp with an aux": with_scan(lambda scan: lambda h, x: scan(cell, h, x), START, XS, transform=pulled),
    "jacfwd": with_scan(lambda scan: lambda h: scan(cell, h, XS)[0], START, transform=lambda f: jax.jit(jax.jacfwd(f))),
    "jacrev": with_scan(lambda scan: lambda h: scan(cell, h, XS)[0], START, transform=lambda f: jax.jit(jax.jacrev(f))),
    "hessian": with_scan(through, *LOSS, transform=lambda f: jax.jit(jax.hessian(f, 1))),
    "hessian in xs and the closure": with_scan(through, *LOSS, transform=lambda f: jax.jit(lambda *a: jax.jvp(jax.grad(f, (0, 2)), a, a)[1])),
    "reverse over reverse": with_scan(through, *LOSS, transform=lambda f: jax.jit(jax.grad(lambda w, h, x: (jax.grad(f, 1)(w, h, x) ** 2).sum(), (0, 2)))),
    "third order": with_scan(
        lambda scan: lambda h: scan(lambda h, x: (jnp.sin(h) * x, h), h, XS[:3, 1])[1].sum(), 0.3, transform=lambda f: jax.jit(jax.grad(jax.grad(jax.grad(f))))
    ),
    "linear_transpose": with_scan(sums, transform=lambda f: lambda: jax.linear_transpose(f, START, XS)((START, XS))),
    "vmap over carry and xs": with_scan(lambda s: lambda h, x: s(cell, h, x), BATCH, BATCHES, transform=batched()),
    "vmap over the carry": with_scan(lambda s: lambda h, x: s(cell, h, x), BATCH, XS, transform=batched(in_axes=(0, None))),
    "vmap over xs": with_scan(lambda s: lambda h, x: s(cell, h, x), START, BATCHES, transform=batched(in_axes=(None, 0))),
    "vmap over another axis": with_scan(
        lambda s: lambda h, x: s(cell, h, x), BATCH.T, BATCHES.transpose(1, 2, 0), transform=batched(in_axes=(1, 2), out_axes=1)
    ),
    "vmap through the closure": with_scan(through, jnp.stack([WEIGHTS, -WEIGHTS]), START, XS, transform=batched(in_axes=(0, None, None))),
    "vmap of a dict": with_scan(
        lambda s: lambda c: s(lambda c, x: ({"a": jnp.tanh(c["a"] + x), "n": c["n"] + 1}, c["n"]), c, XS),
        {"a": BATCH, "n": jnp.int32(0)},
        transform=batched(in_axes=({"a": 0, "n": None},), out_axes=(({"a": 0, "n": None}), None)),
    ),
    "out_axes=None for what is not batched": with_scan(
        lambda s: lambda h: s(lambda c, x: ((jnp.tanh(c[0] + x), jnp.sin(c[1])), c[1]), (h, START), XS), BATCH, transform=batched(out_axes=((0, None), None))
    ),
    "nothing batched": with_scan(lambda s: lambda h: s(cell, START, XS)[0] + h, BATCH, transform=batched()),
    "vmap twice": with_scan(lambda s: lambda h, x: s(cell, h, x)[0], BATCH, BATCHES, transform=lambda f: jax.vmap(jax.vmap(f, (None, 0)), (0, None))),
    "vmap of grad": with_scan(through, WEIGHTS, BATCH, BATCHES, transform=lambda f: jax.jit(jax.vmap(jax.grad(f, (0, 1, 2)), (None, 0, 0)))),
    "grad of vmap": with_scan(
        through, *LOSS[:1], BATCH, XS, transform=lambda f: jax.jit(jax.grad(lambda *a: jax.vmap(f, (None, 0, None))(*a).sum(), (0, 1, 2)))
    ),
    "vmap of jvp of a part": with_scan(
        through, WEIGHTS, BATCH, XS, transform=lambda f: jax.vmap(lambda w, h, x: jax.jvp(lambda h: f(w, h, x), (h,), (h,)), (None, 0, None))
    ),
    "a collective over vmap": with_scan(
        lambda s: lambda h: s(lambda h, x: (jnp.tanh(h + lax.pmean(h * x, "batch")), None), h, XS)[0], BATCH, transform=batched(axis_name="batch")
    ),
    "a collective of the inputs": with_scan(
        lambda s: lambda x: s(cell, START, lax.psum(x, "batch"))[0], BATCHES, transform=batched(axis_name="batch", out_axes=None)
    ),
    "jit of parts": with_scan(lambda s: lambda h, x: jax.jit(lambda h: s(cell, h, x))(h), START, XS),
    "donated arguments": donated,
    "static arguments": statically,
    "eval_shape": lambda scan: avals_of(jax.eval_shape(lambda h, x: scan(cell, h, x), jax.ShapeDtypeStruct((3,), float), jax.ShapeDtypeStruct((4, 3), float))),
    "eval_shape of weak types": lambda scan: avals_of(jax.eval_shape(lambda x: scan(lambda h, x: (h * 0.5, (h, x, 1.0)), 0.5, x), XS)),
    "make_jaxpr": lambda scan: avals_of(jax.make_jaxpr(lambda h, x: scan(lambda h, x: (h * x, (h, 2)), h, x))(0.5, ONES).out_avals),
    "ahead of time": lambda scan: jax.jit(lambda h, x: scan(cell, h, x)).lower(START, XS).compile()(START, XS),
    "exported": lambda scan: jax.export.export(jax.jit(jax.grad(through(scan))))(*LOSS).call(*LOSS),
    "closure_convert": with_scan(
        lambda scan: (
            lambda w, h, x: jax.closure_convert(lambda h: through(scan)(w, h, x), h)[0](h, *jax.closure_convert(lambda h: through(scan)(w, h, x), h)[1])
        ),
        *LOSS,
    ),
    "checkpoint around": with_scan(through, *LOSS, transform=lambda f: jax.jit(jax.grad(jax.checkpoint(f), (0, 1, 2)))),
    "checkpoint around, everything kept": with_scan(
        through, *LOSS, transform=lambda f: jax.jit(jax.grad(jax.checkpoint(f, policy=jax.checkpoint_policies.everything_saveable), (0, 1, 2)))
    ),
    "checkpoint around, dots kept": with_scan(
        through, *LOSS, transform=lambda f: jax.jit(jax.grad(jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable), (0, 1, 2)))
    ),
    "checkpoint of the step": of(jax.checkpoint(cell), START, XS),
    "checkpoint inside the step": of(lambda h, x: (jax.checkpoint(lambda h: jnp.tanh(jnp.sin(h) + x))(h), h), START, XS),
    "checkpoint of names": of(
        jax.checkpoint(lambda h, x: (checkpoint_name(jnp.tanh(h @ WEIGHTS + x), "new"), h), policy=jax.checkpoint_policies.save_only_these_names("new")),
        START,
        XS,
    ),
    "holomorphic": with_scan(
        lambda s: lambda z: s(lambda z, x: (jnp.sin(z) * x, None), z, XS[:, 1])[0], 0.3 + 0.1j, transform=lambda f: jax.grad(f, holomorphic=True)
    ),
}

# --- other programs inside and around -------------------------------------------------------------------------------------------


@jax.custom_jvp
def rounded(x):
    return jnp.round(x)


rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.05, 0.05),))


@jax.custom_gradient
def doubled_back(x):
    return jnp.sin(x), lambda g: 2 * g


@jax.custom_batching.custom_vmap
def batched_otherwise(x):
    return jnp.sin(x)


batched_otherwise.def_vmap(lambda _, batched, x: (jnp.sin(x), batched[0]))


def symbolic():
    """A rule that asks which tangents are zero."""
    f = jax.custom_jvp(lambda a, b: a * b)

    def rule(primals, tangents):
        (a, b), (da, db) = primals, tangents
        zero = jax.custom_derivatives.SymbolicZero
        parts = [p for p in (None if isinstance(da, zero) else da * b, None if isinstance(db, zero) else a * db) if p is not None]
        return a * b, sum(parts, jnp.zeros_like(a))

    f.defjvp(rule, symbolic_zeros=True)
    return f


SYMBOLIC = symbolic()


def inner_scan(scan):
    """A scan in the step of a scan, that closes over the outer carry."""

    def loss(w, h, xs):
        def outer(h, x):
            inner = lambda g, u: (jnp.tanh(g @ w + u * h), g.sum())
            g, sums = scan(inner, h, jnp.stack([x, 2 * x]))
            return g, sums

        return magnitude(scan(outer, h, xs))

    return loss


def in_a_loop(scan, kind):
    def loss(h, xs):
        body = lambda h: scan(cell, h, xs)[0]
        if kind == "fori":
            return lax.fori_loop(0, 3, lambda _, h: body(h), h).sum()
        if kind == "while":
            return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, body(c[1])), (0, h))[1].sum()
        if kind == "cond":
            return lax.cond(xs[0, 0] < 1, body, lambda h: h, h).sum()
        if kind == "switch":
            return lax.switch(1, [lambda h: h, body], h).sum()
        if kind == "map":
            return lax.map(body, jnp.stack([h, 2 * h])).sum()
        return lax.associative_scan(lambda a, b: a * b + body(h), jnp.stack([h, 2 * h])).sum()

    return loss


def custom_around(scan):
    """A scan inside a function with a derivative of its own."""

    @jax.custom_jvp
    def f(h):
        return scan(cell, h, XS)[0]

    f.defjvp(lambda p, t: (f(*p), 3 * jax.jvp(lambda h: scan(cell, h, XS)[0], p, t)[1]))
    return lambda h: f(h).sum()


def custom_vjp_around(scan):
    @jax.custom_vjp
    def f(h):
        return scan(cell, h, XS)[0]

    f.defvjp(lambda h: jax.vjp(lambda h: scan(cell, h, XS)[0], h), lambda pull, g: pull(g))
    return lambda h: f(h).sum()


def rule_of_a_tracer(scan):
    """A rule that reads what an outer transformation replaces."""

    def loss(w, h):
        q = jax.custom_jvp(jnp.sin)
        q.defjvp(lambda p, t: (q(*p), w * t[0]))
        return scan(lambda h, x: (q(h) + x, None), h, XS)[0].sum()

    return loss


INSIDE = {
    "custom_jvp": of(lambda h, x: (jax.nn.relu(h + x) + jax.nn.silu(h), rounded(h)), START, XS),
    "custom_vjp": backwards(lambda h, x: (clipped(jnp.tanh(1.5 * h + x)), h), START, XS),
    "custom_vjp of x alone": backwards(lambda h, x: (jnp.tanh(h + clipped(x)), h), START, XS),
    "custom_vjp of an inner jit": backwards(lambda h, x: (jax.jit(lambda h: clipped(h) * 0.5)(jnp.tanh(h + x)), h), START, XS),
    "custom_gradient": backwards(lambda h, x: (doubled_back(h) + x, h), START, XS),
    "custom_vmap": values(lambda h, x: (batched_otherwise(h) + x, h), START, XS),
    "symbolic zeros": of(lambda h, x: (jnp.tanh(SYMBOLIC(h, x)), SYMBOLIC(x, x)), START, XS),
    "a rule of a tracer": with_scan(rule_of_a_tracer, 2.0, START, transform=lambda f: jax.jit(jax.grad(f, 1))),
    "custom_jvp around": with_scan(custom_around, START, transform=grads(0)),
    "custom_vjp around": with_scan(custom_vjp_around, START, transform=grads(0)),
    "cond": of(lambda h, x: (lax.cond(x[0] > 0, jnp.sin, jnp.tanh, h + x), h), START, XS),
    "cond with a branch that divides by zero": of(lambda h, x: (lax.cond(x[0] > 0, lambda: jnp.tanh(h * jnp.sqrt(x[0])), lambda: jnp.sin(h)), h), START, XS),
    "switch": of(lambda h, x: (lax.switch(x[1], [jnp.sin, jnp.tanh, lambda h: h * 0.5], h + x[0]), h), START, (XS, jnp.array([0, 1, 2, 7]))),
    "while_loop": with_scan(
        lambda s: lambda h: s(lambda h, x: (lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] + x)), (0, h))[1], h), h, XS),
        START,
        transform=lambda f: lambda h: jax.jvp(f, (h,), (h,)),
    ),
    "while_loop, backwards": of(lambda h, x: (lax.while_loop(lambda h: h.sum() > 9, lambda h: h / 2, h) + x, h), START, XS),
    "fori_loop": of(lambda h, x: (lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h * x + i), h), h), START, XS),
    "scan": with_scan(inner_scan, *LOSS, transform=grads(0, 1, 2)),
    "lax.scan": of(lambda h, x: lax.scan(lambda g, u: (jnp.tanh(g @ WEIGHTS + u), g.sum()), h, jnp.stack([x, h])), START, XS),
    "lax.map": of(lambda h, x: (lax.map(lambda a: jnp.tanh(a + x[0]), h), h), START, XS),
    "associative_scan": of(lambda h, x: (lax.associative_scan(jnp.multiply, jnp.tanh(h + x)), h), START, XS),
    "cumsum": of(lambda h, x: (jnp.tanh(jnp.cumsum(h) + x), lax.cummax(h)), START, XS),
    "vmap": of(lambda h, x: (jax.vmap(lambda a, b: jnp.tanh(a * b))(h, x), h), START, XS),
    "grad": of(lambda h, x: (h - 0.1 * jax.grad(lambda h: jnp.sum(jnp.cos(h @ WEIGHTS) * x))(h), h), START, XS),
    "hessian": of(lambda h, x: (jax.hessian(lambda h: jnp.sum(jnp.sin(h) * x * h[::-1]))(h) @ h, None), START, XS),
    "an optimisation barrier": of(lambda h, x: (lax.optimization_barrier(jnp.tanh(h + x)), h), START, XS),
    "a linear solve of one's own": of(
        lambda h, x: (lax.custom_linear_solve(lambda v: 3 * v, jnp.tanh(h + x), lambda _, b: b / 3, lambda _, b: b / 3), None), START, XS
    ),
    "reduced precision": of(lambda h, x: (lax.reduce_precision(jnp.tanh(h + x), 11, 50), None), START, XS),
    "a callback for values": with_scan(
        lambda s: lambda h: s(lambda h, x: (jnp.tanh(h + jax.pure_callback(lambda a: np.sin(a), x, x, vmap_method="sequential")), h), h, XS), START
    ),
    "a callback, differentiated": with_scan(
        lambda s: lambda h: s(lambda h, x: (jax.pure_callback(np.sin, h, h), h), h, XS)[0].sum(), START, transform=grads(0)
    ),
    "inside fori_loop": with_scan(lambda s: in_a_loop(s, "fori"), START, XS, transform=grads(0, 1)),
    "inside while_loop": with_scan(lambda s: in_a_loop(s, "while"), START, XS),
    "inside cond": with_scan(lambda s: in_a_loop(s, "cond"), START, XS, transform=grads(0, 1)),
    "inside switch": with_scan(lambda s: in_a_loop(s, "switch"), START, XS, transform=grads(0, 1)),
    "inside lax.map": with_scan(lambda s: in_a_loop(s, "map"), START, XS, transform=grads(0, 1)),
    "inside associative_scan": with_scan(lambda s: in_a_loop(s, "associative"), START, XS),
    "two scans, one after another": with_scan(lambda s: lambda h, x: s(cell, s(cell, h, x)[0], s(cell, h, x)[1][0])[0].sum(), START, XS, transform=grads(0, 1)),
    "scanned, then reversed": with_scan(lambda s: lambda h, x: s(cell, h, s(cell, h, x)[1][0], reverse=True)[0].sum(), START, XS, transform=grads(0, 1)),
    "a scan of gradients of scans": with_scan(
        lambda s: lambda w, h, x: s(lambda w, _: (w - 0.1 * jax.grad(through(s))(w, h, x), through(s)(w, h, x)), w, None, 3)[1].sum(),
        WEIGHTS,
        START,
        XS,
        transform=lambda f: jax.jit(f),
    ),
}


# --- effects --------------------------------------------------------------------------------------------------------------------------


def seen_by(register: Callable[[Callable, Any], Any], options: dict | None = None) -> Case:
    """What a callback in the step is given, in order."""

    def run(scan):
        seen = []

        def f(h, x):
            register(lambda *a: seen.append([float(np.ravel(v)[0]) for v in a]), x)
            return jnp.tanh(h + x), h

        out = jax.jit(lambda h, xs: scan(f, h, xs, **(options or {})))(START, XS)
        jax.block_until_ready(out)
        jax.effects_barrier()
        return out, np.array(seen)

    return run


def gradient_seen(scan):
    """Callbacks when the scan is differentiated: how often, and with what."""
    seen = []

    def f(h, x):
        jax.debug.callback(lambda v: seen.append(float(v)), x[0])
        return jnp.tanh(h + x), h

    out = jax.grad(lambda h: magnitude(scan(f, h, XS)))(START)
    jax.block_until_ready(out)
    jax.effects_barrier()
    return out, np.sort(seen)


def mutated(scan):
    seen = jax.new_ref(jnp.zeros(3))

    def f(h, x):
        seen[...] += x
        return jnp.tanh(h + x), h

    return scan(f, START, XS), seen[...]


def ref_inside(scan):
    def f(h, x):
        ref = jax.new_ref(h)
        ref[...] += x
        return jnp.tanh(ref[...]), h

    return jax.grad(lambda h: magnitude(scan(f, h, XS)))(START)


def explicit_mesh(scan):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    put = lambda x, *spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
    return jax.jit(jax.grad(lambda h, xs: magnitude(scan(cell, h, xs)), (0, 1)))(
        put(jnp.stack([START] * 2), "d", None), put(jnp.stack([XS] * 2, 1), None, "d", None)
    )


EFFECTS = {
    "an ordered callback": seen_by(lambda see, x: jax.debug.callback(see, x, ordered=True)),
    "an ordered callback in reverse": seen_by(lambda see, x: jax.debug.callback(see, x, ordered=True), {"reverse": True}),
    "an ordered callback, unrolled": seen_by(lambda see, x: jax.debug.callback(see, x, ordered=True), {"unroll": 2}),
    "an io_callback": seen_by(lambda see, x: jax.experimental.io_callback(lambda v: see(v), None, x, ordered=True)),
    "callbacks when differentiated": gradient_seen,
    "a reference closed over": mutated,
    "a reference inside the step": ref_inside,
    "an explicit mesh": explicit_mesh,
}

# --- settings -------------------------------------------------------------------------------------------------------------------------


def setting(name: str, value: Any) -> Callable[[], contextlib.AbstractContextManager]:
    @contextlib.contextmanager
    def context():
        before = jax.config.values[name]
        jax.config.update(name, value)
        try:
            yield
        finally:
            jax.config.update(name, before)

    return context


single = functools.partial(jax.enable_x64, False)


def branches(h, x):
    """Python's own control flow, which needs values."""
    return (jnp.tanh(h + x) if x[0] > 0 else jnp.sin(h)), float(h[0])


def leaking(scan):
    """What kind of error: its text names objects by address."""
    leaked = []
    try:
        scan(lambda h, x: (leaked.append(h) or jnp.tanh(h + x), h), START, XS)
    except Exception as error:
        raise type(error)("leaked") from error


def fresh(dtype):
    """Made under the setting that counts: a plain case with arrays of numpy's."""
    return of(lambda h, x: (jnp.tanh(h * x), (h, x.sum(), 1.0)), np.asarray(START, dtype), np.asarray(XS, dtype))


SETTINGS = {
    "x64 off": under(single, fresh("float32")),
    "x64 off, double precision from numpy": under(single, fresh("float64")),
    "x64 off, weak": under(single, of(lambda c, x: ((c[0] * 0.5, c[1] + 1), (c, x)), (0.5, 0), np.ones(4, np.float32))),
    "x64 off, a key and a counter": under(single, of(keyed, (np.ones(3, np.float32), jax.random.PRNGKey(0), np.int32(0)), np.ones((4, 3), np.float32))),
    "leak checking": under(jax.checking_leaks, of(cell, START, XS)),
    "leak checking, second order": under(jax.checking_leaks, with_scan(through, *LOSS, transform=lambda f: jax.jit(jax.hessian(f, 1)))),
    "leak checking, vmap": under(jax.checking_leaks, with_scan(through, WEIGHTS, BATCH, XS, transform=batched(in_axes=(None, 0, None)))),
    "debug_nans": under(functools.partial(jax.debug_nans, True), with_scan(through, *LOSS, transform=grads(0, 1, 2))),
    "debug_nans at infinities that come to nothing": under(
        functools.partial(jax.debug_nans, True), of(lambda h, x: (jnp.where(h > -9, jnp.tanh(h + x), 0.0), h), START, XS)
    ),
    "debug_nans at a NaN": under(functools.partial(jax.debug_nans, True), values(lambda h, x: (jnp.log(h - 9), h), START, XS)),
    "debug_infs": under(functools.partial(jax.debug_infs, True), with_scan(through, *LOSS, transform=grads(0, 1, 2))),
    "debug_infs at one": under(functools.partial(jax.debug_infs, True), values(lambda h, x: (h / (x * 0), h), START, XS)),
    "no promotion of rank": under(functools.partial(jax.numpy_rank_promotion, "raise"), of(cell, START, XS)),
    "no promotion of rank, second order": under(
        functools.partial(jax.numpy_rank_promotion, "raise"), with_scan(through, *LOSS, transform=lambda f: jax.jit(jax.hessian(f, 1)))
    ),
    "no promotion of rank, a permutation beside an elementwise leaf": under(
        functools.partial(jax.numpy_rank_promotion, "raise"), of(lambda c, x: ((c[0][::-1] * x, c[1] + x), c[0]), (START, START), XS)
    ),
    "a promotion of rank": under(functools.partial(jax.numpy_rank_promotion, "raise"), of(lambda h, x: (h * x, None), jnp.ones((2, 3)), XS)),
    "strict dtypes": under(functools.partial(jax.numpy_dtype_promotion, "strict"), of(lambda h, x: (jnp.tanh(h * x), h), *as_(HALF, START, XS))),
    "strict dtypes beside a counter": under(
        functools.partial(jax.numpy_dtype_promotion, "strict"),
        of(lambda c, x: ((jnp.tanh(c[0] * x), c[1] + 1), (c[0] * 2.0, c[1])), (START.astype(SINGLE), jnp.int32(0)), XS.astype(SINGLE)),
    ),
    "a promotion where none is allowed": under(
        functools.partial(jax.numpy_dtype_promotion, "strict"), of(lambda h, x: (h * x, None), START, XS.astype(SINGLE))
    ),
    "without jit": under(jax.disable_jit, values(cell, START, XS)),
    "without jit, in reverse": under(jax.disable_jit, values(cell, START, XS, reverse=True)),
    "without jit, Python's control flow": under(jax.disable_jit, values(branches, START, XS)),
    "without jit, differentiated": under(jax.disable_jit, with_scan(through, *LOSS, transform=lambda f: jax.grad(f, (0, 1, 2)))),
    "without jit, no steps": under(jax.disable_jit, values(cell, START, XS[:0])),
    "without jit, a carry that changes": under(jax.disable_jit, values(lambda h, x: (jnp.append(h, x[0]), None), START, XS)),
    "checks of JAX's own": under(setting("jax_enable_checks", True), with_scan(through, *LOSS, transform=grads(0, 1, 2))),
    "the highest precision of products": under(functools.partial(jax.default_matmul_precision, "highest"), with_scan(through, *LOSS, transform=grads(0, 1, 2))),
    "no transfers": under(functools.partial(jax.transfer_guard, "disallow"), with_scan(lambda s: lambda h, x: s(keep, h, x), START, XS, transform=lambda f: f)),
    "raw keys of another kind": under(setting("jax_default_prng_impl", "rbg"), lambda scan: of(keyed, (START, jax.random.PRNGKey(0), jnp.int32(0)), XS)(scan)),
    "a tracer that leaks": under(jax.checking_leaks, leaking),
}

# --- errors ---------------------------------------------------------------------------------------------------------------------------

ERRORS = {
    "f is no function": values(3, START, XS),
    "f takes one argument": values(lambda h: (h, None), START, XS),
    "f raises": values(lambda h, x: ({}["missing"], None), START, XS),
    "f returns no pair": values(lambda h, x: h, START, XS),
    "f returns a triple": values(lambda h, x: (h, x, x), START, XS),
    "f returns None": values(lambda h, x: None, START, XS),
    "f returns an array of two": values(lambda h, x: jnp.ones(2), START, XS),
    "f returns a string": values(lambda h, x: (h, "y"), START, XS),
    "f returns an object": values(lambda h, x: (h, object()), START, XS),
    "f branches on a value": values(branches, START, XS),
    "the carry gets another structure": values(lambda h, x: ((h, h), None), START, XS),
    "the carry loses a leaf": values(lambda c, x: ({"a": c["a"]}, None), {"a": START, "b": START}, XS),
    "the carry becomes a list": values(lambda c, x: ([c[0], c[1]], None), (START, START), XS),
    "the carry becomes another namedtuple": values(lambda c, x: (Typed(c.a, c.b), None), Point(START, START), XS),
    "a None becomes an array": values(lambda c, x: ((c[0], x), None), (START, None), XS),
    "an array becomes None": values(lambda h, x: (None, None), START, XS),
    "the carry gets another shape": values(lambda c, x: ({"a": c["a"], "b": c["b"][None]}, None), {"a": START, "b": START}, XS),
    "the carry gets another rank": values(lambda h, x: (h + x, None), jnp.float64(0), XS),
    "the carry gets another dtype": values(lambda h, x: (h.astype(SINGLE), None), START, XS),
    "an integer becomes floating": values(lambda n, x: (n * x.sum(), None), jnp.int32(0), XS),
    "a weak carry gets another shape": values(lambda h, x: (h + x, None), 0.0, XS),
    "many leaves differ": values(lambda c, x: ({k: v[None] for k, v in c.items()}, None), {"a": START, "b": START, "c": START}, XS),
    "static fields differ": values(lambda c, x: (State(c.h, c.n, "other"), None), State(START, START), XS),
    "neither xs nor length": values(cell, START),
    "neither, xs of Nones": values(cell, START, {"a": None}),
    "xs of different lengths": values(cell, START, (XS, XS[:3])),
    "a length that disagrees": values(cell, START, XS, 5),
    "a length that is traced": with_scan(lambda scan: lambda n: scan(lambda h, _: (h, None), START, None, n), 4),
    "a length that is an array of several": values(lambda h, _: (h, None), START, None, np.array([4, 4])),
    "xs that are a scalar": values(cell, START, 1.0),
    "xs that are an array without axes": values(cell, START, jnp.float64(1)),
    "a scalar among xs": values(cell, START, (XS, 2.0)),
    "xs that are a list of numbers": values(lambda h, x: (h, x), START, [1.0, 2.0]),
    "xs that are a string": values(cell, START, "abcd"),
    "xs of objects": values(cell, START, np.array([object()] * 4)),
    "a carry that is a string": values(lambda h, x: (h, None), "start", XS),
    "a carry of objects": values(lambda h, x: (h, None), object(), XS),
    "a carry of strings of numpy's": values(lambda h, x: (h, None), np.array(["a"]), XS),
    "unroll=-1": values(cell, START, XS, unroll=-1),
    "unroll=1.5": values(cell, START, XS, unroll=1.5),
    "unroll is a string": values(cell, START, XS, unroll="all"),
    "unroll is None": values(cell, START, XS, unroll=None),
    "unroll that is traced": with_scan(lambda scan: lambda n: scan(cell, START, XS, unroll=n), 2),
    "reverse that is traced": with_scan(lambda scan: lambda r: scan(cell, START, XS, reverse=r), True),
    "shapes that do not fit inside": values(lambda h, x: (h @ jnp.ones((2, 3)), None), START, XS),
    "grad of a vector": with_scan(lambda scan: lambda h: scan(cell, h, XS)[0], START, transform=jax.grad),
    "grad by integers": with_scan(lambda scan: lambda n: scan(lambda h, x: (h * n + x, None), START, XS)[0].sum(), 2, transform=jax.grad),
    "grad of a while_loop": with_scan(
        lambda s: lambda h: s(lambda h, x: (lax.while_loop(lambda h: h.sum() < 9, lambda h: h * h + 2, h) + x, None), h, XS)[0].sum(), START, transform=jax.grad
    ),
    "jvp of a custom_vjp": with_scan(
        lambda s: lambda h: s(lambda h, x: (clipped(h), None), h, XS)[0], START, transform=lambda f: lambda h: jax.jvp(f, (h,), (h,))
    ),
    "an axis that is not bound": values(lambda h, x: (lax.psum(h, "nowhere"), None), START, XS),
    "vmap of different sizes": with_scan(lambda s: lambda h, x: s(cell, h, x), BATCH, jnp.stack([XS] * 3), transform=batched()),
}

SECTIONS = {
    "options": OPTIONS,
    "function": FUNCTIONS,
    "tree": TREES,
    "leaf": LEAVES,
    "dtype": DTYPES,
    "transformation": TRANSFORMATIONS,
    "inside": INSIDE,
    "effect": EFFECTS,
    "setting": SETTINGS,
    "error": ERRORS,
}
CASES: dict[str, Case] = {f"{section}: {name}": case for section, cases in SECTIONS.items() for name, case in cases.items()}

# What an explicit parallel method refuses, and what it says; "auto" leaves it to `lax.scan`.
COMPLEX, EFFECT, REFERENCE, DRAWS, NO_VJP = (
    "carry is complex",
    "has a side effect",
    "uses a mutable reference",
    "draws other numbers",
    "reverse-mode derivative",
)
CUSTOM_VJP = "has a custom VJP"
REFUSED = {
    "leaf: keys of another kind": DRAWS,
    "dtype: a weak carry promoted to complex": COMPLEX,
    "dtype: a complex carry": COMPLEX,
    "dtype: a complex leaf beside a real one": COMPLEX,
    "dtype: complex single precision": COMPLEX,
    "transformation: a collective over vmap": "is a collective over the named axis 'batch'",
    "transformation: holomorphic": COMPLEX,
    "inside: custom_vjp": CUSTOM_VJP,
    "inside: custom_vjp of x alone": CUSTOM_VJP,
    "inside: custom_vjp of an inner jit": CUSTOM_VJP,
    "inside: custom_gradient": CUSTOM_VJP,
    "inside: custom_vmap": NO_VJP,
    "inside: while_loop": NO_VJP,
    "inside: while_loop, backwards": NO_VJP,
    "inside: a callback for values": NO_VJP,
    "inside: a callback, differentiated": NO_VJP,
    "effect: an ordered callback": EFFECT,
    "effect: an ordered callback in reverse": EFFECT,
    "effect: an ordered callback, unrolled": EFFECT,
    "effect: an io_callback": EFFECT,
    "effect: callbacks when differentiated": EFFECT,
    "effect: a reference closed over": REFERENCE,
    "effect: a reference inside the step": REFERENCE,
    "effect: an explicit mesh": "sharded over an explicit mesh axis",
    "setting: raw keys of another kind": DRAWS,
    "error: grad of a while_loop": NO_VJP,
    "error: jvp of a custom_vjp": CUSTOM_VJP,
}
