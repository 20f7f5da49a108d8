"""Operations of random programs: at least thirty JAX primitives.

An operation is a function of a `Picker`: it draws what it works on and how, and returns what it does to the values so far. Its float constants
and, where it says so, its indices are arguments of the program, hence unknown to the proof; other indices are closed over, hence known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

Shape = tuple[int, ...]
Operation = Callable[[Sequence[Any], Sequence[Any]], Any]


class Constant(NamedTuple):
    """An argument of a program: floats, or whole numbers from `low` to below `high`."""

    shape: Shape
    low: int | None = None
    high: int | None = None

    def value(self, random: np.random.Generator) -> np.ndarray:
        if self.low is None:
            return random.choice([-1.0, 1.0], self.shape) * random.uniform(0.3, 1.5, self.shape)
        return random.integers(self.low, self.high, self.shape).astype(np.int32)

    def spec(self, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, dtype if self.low is None else np.int32)


class Unfit(Exception):
    """No value is of the rank that an operation needs."""


class Picker:
    """Draws for one operation; `log` holds what was drawn."""

    def __init__(self, draw: Callable, shapes: list[Shape], constants: list[Constant]):
        self.draw, self.shapes, self.constants, self.log = draw, shapes, constants, []

    def integer(self, low: int, high: int) -> int:
        self.log.append(self.draw(st.integers(low, high)))
        return self.log[-1]

    def boolean(self) -> bool:
        return bool(self.integer(0, 1))

    def choice(self, *options: Any) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def value(self, rank: int = 1, like: Shape | None = None) -> tuple[int, Shape]:
        """A value of at least this rank, or of this shape; often the latest."""
        fits = [i for i, shape in enumerate(self.shapes) if (len(shape) >= rank if like is None else shape == like)]
        if not fits:
            raise Unfit
        i = fits[-1 - max(0, self.integer(0, 2 * len(fits)) - len(fits) - 1)]
        return i, self.shapes[i]

    def axis(self, shape: Shape) -> int:
        """An axis, the last one rather than the first: batch axes often stay apart."""
        return len(shape) - 1 - max(0, self.integer(0, 2 * len(shape) - 1) - len(shape))

    def constant(self, shape: Shape, low: int | None = None, high: int | None = None) -> int:
        self.constants.append(Constant(shape, low, high))
        return len(self.constants) - 1

    def known(self, shape: Shape, low: int, high: int) -> np.ndarray:
        return np.random.default_rng(self.integer(0, 1000)).integers(low, high, shape).astype(np.int32)

    def index(self, shape: Shape, low: int, high: int) -> Callable[[Sequence[Any]], Any]:
        """Whole numbers, known or not."""
        if self.boolean():
            value = self.known(shape, low, high)
            return lambda c: value
        i = self.constant(shape, low, high)
        return lambda c: c[i]


# --- elementwise, broadcast, transpose, reduce, dot ---------------------------------------------------------------------------


def unary(p: Picker) -> Operation:
    i, _ = p.value(0)
    f = p.choice(
        jnp.tanh, jnp.sin, jax.nn.sigmoid, jnp.negative, jax.nn.relu, jnp.abs, jnp.square, jnp.exp2, lambda x: x**3, jnp.arctan, jax.lax.erf, jnp.log1p
    )
    return lambda v, c: f(jnp.tanh(v[i]) * 0.5)


def scaled(p: Picker) -> Operation:
    i, shape = p.value(0)
    w = p.constant(shape[p.integer(0, len(shape)) :])
    f = p.choice(jnp.multiply, jnp.add, jnp.subtract, lambda x, w: x / w, jnp.minimum, lambda x, w: jnp.where(w > 0, x, 0.5 * w))
    return lambda v, c: f(v[i], c[w])


def binary(p: Picker) -> Operation:
    i, shape = p.value(0)
    j, _ = p.value(like=shape)
    f = p.choice(jnp.add, jnp.multiply, jnp.subtract, jnp.maximum, lambda a, b: a / (1 + b * b), lambda a, b: jnp.where(a > b, a, jnp.sin(b)))
    return lambda v, c: f(v[i], jnp.sin(v[j]))  # if both are one value, nothing cancels


def broadcast(p: Picker) -> Operation:
    i, shape = p.value(0)
    axis, size = p.integer(0, len(shape)), p.integer(1, 3)
    return lambda v, c: jnp.broadcast_to(jnp.expand_dims(v[i], axis), (*shape[:axis], size, *shape[axis:]))


def aggregate(p: Picker) -> Operation:
    i, shape = p.value(1)
    j, _ = p.value(like=shape)
    axis = p.axis(shape)
    return lambda v, c: v[i] - v[j].mean(axis, keepdims=True)


def transpose(p: Picker) -> Operation:
    i, shape = p.value(2)
    order = p.draw(st.permutations(range(len(shape))))
    p.log.append(order)
    return lambda v, c: jnp.transpose(v[i], order)


def reduce(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis, keep = p.axis(shape), p.boolean()
    f = p.choice(jnp.sum, jnp.mean, jnp.max, jnp.min, jnp.prod)
    return lambda v, c: f(v[i], axis=axis, keepdims=keep)


def softmax(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis = p.axis(shape)
    return lambda v, c: jax.nn.softmax(v[i], axis=axis)


def dot(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis = p.axis(shape)
    w = p.constant((shape[axis], p.choice(shape[axis], 2, 4)))
    return lambda v, c: jnp.moveaxis(jnp.tensordot(v[i], c[w], ([axis], [0])), -1, axis)


def batched_dot(p: Picker) -> Operation:
    i, shape = p.value(2)
    w = p.constant((shape[0], shape[-1], shape[-1]))
    return lambda v, c: jnp.einsum("b...i,bij->b...j", v[i], c[w])


def product(p: Picker) -> Operation:
    i, shape = p.value(2)
    j, _ = p.value(like=shape)
    how = p.choice("b...i,b...i->b...", "b...i,b...j->b...ij", "...i,...i->...", "b...i,c...i->bc...")
    return lambda v, c: jnp.einsum(how, v[i], v[j])


NARROW = [unary, scaled, binary, broadcast, aggregate, transpose, reduce, softmax, dot, dot, batched_dot, product]


# --- moves -------------------------------------------------------------------------------------------------------------------


def reshape(p: Picker) -> Operation:
    i, shape = p.value(1)
    size = int(np.prod(shape))
    first = p.choice(*(d for d in range(1, size + 1) if size % d == 0))
    f = p.choice(lambda x: x.reshape(first, size // first), lambda x: x.ravel(), lambda x: lax.reshape(x, (first, size // first), tuple(range(x.ndim))[::-1]))
    return lambda v, c: f(v[i])


def merge_batch(p: Picker) -> Operation:
    i, shape = p.value(2)
    w = p.constant((shape[-1], shape[-1]))
    return lambda v, c: (v[i].reshape(-1, shape[-1]) @ c[w]).reshape(shape)


def rearrange(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis, n = p.axis(shape), p.integer(1, 3)
    f = p.choice(
        lambda x: jnp.flip(x, axis),
        lambda x: jnp.roll(x, n, axis),
        lambda x: jnp.concatenate([x, jnp.sin(x)], axis),
        lambda x: jnp.repeat(x, 2, axis),
        lambda x: jnp.tile(x, (2,) + (1,) * (x.ndim - 1)),
        lambda x: jnp.stack([x, 2 * x], axis),
        lambda x: jnp.split(jnp.concatenate([x, x], axis), 2, axis)[1],
        lambda x: sum(jnp.unstack(x, axis=axis)),
        lambda x: jnp.rot90(x) if x.ndim == 2 else x[::-1],
        lambda x: jnp.diff(x, axis=axis, prepend=0),
    )
    return lambda v, c: f(v[i])


def concatenate(p: Picker) -> Operation:
    i, shape = p.value(1)
    j, _ = p.value(like=shape)
    axis = p.axis(shape)
    return lambda v, c: jnp.concatenate([v[i], v[j]], axis)


def pad(p: Picker) -> Operation:
    i, shape = p.value(1)
    least = -1 if shape[-1] > 1 else 0
    config = [*[(0, p.integer(0, 1), 0) for _ in shape[1:]], (p.integer(least, 2), p.integer(least, 2), p.integer(0, 1))]
    return lambda v, c: lax.pad(v[i], jnp.zeros((), v[i].dtype), config)


def strided(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis = p.axis(shape)
    cut = slice(p.choice(None, 1, -2), p.choice(None, -1), p.choice(1, 2, -1))
    return lambda v, c: v[i][(slice(None),) * axis + (cut,)]


def triangle(p: Picker) -> Operation:
    i, _ = p.value(2)
    f, k = p.choice(jnp.triu, jnp.tril), p.integer(-1, 1)
    return lambda v, c: f(v[i], k)


def masked(p: Picker) -> Operation:
    i, shape = p.value(1)
    j, _ = p.value(like=shape)
    index = p.index(shape, 0, 2)
    return lambda v, c: lax.select_n(jnp.asarray(index(c)) == 1, v[i], v[j])


# --- indices -----------------------------------------------------------------------------------------------------------------


def take(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis, mode = p.axis(shape), p.choice("fill", "clip", "wrap")
    index = p.index(p.choice((), (2,), (shape[axis],), (2, 2)), -shape[axis] - 1, shape[axis] + 1)
    return lambda v, c: jnp.take(v[i], index(c), axis=axis, mode=mode, fill_value=0.0)


def take_along(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis = p.axis(shape)
    index = p.index(shape, -shape[axis], shape[axis])
    return lambda v, c: jnp.take_along_axis(v[i], index(c), axis)


def pick_pairs(p: Picker) -> Operation:
    i, shape = p.value(2)
    rows, columns = p.index((3,), 0, shape[0]), p.index((3,), -1, shape[1])
    return lambda v, c: v[i][rows(c), columns(c)]


def pick_rowwise(p: Picker) -> Operation:
    i, shape = p.value(2)
    columns = p.index((shape[0],), 0, shape[1])
    f = p.choice(lambda x, k: x[jnp.arange(x.shape[0]), k], jax.vmap(lambda row, k: row[k]), jax.vmap(lambda row, k: row.at[k].set(0.0)))
    return lambda v, c: f(v[i], columns(c))


def scatter(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis = p.axis(shape)
    count = p.integer(1, 2)
    index = p.index((count,), -1, shape[axis] + 1)
    j, _ = p.value(1)
    how = p.choice("set", "add", "subtract", "mul")
    mode = p.choice("drop", "clip")

    def run(v, c):
        x = jnp.moveaxis(v[i], axis, 0)
        updates = jnp.resize(v[j], (count, *x.shape[1:])) if how != "mul" else 0.5
        return jnp.moveaxis(getattr(x.at[index(c)], how)(updates, mode=mode, unique_indices=how == "mul" and count == 1), 0, axis)

    return run


def segment_sum(p: Picker) -> Operation:
    i, shape = p.value(1)
    index = p.index((shape[0],), 0, 3)
    return lambda v, c: jax.ops.segment_sum(v[i], jnp.asarray(index(c)), 3)


def dynamic_slice(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis = p.axis(shape)
    size, index = p.integer(1, shape[axis]), p.index((), -1, shape[axis] + 1)
    return lambda v, c: lax.dynamic_slice_in_dim(v[i], index(c), size, axis)


def dynamic_update(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis = p.axis(shape)
    size, index = p.integer(1, shape[axis]), p.index((), -1, shape[axis] + 1)
    return lambda v, c: lax.dynamic_update_slice_in_dim(v[i], jnp.sin(lax.slice_in_dim(v[i], 0, size, axis=axis)), index(c), axis)


def largest(p: Picker) -> Operation:
    i, shape = p.value(1)
    k = p.integer(1, shape[-1])
    f = p.choice(
        lambda x: lax.top_k(x, k)[0], lambda x: jnp.take_along_axis(x, jnp.argmax(x, -1, keepdims=True), -1), lambda x: x[..., jnp.argmin(x) % shape[-1]]
    )
    return lambda v, c: f(v[i])


def sort(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis = p.axis(shape)
    w = p.constant(shape)
    f = p.choice(
        lambda x, w: jnp.sort(x, axis=axis),
        lambda x, w: jnp.take_along_axis(x, jnp.argsort(w, axis=axis), axis),
        lambda x, w: lax.sort((w, x), dimension=axis, num_keys=1)[1],
        lambda x, w: jnp.median(x, axis=axis),
    )
    return lambda v, c: f(v[i], c[w])


# --- along an axis, windows ----------------------------------------------------------------------------------------------------


def cumulative(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis, reverse, f = p.axis(shape), p.boolean(), p.choice(lax.cumsum, lax.cumprod, lax.cummax, lax.cummin, lax.cumlogsumexp)
    return lambda v, c: f(v[i], axis=axis, reverse=reverse)


def associative(p: Picker) -> Operation:
    i, shape = p.value(1)
    axis = p.axis(shape)
    return lambda v, c: lax.associative_scan(lambda a, b: a * 0.5 + b, v[i], axis=axis)


def window(p: Picker) -> Operation:
    i, shape = p.value(1)
    width, stride, padding, dilation, base = p.integer(1, 2), p.integer(1, 2), (p.integer(0, 1), p.integer(0, 1)), p.integer(1, 2), p.integer(1, 2)
    init, f = p.choice((0.0, lax.add), (-np.inf, lax.max), (np.inf, lax.min))
    base, dilation = (base, dilation) if f is lax.add else (1, 1)
    lead = len(shape) - 1

    def run(v, c):
        ones = (1,) * lead
        return lax.reduce_window(
            v[i], np.asarray(init, v[i].dtype), f, (*ones, width), (*ones, stride), (*((0, 0),) * lead, padding), (*ones, base), (*ones, dilation)
        )

    return run


def max_pool_gradient(p: Picker) -> Operation:
    i, shape = p.value(2)
    w = p.constant(shape)

    def pooled(x):
        return lax.reduce_window(x, -np.inf, lax.max, (1,) * (len(shape) - 1) + (2,), (1,) * len(shape), "VALID").sum()

    return lambda v, c: jax.vjp(jax.grad(pooled), c[w])[0] * v[i] if shape[-1] > 1 else v[i]


def convolution(p: Picker) -> Operation:
    i, shape = p.value(2)
    features, width, groups = shape[-2], p.integer(1, 3), p.choice(1, shape[-2])
    out = p.choice(features, 2 * features) if groups > 1 else p.integer(1, 3)
    w = p.constant((out, features // groups, width))
    stride, padding, dilation, base = p.integer(1, 2), (p.integer(0, 2), p.integer(-1, 1)), p.integer(1, 2), p.integer(1, 2)

    def run(v, c):
        x = v[i].reshape(-1, *shape[-2:])
        y = lax.conv_general_dilated(x, c[w], (stride,), [padding], (base,), (dilation,), feature_group_count=groups)
        return y.reshape(*shape[:-2], *y.shape[1:])

    return run


def kernel(p: Picker) -> Operation:
    """A convolution with a value for its kernel, or for both."""
    i, shape = p.value(2)
    w = p.constant((2, shape[-1], 4))
    both, padding = p.boolean(), p.integer(0, 1)

    def run(v, c):
        x = v[i].reshape(-1, shape[-1], 1)[:2]
        x = jnp.concatenate([x, jnp.sin(x)], -1)
        return lax.conv_general_dilated(c[w] * (x.mean() if both else 1.0), x, (1,), [(padding, 0)])

    return run


# --- linear algebra ------------------------------------------------------------------------------------------------------------


def solve(p: Picker) -> Operation:
    i, shape = p.value(2)
    w = p.constant((shape[-2], shape[-2]))
    left, f = p.boolean(), p.choice(jnp.linalg.solve, jax.scipy.linalg.solve_triangular, lambda a, b: lax.linalg.triangular_solve(a.T, b.T).T)

    def run(v, c):
        x = v[i].reshape(-1, *shape[-2:])[0]
        matrix = 4 * jnp.eye(shape[-2], dtype=x.dtype) + c[w]
        return f(matrix, x) if left else jax.vmap(f, (None, 1), 1)(matrix, x[:, :, None])

    return run


def fourier(p: Picker) -> Operation:
    i, _ = p.value(1)
    f = p.choice(lambda x: jnp.fft.rfft(x).real, lambda x: jnp.abs(jnp.fft.fft(x) + 3), lambda x: jnp.imag(lax.complex(x, 2 * x) * (1 + 2j)))
    return lambda v, c: f(v[i])


# --- control flow ----------------------------------------------------------------------------------------------------------------


def branch(p: Picker) -> Operation:
    i, shape = p.value(1)
    w, index, own = p.constant((shape[-1], shape[-1])), p.index((), -1, 4), p.boolean()
    branches = [lambda x, w: jnp.tanh(x @ w), lambda x, w: jnp.sin(x), lambda x, w: x[::-1]]
    return lambda v, c: lax.cond(v[i].sum() > 0, branches[0], branches[1], v[i], c[w]) if own else lax.switch(index(c), branches, v[i], c[w])


def inner_scan(p: Picker) -> Operation:
    i, shape = p.value(2)
    w, reverse, last = p.constant((shape[-1],)), p.boolean(), p.boolean()

    def run(v, c):
        def step(carry, x):
            carry = jnp.tanh(carry * c[w] + x)
            return carry, carry * x

        final, ys = lax.scan(step, jnp.zeros_like(v[i][0]) * c[w], v[i], reverse=reverse)
        return final if last else ys

    return run


def repeated(p: Picker) -> Operation:
    i, shape = p.value(1)
    w, trips = p.constant((shape[-1], shape[-1])), p.integer(0, 3)
    f = p.choice(lambda x, w: jnp.tanh(x @ w), lambda x, w: jnp.roll(x, 1, -1) * w[0], lambda x, w: jnp.sin(x) + w[0])
    return lambda v, c: lax.scan(lambda x, _: (f(x, c[w]), None), v[i], None, length=trips)[0]


def counted(p: Picker) -> Operation:
    i, shape = p.value(1)
    trips = p.integer(1, shape[-1])

    def body(k, x):
        return x.at[..., k].set(jnp.sin(x[..., (k + 1) % shape[-1]]))

    return lambda v, c: lax.fori_loop(0, trips, body, v[i])


def mapped(p: Picker) -> Operation:
    i, shape = p.value(2)
    w = p.constant((shape[-1],))
    return lambda v, c: lax.map(lambda x: jnp.cumsum(x * c[w], -1), v[i])


def looped(p: Picker) -> Operation:
    i, _ = p.value(1)
    trips = p.index((), 0, 3)
    f = p.choice(lambda x: jnp.roll(x, 1, -1), jnp.sin, lambda x: x + x.sum(-1, keepdims=True))
    return lambda v, c: lax.while_loop(lambda s: s[0] < trips(c), lambda s: (s[0] + 1, f(s[1])), (jnp.int32(0), v[i]))[1]


@jax.custom_jvp
def rounded(x):
    return jnp.round(3 * x)


rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0] * jnp.cos(primals[0])))


@jax.custom_jvp
def mixing(x):
    return jnp.sin(x)


mixing.defjvp(lambda primals, tangents: (mixing(*primals), tangents[0] + 0.1 * jnp.flip(tangents[0], -1)))


def custom(p: Picker) -> Operation:
    i, _ = p.value(1)
    f = p.choice(
        rounded, mixing, jax.checkpoint(lambda x: jnp.tanh(x.sum(-1, keepdims=True))), jax.jit(lambda x: jnp.sin(x[::-1])), jax.vmap(jnp.cumsum), jax.nn.gelu
    )
    return lambda v, c: f(v[i]) if f is not jax.vmap or v[i].ndim else v[i]


WIDE = [
    *dict.fromkeys(NARROW),
    *[reshape, merge_batch, rearrange, concatenate, pad, strided, triangle, masked, take, take_along, pick_pairs, pick_rowwise, scatter, segment_sum],
    *[dynamic_slice, dynamic_update, largest, sort, cumulative, associative, window, max_pool_gradient, convolution, kernel, solve, fourier],
    *[branch, inner_scan, repeated, counted, mapped, looped, custom],
]
