"""What `method="auto"` chooses, by platform, shapes, structure and what XLA makes of a loop."""

from __future__ import annotations

import pickle
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import a_machine_that_walks

import parscan
from parscan import machines, planning, timing
from parscan.costs import Step
from parscan.jaxprs import Flat, Work, trace
from parscan.methods import Lax, Sequential, Walk

RANDOM = np.random.default_rng(0)
weights = lambda n, m: jnp.asarray(RANDOM.standard_normal((n, m)) / n**0.5)
W, GRU = {n: weights(n, n) for n in (1, 8, 20, 128, 1024)}, {n: weights(n, 3 * n) for n in (8, 20)}


def elementwise(h, x):
    return jnp.tanh(0.9 * h + x)


def pairs(h, x):
    p, q = h[..., 0], h[..., 1]
    return jnp.stack([jnp.tanh(0.5 * p - q + x[..., 0]), jnp.tanh(p + q * p)], -1)


def lstm(h, x):
    c, h = h[..., 0, :], h[..., 1, :]
    i, f, o = (jax.nn.sigmoid(a * h + x[..., 0, :]) for a in (0.3, 0.5, 0.7))
    c = f * c + i * jnp.tanh(h - x[..., 1, :])
    return jnp.stack([c, o * jnp.tanh(c)], -2)


def rnn(h, x):
    return jnp.tanh(h @ W[h.shape[-1]] + x)


def gru(h, x):
    n = h.shape[-1]
    gates = h @ GRU[n]
    z, r = jax.nn.sigmoid(gates[..., :n] + x), jax.nn.sigmoid(gates[..., n : 2 * n])
    return z * h + (1 - z) * jnp.tanh(r * gates[..., 2 * n :] + x)


def delta_rule(h, x):
    k = x[:, 0]
    return h - jnp.outer(k, k @ h) + x


# Step, shape of the state, and of the input if it is another; what is chosen on a CPU before JAX 0.12 and from then on, and on an accelerator.
CASES = [
    (elementwise, (4,), "Lax", "Lax", "Chunked"),  # a loop so small that any JAX makes one kernel of it
    (elementwise, (64,), "Sequential", "Sequential", "Chunked"),
    (elementwise, (256, 4), "Sequential", "Sequential", "Chunked"),
    (elementwise, (10**6,), "Sequential", "Sequential", "Lax"),
    (pairs, (2, 2), "Lax", "Lax", "Chunked"),
    (pairs, (32, 2), "Sequential", "Sequential", "Chunked"),
    (lstm, (2, 4), "Lax", "Lax", "Chunked"),
    (lstm, (8, 2, 32), "Sequential", "Sequential", "Chunked"),
    (rnn, (1, 8), "Sequential", "Sequential", "Chunked"),
    (rnn, (32, 1), "Sequential", "Sequential", "Chunked"),
    (rnn, (1, 128), "Sequential", "Sequential", "Chunked"),  # the share of every step in the gradient of W is 16384 numbers
    (lambda h, x: jax.lax.cond(h[0] > 0, jnp.tanh, jnp.sin, h) + x, (64,), "Lax", "Lax", "Chunked"),  # branches
    (rnn, (4, 8), "Sequential", "Sequential", "Chunked"),
    (gru, (4, 8), "Sequential", "Sequential", "Chunked"),
    (gru, (16, 20), "Sequential", "Sequential", "Chunked"),
    (rnn, (64, 128), "Sequential", "Sequential", "Sequential"),
    (rnn, (1, 1024), "Sequential", "Sequential", "Lax"),
    (lambda h, x: h[::-1] * x, (64,), "Sequential", "Sequential", "Tree"),
    (lambda h, x: h @ W[20] + x, (16, 20), "Sequential", "Sequential", "Tree"),  # one matrix for all steps, squared
    (delta_rule, (8, 8), "Sequential", "Lax", "Tree"),  # one block for all columns
    (delta_rule, (256, 256), "Sequential", "Sequential", "Tree"),
]


