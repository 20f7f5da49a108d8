"""What is computed ahead of the forward loop, for all steps at once: counted in the loop that is left, and compared with `lax.scan`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import TOLERANCE, assert_close

import parscan
from parscan.jaxprs import Flat, cut_ahead, equations, trace

RANDOM = np.random.default_rng(0)
weights = lambda *shape: jnp.asarray(RANDOM.standard_normal(shape) / shape[0] ** 0.5)
XS = weights(7, 3)
W, U, GATES = weights(32, 32), weights(4, 32), weights(4, 96)


def rnn(h, x):
    return jnp.tanh(h @ W + x @ U + 0.1)


def gated(h, x):
    a, v = jnp.split(jax.nn.sigmoid(x @ U), 2, axis=-1)
    return jnp.tile(a, 2) * h + jnp.tile(v, 2)


def within_a_call(h, x):
    return jax.jit(lambda h, x: jnp.tanh(0.5 * h + x @ U))(h, x)


def of_constants(h, x):
    return jnp.tanh(h * jnp.exp(-jax.nn.softplus(W[0])) + x @ (U @ W))


def gru(h, x):
    """Its gates are parts of one product with x: on a CPU that stays in the loop."""
    n, of_x, of_h = h.shape[-1], x @ GATES, h @ W
    z = jax.nn.sigmoid(of_x[..., :n] + of_h)
    return z * h + (1 - z) * jnp.tanh(of_x[..., n : 2 * n] + h)


def turned(h, x):
    c, s = jnp.cos(x[..., :16]), jnp.sin(x[..., :16])
    p, q = jnp.split(h, 2, axis=-1)
    return jnp.concatenate([c * p - s * q, s * p + c * q], -1)


def branching(h, x):
    return h + lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x[..., :1])


STEPS = {
    "rnn": (rnn, 4),
    "gated": (gated, 4),
    "call": (within_a_call, 4),
    "constants": (of_constants, 4),
    "gru": (gru, 4),
    "turned": (turned, 32),
    "branching": (branching, 4),
}


def traced(step, width, batch=8):
    state, x = (jax.ShapeDtypeStruct((batch, n), jnp.float32) for n in (32, width))
    return trace(lambda _, h, x: step(h, x), Flat.of(()), Flat([state], jax.tree.structure(0)), Flat([x], jax.tree.structure(0)))[0]


def names(jaxpr):
    return [eqn.primitive.name for eqn in equations(jaxpr)]


@pytest.mark.parametrize(
    "name, platform, ahead, left",
    [
        ("rnn", "cpu", [(8, 32)], {"dot_general": 1, "tanh": 1}),
        ("gated", "cpu", [(8, 16), (8, 16)], {"dot_general": 0, "logistic": 0}),
        ("call", "cpu", [(8, 32)], {"dot_general": 0, "tanh": 1}),
        ("constants", "cpu", [(8, 32)], {"dot_general": 0, "exp": 0, "log1p": 0, "tanh": 1}),
        ("gru", "gpu", [(8, 96)], {"dot_general": 1}),
        ("turned", "cpu", [(8, 16), (8, 16)], {"cos": 0, "sin": 0}),
    ],
)
def test_what_needs_no_state_is_computed_ahead(name, platform, ahead, left):
    found = cut_ahead(traced(*STEPS[name]), platform)
    assert found is not None
    rest = names(found.rest)
    assert {key: rest.count(key) for key in left} == left
    assert [a.shape for a in found.ahead] == ahead and found.kept == ()


@pytest.mark.parametrize(
    "step, width, platform",
    [
        (lambda h, x: jnp.tanh(h) + 2 * x + 1, 32, "gpu"),  # adding costs nothing beside a function
        (gru, 4, "cpu"),
        (lambda h, x: jnp.tanh(h + x[..., :1]), 4, "gpu"),  # a move
        (branching, 4, "gpu"),  # both branches would be taken
        (lambda h, x: h + jnp.sum(jnp.exp(h[None] * jnp.ones((64, 1, 1))), 0), 4, "gpu"),
        (lambda h, x: h + jnp.einsum("bn,bnk->bk", h, jnp.sin(x[..., :1, None] * jnp.ones((32, 32)))), 4, "gpu"),  # too large to be kept of all steps
    ],
)
def test_what_does_not_pay_stays_in_the_loop(step, width, platform):
    assert cut_ahead(traced(step, width), platform) is None


def test_a_loop_that_is_one_kernel_may_take_parts():
    assert cut_ahead(traced(gru, 4, batch=1), "cpu") is None
    small = trace(lambda _, h, x: jnp.tanh(h + (x @ jnp.ones((4, 16)))[8:]), Flat.of(()), *(Flat([jax.ShapeDtypeStruct((n,), jnp.float32)], jax.tree.structure(0)) for n in (8, 4)))[0]  # fmt: skip
    assert cut_ahead(small, "cpu") is not None


@pytest.mark.parametrize(
    "length, segment, reverse, platform",
    [(0, None, False, "cpu"), (1, None, True, "cpu"), (2, 1, False, "gpu"), (7, None, True, "gpu"), (13, 4, False, "cpu"), (16, 4, True, "gpu")],
)
@pytest.mark.parametrize("name", STEPS)
def test_values_and_derivatives_are_those_of_the_loop(name, reverse, length, segment, platform, monkeypatch):
    monkeypatch.setattr("parscan.recurrence.jax.default_backend", lambda: platform)
    step, width = STEPS[name]
    start, xs = weights(3, 32), weights(max(length, 1), 3, width)[:length]

    def loss(scan):
        def of(start, xs):
            final, ys = scan(lambda h, x: (step(h, x), jnp.sin(h)), start, xs, reverse=reverse)
            return jnp.sum(final**2) + jnp.sum(jnp.cos(ys)), (final, ys)

        return of

    ours = loss(lambda *args, **kwargs: parscan.scan(*args, **kwargs, method=parscan.Sequential(segment=segment)))
    got, want = (jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(start, xs) for f in (ours, loss(lax.scan)))
    assert_close(got, want, TOLERANCE["float64"])


def loops(jaxpr):
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "scan"]


def test_one_product_of_all_inputs_stands_before_the_loop():
    jaxpr = jax.make_jaxpr(lambda h, xs: parscan.scan(lambda h, x: (rnn(h, x),) * 2, h, xs, method="sequential"))(jnp.ones((8, 32)), jnp.ones((50, 8, 4)))
    (loop,) = loops(jaxpr)
    assert names(loop.params["jaxpr"]).count("dot_general") == 1
    outside = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape[0] == 50]
    assert len(outside) == 1


def test_no_second_copy_is_computed_for_the_backward_pass():
    """The linearisation asks for the same, of the same: XLA computes it once."""

    def loss(xs):
        return jnp.sum(parscan.scan(lambda h, x: (turned(h, x),) * 2, jnp.ones((8, 32)), xs, method="sequential")[1] ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((50, 8, 32))).compile().as_text()
    cosines = [line for line in compiled.splitlines() if " cosine(" in line]
    assert cosines and all("[50,8,16]" in line for line in cosines)


def test_what_is_left_to_jax_is_left_as_it_is():
    jaxpr = jax.make_jaxpr(lambda h, xs: parscan.scan(lambda h, x: (rnn(h, x),) * 2, h, xs, method="lax"))(jnp.ones((8, 32)), jnp.ones((50, 8, 4)))
    assert names(loops(jaxpr)[0].params["jaxpr"]).count("dot_general") == 2


@pytest.mark.parametrize("length, segment", [(7, None), (7, 3), (6, 3)])
def test_weak_types_stay(length, segment):
    f = lambda h, x: (jnp.cos(h) + jnp.tanh(x).sum().astype(float) * 0, h)
    weak = lambda h, x: (jnp.cos(h) * jnp.where(jnp.sin(x[0]) > 0, 0.5, 0.25), h)
    for step in (f, weak):
        got, want = (scan(step, 0.0, XS[:length]) for scan in (lambda *given: parscan.scan(*given, method=parscan.Sequential(segment=segment)), lax.scan))
        assert [a.weak_type for a in got] == [a.weak_type for a in want]
        assert_close(got, want, TOLERANCE["float64"])


@pytest.mark.parametrize("method", ["auto", "sequential"])
def test_a_function_that_may_not_be_batched_stays_in_the_loop(method):
    """Though its derivative, which does not call it, may be."""

    @jax.custom_jvp
    def on_the_host(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    on_the_host.defjvp(lambda primals, tangents: (jnp.sin(*primals), tangents[0] * jnp.cos(*primals)))
    step = lambda h, x: (jnp.tanh(0.9 * h + on_the_host(x)),) * 2
    assert_close(parscan.scan(step, jnp.ones(3), XS, method=method), lax.scan(step, jnp.ones(3), XS), TOLERANCE["float64"])
    assert "JAX cannot" in parscan.plan(step, jnp.ones(3), XS).reason
    with pytest.raises(ValueError, match="cannot be used for this function"):
        parscan.scan(step, jnp.ones(3), XS, method="tree")


def test_a_plan_of_no_steps_can_be_printed():
    step = lambda h, x: (jnp.cos(h) + jnp.tanh(x).sum(), h)
    for method in ("auto", "sequential", "tree", "chunked", "walk"):
        assert "0 steps" in str(parscan.plan(step, jnp.ones(3), XS[:0], method=method))
