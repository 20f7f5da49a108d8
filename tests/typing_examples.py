"""What type checkers make of calls: `tests/test_typing.py` has pyright read this file, and nothing runs it.

Each `assert_type` is an error where the checker has found another type.
"""

from __future__ import annotations

from typing import Any, NamedTuple, assert_type

import jax
import jax.numpy as jnp
from jax import Array

import parscan


class State(NamedTuple):
    hidden: Array
    clock: Array


class Params(NamedTuple):
    w: Array
    b: Array


def rnn(h: Array, x: Array) -> tuple[Array, Array]:
    h = jnp.tanh(h + x)
    return h, h


def lstm(state: State, x: dict[str, Array]) -> tuple[State, tuple[Array, None]]:
    return State(state.hidden + x["in"], state.clock + 1), (state.hidden, None)


def countdown(h: Array, _: None) -> tuple[Array, None]:
    return 0.5 * h, None


def unannotated(h, x):
    return jnp.tanh(h + x), x


h, xs = jnp.zeros(4), jnp.ones((10, 4))

assert_type(parscan.scan(rnn, h, xs), tuple[Array, Array])
assert_type(parscan.scan(rnn, h, xs, method="tree", reverse=True, unroll=2), tuple[Array, Array])
assert_type(parscan.scan(lstm, State(h, h), {"in": xs}, method=parscan.Chunked(8)), tuple[State, tuple[Array, None]])
assert_type(parscan.scan(countdown, h, length=10), tuple[Array, None])
assert_type(parscan.scan(countdown, h, None, 10), tuple[Array, None])
assert_type(parscan.scan(unannotated, h, xs)[0], Array)
assert_type(parscan.scan(lambda h, x: (jnp.tanh(h + x), x), h, xs), tuple[Array, Array])
assert_type(jax.grad(lambda h: parscan.scan(rnn, h, xs)[0].sum())(h), Any)


def layer(params: Params, h: Array) -> Array:
    return jnp.tanh(h @ params.w + params.b)


def cell(w: Array, state: State) -> State:
    return State(state.hidden * w, state.clock)


params, state = Params(jnp.ones((5, 4, 4)), jnp.ones((5, 4))), State(h, h)
layers, weights = [lambda w, h: h @ w, lambda _, h: h.sum()], [jnp.ones((4, 4)), None]

assert_type(parscan.forward(layer, params, h), tuple[Array, Array])
assert_type(parscan.forward(cell, xs, state, method="walk"), tuple[State, State])
assert_type(parscan.forward(lambda w, h: jnp.tanh(h * w), xs, h), tuple[Array, Array])
assert_type(parscan.forward(layers, weights, h), tuple[Any, list[Any]])
assert_type(parscan.forward([layer] * 5, [params] * 5, h), tuple[Any, list[Any]])

assert_type(parscan.chain(layer)(params, h), Array)
assert_type(parscan.chain(cell, length=5, params_axes=None)(xs[0], state), State)
assert_type(parscan.chain(cell, return_activations=True)(xs, state), tuple[State, State])
assert_type(parscan.chain(layers)(weights, h), Any)
assert_type(parscan.chain(layers, return_activations=True)(weights, h), Any)

y, activations = parscan.forward(layer, params, h)
grads = parscan.parallel_backward(layer, params, activations, y, layer_cotangents=activations)
assert_type(grads, parscan.Gradients[Params, Array])
assert_type(grads.params.w, Array)
assert_type(grads.activations, Array)
assert_type(grads.input, Array)
assert_type(grads.plan, parscan.Plan)
assert_type(parscan.parallel_backward(cell, xs, state, None, layer_cotangents=state).input, State)
several = parscan.parallel_backward(layers, weights, [h, h, h.sum()], h.sum(), layer_cotangents={0: h})
assert_type(several.plan, parscan.Plan)
assert_type(several.activations[0], Any)
assert_type(several.params[0], Any)

assert_type(parscan.linear_scan(parscan.Diagonal(xs), xs, h, method="tree"), Array)
assert_type(parscan.linear_scan(parscan.Dense(jnp.ones((4, 4))), xs, h, reverse=True), Array)

plan = parscan.plan(rnn, h, xs)
assert_type(plan, parscan.Plan)
assert_type(plan.flops, dict[str, int])
assert_type(parscan.plan(rnn, jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((10, 4), jnp.float32)), parscan.Plan)
assert_type(parscan.plan(layers, weights, [h]), parscan.Plan)

assert_type(parscan.calibration(), parscan.Machine | None)


@parscan.replacing_lax_scan(method="tree")
def loss(h: Array) -> Array:
    return jax.lax.scan(rnn, h, xs)[0].sum()


assert_type(loss(h), Array)