@pytest.mark.parametrize("step, shape, before, since, accelerator", CASES)
def test_auto(step, shape, before, since, accelerator, monkeypatch):
    aval = jax.ShapeDtypeStruct(shape, "float32")
    program, _, _ = trace(lambda _, h, x: step(h, x).astype("float32"), Flat.of(()), Flat.of(aval), Flat.of(aval))

    def chosen(platform, fuses=True):
        monkeypatch.setattr(timing, "FUSES_LOOPS", fuses)
        monkeypatch.setattr(planning, "machine", lambda _: machines.CPU_SINCE if fuses else machines.CPU_BEFORE)
        return type(planning.plan_for(program, 1000, None, None, fallback=Lax(), platform=platform)[0].method).__name__

    assert (chosen("cpu", fuses=False), chosen("cpu"), chosen("gpu")) == (before, since, accelerator)


def traced(step, *shapes):
    avals = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    return trace(lambda _, h, x: step(h, x), Flat.of(()), *map(Flat.of, avals))[0]


def test_a_walk_is_chosen_where_it_is_surely_ahead(monkeypatch):
    monkeypatch.setattr(planning, "machine", lambda _: a_machine_that_walks())
    program = traced(rnn, (4, 8), (4, 8))
    plan = planning.plan_for(program, 1000, None, None, fallback=Lax(), platform="cpu")[0]
    assert isinstance(plan.method, Walk) and "forming their Jacobians and walking them is told to take the least time" in plan.reason


def test_what_is_a_little_ahead_of_the_favourite_is_not_chosen(monkeypatch):
    program = traced(rnn, (4, 8), (4, 8))

    def chosen(sequential, lax):
        told = {Lax: lax, Sequential: sequential, Walk: 9.0}
        monkeypatch.setattr(timing, "seconds", lambda step, structure, method, machine, platform: told[type(method)])
        plan = planning.plan_for(program, 1000, None, None, fallback=Lax(), platform="cpu")[0]
        return type(plan.method), "hardly more" in plan.reason

    assert chosen(1.0, 2.0) == (Sequential, False)
    assert chosen(1.0, 0.9) == (Sequential, True)
    assert chosen(1.0, 0.6) == (Lax, False)


def test_a_step_that_jax_cannot_transpose_is_left_to_it():
    program = traced(lambda h, x: jax.lax.while_loop(lambda h: jnp.sum(h) > 1, lambda h: h * 0.5, h) @ W[8] + x, (4, 8), (4, 8))
    plan = planning.plan_for(program, 1000, None, None, fallback=Lax(), platform="cpu")[0]
    assert isinstance(plan.method, Lax) and plan.seconds == {}


# --- what a gradient is told to take ----------------------------------------------------------------------------------------------


def test_a_plan_tells_the_times_of_all_methods():
    plan = parscan.plan(lambda h, x: (jnp.tanh(h @ W[8] + x),) * 2, jnp.zeros((4, 8)), jnp.zeros((1000, 4, 8)))
    assert set(plan.seconds) == set(plan.held) == {"Lax", "Sequential", "Walk", "Tree", "Chunked", "Associative"}
    assert all(time > 0 for time in plan.seconds.values()) and all(size > 0 for size in plan.held.values())
    twice = parscan.plan(lambda h, x: (jnp.tanh(h @ W[8] + x),) * 2, jnp.zeros((4, 8)), jnp.zeros((2000, 4, 8)))
    for name in ("Lax", "Sequential"):
        assert 1.5 * plan.seconds[name] < twice.seconds[name] < 2 * plan.seconds[name] and twice.held[name] == 2 * plan.held[name]
    copied = pickle.loads(pickle.dumps(plan))
    assert copied.seconds == plan.seconds and copied.held == plan.held
    assert parscan.plan([lambda w, h: h * w, lambda _, h: jnp.sin(h)], [1.0, None], [jnp.ones(3)]).seconds == {}  # no recurrence


