"""Which equation mixes what: named by primitive, file and line."""

from __future__ import annotations

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import derivative_of

from parscan.jaxprs import influenced_by, mixings

RANDOM = np.random.default_rng(0)
W = jnp.asarray(RANDOM.standard_normal((4, 4)))
W12 = jnp.asarray(RANDOM.standard_normal((4, 12)))
KERNEL = jnp.asarray(RANDOM.standard_normal((3, 4, 4)))
H = jnp.asarray(RANDOM.standard_normal((3, 4)))


def rnn(h):
    return jnp.tanh(
        h @ W  # mixes
    )


def lstm(state):
    c, h = state
    i, f, g = jnp.split(
        h @ W12,  # mixes
        3,
        axis=-1,
    )
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return c, jnp.tanh(c) * h


def layer_norm(h):
    centred = h - h.mean(-1, keepdims=True)  # mixes
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def twice(h):
    h = jnp.tanh(h @ W)  # mixes
    return jnp.tanh(h @ W)


def unused(h):
    dead = h[::-1] @ W
    return jnp.sin(h) + 0 * lax.stop_gradient(dead)


def convolution(h):
    out = lax.conv_general_dilated(h[None], KERNEL, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))  # mixes
    return out[0]


def concatenation(h):
    first, second = h[:, :2], h[:, 2:]  # mixes
    return jnp.concatenate([second, first], axis=1)


def branches(h):
    return lax.cond(
        h.sum() > 0,
        lambda h: jnp.tanh(h @ W),  # mixes
        jnp.sin,
        h,
    )


def inner_loop(h):
    def body(c, _):
        return jnp.sin(c @ W), None  # mixes

    return lax.scan(body, h, None, length=3)[0]


def inner_while(h):
    def body(c):
        return jnp.sin(c @ W)  # mixes

    return lax.while_loop(lambda c: c.sum() > 10, body, h)


def rows(h):
    return lax.map(
        lambda r: jnp.sin(W @ r),  # mixes
        h,
    )


def running(h):
    return lax.scan(lambda c, r: (c + r, c + r), jnp.zeros(4), h)[1]  # mixes


@jax.custom_jvp
def odd(x):
    return jnp.sin(x)


def turned(primals, tangents):
    return odd(*primals), tangents[0][:, ::-1]  # mixes


odd.defjvp(turned)


def by_rule(h):
    return odd(h)


def jitted(h):
    return jax.jit(jax.checkpoint(rnn))(h)


def transposed_beside(h):
    twisted = h[:, :3].T  # mixes
    return jnp.concatenate([h[:, :3] + twisted, h[:, 3:]], axis=1)


def line_of(function):
    """The line of this file that is marked."""
    lines, start = inspect.getsourcelines(function)
    return f"{Path(__file__).name}:{start + next(i for i, line in enumerate(lines) if '# mixes' in line)}"


@pytest.mark.parametrize(
    "step, state, marked, primitive, leaf, axis",
    [
        (rnn, H, rnn, "dot_general", 0, 1),
        (lstm, (H, H), lstm, "dot_general", 1, 1),
        (layer_norm, H, layer_norm, "reduce_sum", 0, 1),
        (twice, H, twice, "dot_general", 0, 1),
        (concatenation, H, concatenation, "slice", 0, 1),
        (branches, H, branches, "dot_general", 0, 1),
        (inner_loop, H, inner_loop, "dot_general", 0, 1),
        (inner_while, H, inner_while, "dot_general", 0, 1),
        (rows, H, rows, "dot_general", 0, 1),
        (running, H, running, "scan", 0, 0),
        (by_rule, H, turned, "rev", 0, 1),
        (jitted, H, rnn, "dot_general", 0, 1),
    ],
)
def test_the_one_mixing(step, state, marked, primitive, leaf, axis):
    closed, tangents = derivative_of(step, state)
    (mixing,) = mixings(closed, tangents)
    assert (mixing.eqn, mixing.leaf, mixing.axis) == (f"`{primitive}` at {line_of(marked)}", leaf, axis)


def test_a_convolution_mixes_places_and_channels():
    found = mixings(*derivative_of(convolution, H))
    assert [(m.eqn, m.leaf, m.axis) for m in found] == [(f"`conv_general_dilated` at {line_of(convolution)}", 0, axis) for axis in (0, 1)]


def test_both_axes_each_where_it_is_lost():
    found = mixings(*derivative_of(transposed_beside, H))
    primitives = [(m.eqn.split("`")[1], m.axis) for m in found]
    assert primitives == [("add", 0), ("slice", 1)]


@pytest.mark.parametrize("step", [lambda h: jnp.convolve(h, jnp.ones(3), mode="same"), lambda h: jnp.linalg.solve(jnp.eye(4) * 2, h)])
def test_what_mixes_inside_a_function_of_jax_is_where_that_is_called(step):
    (found,) = mixings(*derivative_of(step, jnp.ones(4)))
    assert found.eqn.endswith(f" at {Path(__file__).name}:{step.__code__.co_firstlineno}")


def test_what_the_outputs_do_not_depend_on_mixes_nothing():
    assert mixings(*derivative_of(unused, H)) == []
    assert mixings(*derivative_of(jnp.tanh, H)) == []
    assert mixings(*derivative_of(lambda h: h.T, H[:, :3])) == []  # moved, not mixed


@pytest.mark.parametrize(
    "step, varies",
    [
        (lambda h: h @ W, False),
        (lambda h: h @ W + jnp.sin(lax.stop_gradient(h)), False),
        (lambda h: h - h.mean(), False),
        (lambda h: lax.map(lambda r: W @ r, h), False),
        (lambda h: lax.scan(lambda c, _: (c @ W, None), h, None, length=3)[0], False),
        (lambda h: jnp.tanh(h @ W), True),
        (lambda h: h * lax.stop_gradient(h)[0], True),
        (lambda h: jnp.where(h > 0, h, 0.1 * h), True),
        (lambda h: lax.cond(h.sum() > 0, lambda h: h @ W, lambda h: h, h), True),
        (lambda h: lax.fori_loop(0, jnp.sum(h > 0), lambda _, c: c @ W, h), True),
        (lambda h: h[jnp.argsort(lax.stop_gradient(h)[:, 0])], True),
        (lambda h: lax.dynamic_slice(jnp.tile(h, (2, 1)), (jnp.sum(h > 0), 0), (3, 4)), True),
        (lambda h: lax.top_k(h, 4)[0], True),
    ],
)
def test_whether_the_linear_map_depends_on_the_state(step, varies):
    closed, tangents = derivative_of(step, H)
    others = [i for i in range(len(closed.in_avals)) if i not in tangents]
    assert influenced_by(closed, range(len(closed.out_avals)), others[-1:]) is varies


def test_influences_are_of_the_outputs_asked_for():
    closed = jax.make_jaxpr(lambda a, b: (a + b.shape[0], jnp.zeros(3), b))(1.0, H)
    assert [influenced_by(closed, [out], [1]) for out in range(3)] == [False, False, True]
    assert influenced_by(closed, [0, 1], [1, 0])
