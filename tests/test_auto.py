"""What `method="auto"` chooses, by platform, shapes, structure and what XLA makes of a loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parscan import planning, timing
from parscan.jaxprs import Flat, trace
from parscan.methods import Lax

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
    (elementwise, (64,), "Sequential", "Lax", "Chunked"),
    (elementwise, (256, 4), "Sequential", "Lax", "Chunked"),
    (elementwise, (10**6,), "Sequential", "Lax", "Lax"),
    (pairs, (2, 2), "Lax", "Lax", "Chunked"),
    (pairs, (32, 2), "Sequential", "Lax", "Chunked"),
    (lstm, (2, 4), "Sequential", "Lax", "Chunked"),
    (lstm, (8, 2, 32), "Lax", "Lax", "Chunked"),  # a step that computes more than its loop waits
    (rnn, (1, 8), "Sequential", "Lax", "Chunked"),
    (rnn, (32, 1), "Sequential", "Lax", "Chunked"),
    (rnn, (1, 128), "Sequential", "Lax", "Chunked"),
    (lambda h, x: jax.lax.cond(h[0] > 0, jnp.tanh, jnp.sin, h) + x, (64,), "Lax", "Lax", "Chunked"),  # branches
    (rnn, (4, 8), "Walk", "Walk", "Chunked"),
    (gru, (4, 8), "Walk", "Walk", "Chunked"),
    (gru, (16, 20), "Lax", "Lax", "Chunked"),
    (rnn, (64, 128), "Lax", "Lax", "Sequential"),
    (rnn, (1, 1024), "Sequential", "Lax", "Lax"),
    (lambda h, x: h[::-1] * x, (64,), "Sequential", "Lax", "Tree"),
    (lambda h, x: h @ W[20] + x, (16, 20), "Lax", "Lax", "Tree"),  # one matrix for all steps, squared
    (delta_rule, (8, 8), "Walk", "Walk", "Tree"),  # one block for all columns
    (delta_rule, (256, 256), "Lax", "Lax", "Tree"),
]


@pytest.mark.parametrize("step, shape, before, since, accelerator", CASES)
def test_auto(step, shape, before, since, accelerator, monkeypatch):
    aval = jax.ShapeDtypeStruct(shape, "float32")
    program, _, _ = trace(lambda _, h, x: step(h, x).astype("float32"), Flat.of(()), Flat.of(aval), Flat.of(aval))

    def chosen(platform, fuses=True):
        monkeypatch.setattr(timing, "FUSES_LOOPS", fuses)
        return type(planning.plan_for(program, 1000, None, None, fallback=Lax(), platform=platform)[0].method).__name__

    assert (chosen("cpu", fuses=False), chosen("cpu"), chosen("gpu")) == (before, since, accelerator)