def test_the_terms_are_counted_by_hand():
    """tanh(h W), 4 × 8: two products and a sum in the pull-back, an entry 1 - h'² to be kept, beside what is read and written."""
    program = traced(lambda h, x: jnp.tanh(h @ W[8]), (4, 8), (4, 8))
    found = timing.parts(program)
    assert found is not None
    forward, ahead = timing.forward(program, "cpu")
    assert (forward.work.calls, forward.work.products, forward.work.functions, ahead) == (1, 2 * 4 * 8 * 8, 32, Work())
    assert (found.back.work.calls, found.back.work.products) == (1, 2 * 4 * 8 * 8)
    assert (found.whole.work.calls, found.whole.work.products) == (2, 2 * 2 * 4 * 8 * 8)
    assert found.at_once.calls == 2 and found.at_once.batched == 0  # of all steps: h W, and hᵀ g summed over them
    assert found.at_once.products == 2 * timing.ALONG * 2 * 4 * 8 * 8
    assert found.whole.slots == found.back.slots  # what linearises tanh, the states, a cotangent in; the other writes its cotangents
    one = dict.fromkeys((field.name for field in fields(machines.Machine)), 0.0)
    machine = machines.Machine(**{**one, "function": 1.0})
    step = Step(traced(lambda h, x: jnp.tanh(h @ W[8]), (4, 8), (4, 8)), 100, True)
    structure = planning.plan_for(program, 100, Sequential(), None, fallback=Lax())[1]
    assert timing.seconds(step, structure, Lax(), machine, "cpu") == pytest.approx(1e-9 * 100 * 32)


def test_what_is_computed_ahead_is_not_counted_in_the_loop():
    forward, ahead = timing.forward(traced(lambda h, x: jnp.tanh(h @ W[8] + x @ W[8]), (8, 8), (8, 8)), "cpu")
    assert forward.work.products == ahead.products == 2 * 8 * 8 * 8 and forward.entries == 3 * 64 - 64  # what is ahead, in place of x, and the new state
    turned = traced(lambda h, x: jnp.cos(x) * h + jnp.sin(x), (4, 8), (4, 8))
    forward, ahead = timing.forward(turned, "cpu")
    assert forward.work.functions == 0 and ahead.functions == 2 * 4 * 32  # a sine is worth four
    found = timing.parts(turned)
    assert found.linearising.work.functions == 2 * 4 * 32  # its cosine is there already
    assert found.at_once.functions > timing.ALONG * 2 * 4 * 32  # and is not, where every kernel computes its own


@pytest.mark.parametrize("time, words", [(2e-7, "0.2 µs"), (1.26e-5, "13 µs"), (9.96e-5, "100 µs"), (0.0123, "12 ms"), (0.0012, "1.2 ms"), (75.0, "75 s")])
def test_times_in_words(time, words):
    assert timing.in_words(time) == words


def test_outputs_are_counted_and_adding_to_several_places_makes_no_part_of_another_kernel():
    """XLA adds the cotangents of what is gathered place by place; one place is an update, which it makes part of the loop's kernel."""

    def small(h, x):
        h = (0.5 * h + x).at[0].add(x)
        return h, h[jnp.array([0, -1])]

    h, x = Flat.of(jnp.zeros(4, "float32")), Flat.of(jnp.zeros((), "float32"))
    program, _, _ = trace(lambda _, h, x: small(h, x), Flat.of(()), h, x, emits=True)
    alone = timing.parts(program)
    assert alone is not None
    assert alone.whole.work.alone == 1 and not alone.whole.is_fused and not alone.waits_little
    assert alone.linearising.work.alone == 0 and alone.linearising.is_fused and alone.back.is_fused


def test_a_batched_product_of_matrices_is_as_many_calls():
    """XLA on a CPU calls its library for one after another."""
    heads = jnp.ones((16, 4, 4), "float32")
    found = timing.parts(traced(lambda h, x: jnp.tanh(jnp.einsum("bhi,hij->bhj", h, heads) + x), (2, 16, 4), (2, 16, 4)))
    assert found is not None and (found.back.work.calls, found.back.work.apart) == (1, 15)
    assert (found.whole.work.calls, found.whole.work.apart) == (2, 30)
