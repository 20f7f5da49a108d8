"""Chains of different layers, each as (layers, params, x), made for any precision."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Network(NamedTuple):
    layers: list[Any]
    params: list[Any]
    x: Any


def arrays(dtype, seed=0):
    random = np.random.default_rng(seed)
    return lambda *shape, scale=0.7: jnp.asarray(scale * random.standard_normal(shape), dtype)


def dense(p, h):
    return jnp.tanh(h @ p["w"] + p["b"])


def block(w, h):
    return h + 0.3 * jnp.tanh(h @ w)


def layer(make, before, after):
    return {"w": make(before, after, scale=1 / before**0.5), "b": make(after)}


def mlp(dtype):
    make, widths = arrays(dtype), [12, 9, 7, 5, 3, 2]
    return Network([dense] * 5, [layer(make, a, b) for a, b in itertools.pairwise(widths)], make(3, 12))


def autoencoder(dtype):
    make, widths = arrays(dtype), [8, 4, 1, 4, 8]
    return Network([dense] * 4, [layer(make, a, b) for a, b in itertools.pairwise(widths)], make(2, 8))


def dict_to_tuple_to_array(dtype):
    make = arrays(dtype)
    split = lambda p, h: (h["a"] * p, jnp.sin(h["b"] @ jnp.ones((4, 2), dtype)), h["a"][:, 0])
    join = lambda p, h: jnp.tanh(h[0] @ p) + h[1] * h[2][:, None]
    return Network([split, join, block], [make(3), make(3, 2), make(2, 2)], {"a": make(2, 3), "b": make(2, 4)})


def skip_over_three(dtype):
    make = arrays(dtype)
    fork = lambda _, x: (x, x)
    inner = lambda w, h: (jnp.tanh(h[0] @ w), h[1])
    merge = lambda p, h: h[0] @ p + h[1]
    return Network([fork, inner, inner, inner, merge], [None, make(4, 6), make(6, 6), make(6, 5), make(5, 4)], make(3, 4))


def convolution(dtype):
    make = arrays(dtype)

    def conv(w, h):
        return jnp.tanh(jax.lax.conv_general_dilated(h, w, (1,), "SAME", dimension_numbers=("NCW", "OIW", "NCW")))

    pool = lambda _, h: h.reshape(*h.shape[:2], -1, 2).mean(-1)
    flatten = lambda _, h: h.reshape(h.shape[0], -1)
    return Network([conv, pool, conv, flatten, dense], [make(3, 2, 3), None, make(2, 3, 3), None, layer(make, 8, 3)], make(2, 2, 8))


def one_layer(dtype):
    make = arrays(dtype)
    return Network([dense], [layer(make, 4, 3)], make(2, 4))


def no_layer(dtype):
    return Network([], [], arrays(dtype)(2, 4))


def three_hundred_blocks(dtype):
    make = arrays(dtype)
    weights = [make(4, 4, scale=0.2) for _ in range(300)]
    return Network([dense, *[block] * 300, dense], [layer(make, 6, 4), *weights, layer(make, 4, 3)], make(2, 6))


def shared_weights(dtype):
    make = arrays(dtype)
    tied, other = layer(make, 5, 5), make(5, 5)
    return Network([dense, block, dense, lambda _, h: h.sum(-1), lambda p, h: h * p["w"].sum()], [tied, other, tied, None, tied], make(3, 5))


def no_parameters(dtype):
    make = arrays(dtype)
    return Network([block, lambda _, h: jnp.sin(h) * h[..., ::-1], block], [make(4, 4), None, make(4, 4)], make(2, 4))


def integer_ids(dtype):
    make = arrays(dtype)
    embed = lambda table, ids: table[ids]
    pick = lambda _, h: (h, jnp.argmax(h, -1))
    use = lambda p, state: jnp.tanh(state[0] @ p) * jnp.take_along_axis(state[0], state[1][..., None], -1)
    return Network([embed, block, pick, use], [make(7, 4), make(4, 4), None, make(4, 3)], jnp.array([[1, 2, 0], [6, 5, 1]]))


def dropout(dtype):
    make = arrays(dtype)

    def drop(p, h):
        kept = jax.random.bernoulli(p["key"], 0.7, h.shape)
        return jnp.where(kept, jnp.tanh(h @ p["w"]), 0)

    keys = jax.random.split(jax.random.key(0), 12)
    params = [{"key": key, "w": make(5, 5)} for key in keys]
    return Network([*[drop] * 12, dense], [*params, layer(make, 5, 2)], make(3, 5))


def constant_in_the_middle(dtype):
    make = arrays(dtype)
    constant = lambda p, h: p * jnp.ones((h.shape[0], 3), dtype)
    return Network([dense, constant, dense, block], [layer(make, 4, 5), make(3), layer(make, 3, 6), make(6, 6)], make(2, 4))


NETWORKS = {
    f.__name__: f
    for f in (
        mlp,
        autoencoder,
        dict_to_tuple_to_array,
        skip_over_three,
        convolution,
        one_layer,
        no_layer,
        three_hundred_blocks,
        shared_weights,
        no_parameters,
        integer_ids,
        dropout,
        constant_in_the_middle,
    )
}
