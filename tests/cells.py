"""Recurrent cells and layers, each with the structure that its Jacobians have: one table for every test that wants realistic steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LENGTH, BATCH = 5, 3


class Cell(NamedTuple):
    """A step with its arrays, and what `parscan.plan` is to say of it."""

    step: Callable  # (state, x, weights=…) -> state
    state: Any  # pytree of float64 arrays, a counter beside them in one case
    xs: Any  # inputs of all steps, on a leading axis
    kind: str
    blocks: dict[int, int]  # block size -> how many; coordinates of different blocks never mix
    weights: Any  # what `step` closes over, to differentiate in
    vmapped: bool  # state and xs (behind the steps) carry a batch axis that `step` does not see


CELLS: dict[str, Cell] = {}


def cell(kind: str, blocks: dict[int, int], *, weights: Any, state: Any, xs: Any, vmapped: bool = False) -> Callable:
    """Enters a step `(state, x, weights) -> state` in the table. The arrays are pytrees of shapes, drawn here, or arrays, taken as they are."""

    def enter(f):
        random = np.random.default_rng(len(CELLS))
        is_shape = lambda leaf: isinstance(leaf, tuple) and all(isinstance(size, int) for size in leaf)

        def drawn(shapes, scale=1.0, lead=()):
            draw = lambda leaf: jnp.asarray(scale * random.standard_normal((*lead, *leaf)), "float64") if is_shape(leaf) else leaf
            return jax.tree.map(draw, shapes, is_leaf=is_shape)

        given = drawn(weights, 0.5)
        CELLS[f.__name__] = Cell(lambda state, x, weights=given: f(state, x, weights), drawn(state), drawn(xs, lead=(LENGTH,)), kind, blocks, given, vmapped)
        return f

    return enter


# --- gated and plain recurrences -----------------------------------------------------------------------------------------------

RNN = {"u": (4, 4), "w": (2, 4), "b": (4,)}
GRU = {name: {"u": (4, 4), "w": (2, 4), "b": (4,)} for name in "zrc"}


def gate(w, h, x):
    return jax.nn.sigmoid(h @ w["u"] + x @ w["w"] + w["b"])


def of_input(w, x):
    return x @ w["w"] + w["b"]


@cell("BlockDiagonal", {4: BATCH}, weights=RNN, state=(BATCH, 4), xs=(BATCH, 2))
def tanh_rnn(h, x, w):
    return jnp.tanh(h @ w["u"] + x @ w["w"] + w["b"])


@cell("BlockDiagonal", {4: BATCH}, weights={"u": (4, 4), "w": (4, 2), "b": (4, 1)}, state=(4, BATCH), xs=(2, BATCH))
def tanh_rnn_batch_last(h, x, w):
    return jnp.tanh(w["u"] @ h + w["w"] @ x + w["b"])


@cell("Dense", {4 * BATCH: 1}, weights=RNN, state=(BATCH, 4), xs=(BATCH, 2))
def batch_norm_rnn(h, x, w):
    """The statistics of the batch mix its members."""
    a = h @ w["u"] + x @ w["w"]
    return jnp.tanh((a - a.mean(0)) / jnp.sqrt(a.var(0) + 1e-3) + w["b"])


@cell("BlockDiagonal", {4: BATCH}, weights=GRU, state=(BATCH, 4), xs=(BATCH, 2))
def gru(h, x, w):
    z, r = gate(w["z"], h, x), gate(w["r"], h, x)
    return z * h + (1 - z) * tanh_rnn(r * h, x, w["c"])


@cell("BlockDiagonal", {4: BATCH}, weights=GRU, state=(BATCH, 4), xs=(BATCH, 2))
def gru_under_remat(h, x, w):
    return jax.checkpoint(gru)(h, x, w)


@cell("Dense", {4: 1}, weights=GRU, state=(BATCH, 4), xs=(BATCH, 2), vmapped=True)
def gru_under_vmap(h, x, w):
    """The carry has no batch axis: one block."""
    return gru(h, x, w)


@cell(
    "BlockDiagonal",
    {6: BATCH},
    weights={name: {"u": (3, 3), "w": (2, 3), "b": (3,)} for name in "ifog"},
    state=((BATCH, 3), (BATCH, 3)),
    xs=(BATCH, 2),
)
def lstm(state, x, w):
    """Entries: (2 n² + 2 n) / (2 n)², more than half."""
    c, h = state
    c = gate(w["f"], h, x) * c + gate(w["i"], h, x) * tanh_rnn(h, x, w["g"])
    return c, gate(w["o"], h, x) * jnp.tanh(c)


@cell("BlockDiagonal", {2: 4 * BATCH}, weights={name: {"u": (4,), "w": (2, 4), "b": (4,)} for name in "ifog"}, state=((BATCH, 4), (BATCH, 4)), xs=(BATCH, 2))
def elementwise_lstm(state, x, w):
    """Blocks of a (c, h) pair each."""
    c, h = state
    i, f, o, g = (h * w[name]["u"] + of_input(w[name], x) for name in "ifog")
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return c, jax.nn.sigmoid(o) * jnp.tanh(c)


@cell("BlockDiagonal", {3: 2 * BATCH}, weights={"u": (2, 3, 3), "w": (2, 2, 3)}, state=(BATCH, 2, 3), xs=(BATCH, 2))
def multi_head_rnn(h, x, w):
    return jnp.tanh(jnp.einsum("bhi,hij->bhj", h, w["u"]) + jnp.einsum("bi,hij->bhj", x, w["w"]))


@cell("BlockDiagonal", {3: 2 * BATCH}, weights={"u": (2, 3, 3), "b": (6,)}, state=(BATCH, 6), xs=(BATCH, 6))
def interleaved_groups(h, x, w):
    """Channels 0, 2, 4 and 1, 3, 5: blocks that are not contiguous."""
    return jnp.tanh(jnp.einsum("big,gij->bjg", h.reshape(BATCH, 3, 2), w["u"]).reshape(BATCH, 6) + w["b"] + x)


@cell("BlockDiagonal", {4: BATCH, 2: BATCH}, weights=(RNN, {"u": (2, 2)}), state={"wide": (BATCH, 4), "narrow": (BATCH, 2)}, xs=(BATCH, 2))
def two_rnns_side_by_side(state, x, w):
    return {"wide": tanh_rnn(state["wide"], x, w[0]), "narrow": jnp.sin(state["narrow"] @ w[1]["u"] + x)}


@cell("BlockDiagonal", {4: BATCH}, weights=RNN, state={"h": (BATCH, 4), "count": jnp.int32(0)}, xs=(BATCH, 2))
def rnn_with_a_counter(state, x, w):
    """An integer has no derivative, so it is in no block."""
    return {"h": tanh_rnn(state["h"], x, w) * jnp.cos(0.3 * state["count"]), "count": state["count"] + 1}


@cell("BlockDiagonal", {4: BATCH}, weights=RNN, state=(BATCH, 4), xs=((BATCH, 2), jax.random.split(jax.random.key(0), LENGTH)))
def dropout_rnn(h, x, w):
    x, key = x
    return tanh_rnn(jnp.where(jax.random.bernoulli(key, 0.7, h.shape), h / 0.7, 0), x, w)


@jax.custom_jvp
def round_through(x):
    """Quarters, straight through: what f computes is flat, its derivative is not."""
    return jnp.round(4 * x) / 4


round_through.defjvp(lambda primals, tangents: (round_through(*primals), tangents[0]))


@cell("BlockDiagonal", {4: BATCH}, weights=RNN, state=(BATCH, 4), xs=(BATCH, 2))
def straight_through_rnn(h, x, w):
    return round_through(tanh_rnn(h, x, w))


# --- elementwise recurrences ---------------------------------------------------------------------------------------------------

LINEAR = {"w": (2, 4), "b": (4,)}


@cell("Diagonal", {1: 4 * BATCH}, weights={"z": LINEAR, "h": LINEAR}, state=(BATCH, 4), xs=(BATCH, 2))
def min_gru(h, x, w):
    z = jax.nn.sigmoid(of_input(w["z"], x))
    return (1 - z) * h + z * of_input(w["h"], x)


@cell("Diagonal", {1: 4 * BATCH}, weights={"f": LINEAR, "i": LINEAR, "h": LINEAR}, state=(BATCH, 4), xs=(BATCH, 2))
def min_lstm(h, x, w):
    f, i = jax.nn.sigmoid(of_input(w["f"], x)), jax.nn.sigmoid(of_input(w["i"], x))
    return f / (f + i) * h + i / (f + i) * of_input(w["h"], x)


@cell("Diagonal", {1: 4 * BATCH}, weights={"a": {"w": (4, 4), "b": (4,)}, "i": {"w": (4, 4), "b": (4,)}, "decay": (4,)}, state=(BATCH, 4), xs=(BATCH, 4))
def rg_lru(h, x, w):
    """Griffin's recurrence: a = σ(decay)^(8 r)."""
    r, i = jax.nn.sigmoid(of_input(w["a"], x)), jax.nn.sigmoid(of_input(w["i"], x))
    log_a = -8 * r * jax.nn.softplus(-w["decay"])
    return jnp.exp(log_a) * h + jnp.sqrt(-jnp.expm1(2 * log_a)) * (i * x)


@cell("Diagonal", {1: 4 * BATCH}, weights={"f": LINEAR, "c": LINEAR, "v": (4,)}, state=(BATCH, 4), xs=(BATCH, 2))
def sru(c, x, w):
    f = jax.nn.sigmoid(of_input(w["f"], x) + w["v"] * c)
    return f * c + (1 - f) * of_input(w["c"], x)


@cell("Diagonal", {1: 4 * BATCH}, weights={"z": ((2, 4), (2, 4)), "f": ((2, 4), (2, 4))}, state=(BATCH, 4), xs={"before": (BATCH, 2), "now": (BATCH, 2)})
def qrnn(c, x, w):
    """f-pooling over gates that a convolution of width 2 makes from the inputs."""
    z, f = (x["before"] @ w[name][0] + x["now"] @ w[name][1] for name in "zf")
    f = jax.nn.sigmoid(f)
    return f * c + (1 - f) * jnp.tanh(z)


@cell("Diagonal", {1: 4 * BATCH}, weights={"u": (4,), "w": (2, 4), "b": (4,)}, state=(BATCH, 4), xs=(BATCH, 2))
def ind_rnn(h, x, w):
    return jax.nn.relu(of_input(w, x) + w["u"] * h)


@cell("Diagonal", {1: 4 * BATCH}, weights={"rate": (4,), **LINEAR}, state=(BATCH, 4), xs=(BATCH, 2))
def leaky_integrator(v, x, w):
    """v' = v + (dt / τ) (-v + tanh(v) / 2 + input)."""
    return v + jax.nn.sigmoid(w["rate"]) * (-v + 0.5 * jnp.tanh(v) + of_input(w, x))


# --- state spaces and matrix states --------------------------------------------------------------------------------------------


@cell("BlockDiagonal", {2: 4 * BATCH}, weights={"nu": (4,), "theta": (4,), "b": (2, 4, 2)}, state=(BATCH, 4, 2), xs=(BATCH, 2))
def lru(h, x, w):
    """λ = exp(-exp(ν) + i exp(θ)), as a scaled rotation of the last axis; inputs normalised by √(1 - |λ|²)."""
    modulus, angle = jnp.exp(-jnp.exp(w["nu"])), jnp.exp(w["theta"])
    cos, sin = modulus * jnp.cos(angle), modulus * jnp.sin(angle)
    rotation = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
    normed = jnp.sqrt(1 - modulus**2)[:, None] * jnp.einsum("bi,inj->bnj", x, w["b"])
    return jnp.einsum("nij,bnj->bni", rotation, h) + normed


@cell(
    "BlockDiagonal",
    {2: 4 * BATCH},
    weights={"re": (4,), "im": (4,), "dt": (4,), "b": ((2, 4), (2, 4))},
    state={"re": (BATCH, 4), "im": (BATCH, 4)},
    xs=(BATCH, 2),
)
def s5(h, x, w):
    """Zero-order hold of a diagonal complex system; the real and the imaginary part of a coordinate are a block."""
    eigenvalue = lax.complex(-jnp.exp(w["re"]), w["im"])
    discrete = jnp.exp(eigenvalue * jnp.exp(w["dt"]))
    driven = (discrete - 1) / eigenvalue * lax.complex(x @ w["b"][0], x @ w["b"][1])
    h = discrete * lax.complex(h["re"], h["im"]) + driven
    return {"re": jnp.real(h), "im": jnp.imag(h)}


@cell("Diagonal", {1: 8 * BATCH}, weights={"a": (4, 2), "down": (4, 1), "up": (1, 4), "dt": (4,), "b": (4, 2)}, state=(BATCH, 4, 2), xs=(BATCH, 4))
def mamba(h, x, w):
    """Selective scan: A is diagonal, its step Δ and the input matrix depend on x."""
    dt = jax.nn.softplus(x @ w["down"] @ w["up"] + w["dt"])
    return jnp.exp(dt[..., None] * -jnp.exp(w["a"])) * h + (dt * x)[..., None] * (x @ w["b"])[:, None, :]


KEYS = {"k": (4, 2), "v": (4, 3)}


@cell("Identity", {1: 8 * BATCH}, weights=KEYS, state={"s": (BATCH, 2, 3), "z": (BATCH, 2)}, xs=(BATCH, 4))
def linear_attention(state, x, w):
    """A sum over the steps: the Jacobian is the identity."""
    k, v = jax.nn.elu(x @ w["k"]) + 1, x @ w["v"]
    return {"s": state["s"] + k[:, :, None] * v[:, None, :], "z": state["z"] + k}


@cell("Diagonal", {1: 6 * BATCH}, weights={**KEYS, "alpha": (4, 2)}, state=(BATCH, 2, 3), xs=(BATCH, 4))
def gated_linear_attention(s, x, w):
    """diag(α) S + k vᵀ."""
    alpha = jax.nn.sigmoid(x @ w["alpha"]) ** (1 / 4)
    return alpha[:, :, None] * s + (x @ w["k"])[:, :, None] * (x @ w["v"])[:, None, :]


WIDE_KEYS = {"k": (4, 8), "v": (4, 2), "beta": (4, 1)}


def unit(k):
    return k / jnp.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)


@cell("LowRank", {8: 2 * BATCH}, weights=WIDE_KEYS, state=(BATCH, 2, 8), xs=(BATCH, 4))
def delta_rule(s, x, w):
    """S (I - β k kᵀ) + β v kᵀ: the rows of S are apart, each turned by the identity plus rank 1."""
    k, v, beta = unit(x @ w["k"]), x @ w["v"], jax.nn.sigmoid(x @ w["beta"])
    read = jnp.einsum("bvk,bk->bv", s, k)
    return s + (beta * (v - read))[:, :, None] * k[:, None, :]


@cell("LowRank", {8: 2 * BATCH}, weights={**WIDE_KEYS, "decay": (4, 8), "a": (4, 8)}, state=(BATCH, 2, 8), xs=(BATCH, 4))
def rwkv7(s, x, w):
    """S (diag(w) - κ (a ∘ κ)ᵀ) + v kᵀ: diagonal plus rank 1."""
    k, v, a = x @ w["k"], x @ w["v"], jax.nn.sigmoid(x @ w["a"])
    kappa, decay = unit(k), jnp.exp(-jnp.exp(-0.5) * jax.nn.sigmoid(x @ w["decay"]))
    removed = jnp.einsum("bvk,bk->bv", s, kappa)[:, :, None] * (a * kappa)[:, None, :]
    return s * decay[:, None, :] - removed + jax.nn.sigmoid(x @ w["beta"])[:, :, None] * v[:, :, None] * k[:, None, :]


@cell("BlockDiagonal", {4: BATCH}, weights={"f": (4, 4), "h": (2, 4)}, state=(BATCH, 4), xs={"gain": (BATCH, 4, 2), "y": (BATCH, 2)})
def kalman_mean(m, x, w):
    """F m + K (y - H F m), every step with a gain of its own."""
    predicted = m @ w["f"].T
    return predicted + jnp.einsum("bij,bj->bi", x["gain"], x["y"] - predicted @ w["h"].T)


@cell("Kronecker", {9: BATCH}, weights={"f": (3, 3)}, state=(BATCH, 3, 3), xs={"scale": (3,), "q": (BATCH, 3, 3)})
def covariance_prediction(p, x, w):
    """F P Fᵀ + Q, F scaled by the inputs: F ⊗ F."""
    f = (1 + 0.5 * jnp.tanh(x["scale"]))[:, None] * w["f"]
    return f @ p @ f.mT + x["q"] @ x["q"].mT


# --- layers ------------------------------------------------------------------------------------------------------------------------


@cell("BlockDiagonal", {4: BATCH}, weights={"1": (4, 6), "2": (6, 4), "b": (6,)}, state=(BATCH, 4), xs=(BATCH, 6))
def residual_mlp(h, x, w):
    return h + jnp.tanh(h @ w["1"] + w["b"] + x) @ w["2"]


@cell("LowRank", {8: BATCH}, weights={"1": (8, 2), "2": (2, 8), "b": (2,)}, state=(BATCH, 8), xs=(BATCH, 2))
def bottleneck_mlp(h, x, w):
    """The identity plus rank 2."""
    return h + jnp.tanh(h @ w["1"] + w["b"] + x) @ w["2"]


@cell("BlockDiagonal", {5: BATCH}, weights={"1": (5, 6), "2": (6, 5), "scale": (5,), "shift": (5,)}, state=(BATCH, 5), xs=(BATCH, 6))
def residual_layer_norm(h, x, w):
    centred = h - h.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w["scale"] + w["shift"]
    return h + jax.nn.gelu(normed @ w["1"] + x) @ w["2"]


@cell("BlockDiagonal", {4: BATCH}, weights={"s": (2, 2), "t": (2, 2)}, state=(BATCH, 4), xs=(BATCH, 2))
def coupling(h, x, w):
    """Real NVP, the halves changing places. A quarter and a diagonal of each other quarter are filled: half of a block of 4, no less."""
    a, b = jnp.split(h, 2, axis=-1)
    return jnp.concatenate([b * jnp.exp(jnp.tanh(a @ w["s"] + x)) + jnp.sin(a @ w["t"]), a], axis=-1)


CYCLES = np.array([3, 7, 6, 5, 2, 1, 4, 0])  # (0 3 5 1 7) (2 6 4)


@cell("Permutation", {5: BATCH, 3: BATCH}, weights=(8,), state=(BATCH, 8), xs=(BATCH, 8))
def permutation(h, x, w):
    """A block is a cycle."""
    return h[:, CYCLES] + w * x


@cell("Permutation", {2: 3 * BATCH, 1: BATCH}, weights=(7,), state=(BATCH, 7), xs=(BATCH, 7))
def reversal(h, x, w):
    """A permutation times factors; the coordinate in the middle stays."""
    return jnp.tanh((1 + w) * h[:, ::-1] + x)


@cell("Banded", {12: BATCH}, weights=(3, 1, 1), state=(BATCH, 12, 1), xs=(BATCH, 12, 1))
def convolution_1d(h, x, w):
    return h + jnp.tanh(lax.conv_general_dilated(h, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")) + x)


@cell("Banded", {24: BATCH}, weights=(3, 2, 2), state=(BATCH, 12, 2), xs=(BATCH, 12, 2))
def convolution_1d_of_two_channels(h, x, w):
    """Channels last: bandwidth 3."""
    return convolution_1d(h, x, w)


@cell("Sparse", {24: BATCH}, weights=(3, 3, 1, 1), state=(BATCH, 4, 6, 1), xs=(BATCH, 4, 6, 1))
def convolution_2d(h, x, w):
    """At most 9 of 24 entries a row; as a band of the raveled grid they would be 15."""
    return h + jnp.tanh(lax.conv_general_dilated(h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + x)


@cell("BlockDiagonal", {2: 4 * BATCH}, weights=(8,), state=(BATCH, 8), xs=(BATCH, 8))
def max_pooling_and_up(h, x, w):
    """A block is a window."""
    pooled = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID")
    return jnp.tanh((1 + w) * jnp.repeat(pooled, 2, axis=1) + x)


@cell("BlockDiagonal", {2: 6 * BATCH}, weights=(6, 2), state=(BATCH, 6, 2), xs=(BATCH, 6, 2))
def average_pooling_and_up(h, x, w):
    """A block is a window in one channel."""
    pooled = lax.reduce_window(h, 0.0, lax.add, (1, 2, 1), (1, 2, 1), "VALID") / 2
    return h + jnp.tanh((1 + w) * jnp.repeat(pooled, 2, axis=1) + x)


@cell("Sparse", {24: BATCH}, weights=(), state=(BATCH, 4, 6), xs=(BATCH, 4, 6))
def max_pooling_2d(h, x, w):
    return jnp.tanh((1 + w) * lax.reduce_window(h, -jnp.inf, lax.max, (1, 3, 3), (1, 1, 1), "SAME") + x)


@cell("Banded", {10: BATCH}, weights=(), state=(BATCH, 10), xs=(BATCH, 10))
def average_pooling_1d(h, x, w):
    return jnp.sin((1 + w) * lax.reduce_window(h, 0.0, lax.add, (1, 3), (1, 1), "SAME") / 3 + x)


# --- simulators --------------------------------------------------------------------------------------------------------------------


@cell("Banded", {12: BATCH}, weights={"diffusivity": (12,), "source": ()}, state=(BATCH, 12), xs=(BATCH, 12))
def heat_equation(u, x, w):
    """Explicit finite differences between cold ends, with a bistable source."""
    inside = jnp.pad(u, ((0, 0), (1, 1)))
    laplacian = inside[:, 2:] - 2 * u + inside[:, :-2]
    return u + 0.2 * jax.nn.sigmoid(w["diffusivity"]) * laplacian + 0.1 * (w["source"] * u * (1 - u**2) + x)


@cell("Sparse", {12: BATCH}, weights={"diffusivity": (), "speed": ()}, state=(BATCH, 12), xs=(BATCH, 12))
def burgers_on_a_ring(u, x, w):
    """The ends meet: two corners outside the band."""
    right, left = jnp.roll(u, -1, axis=1), jnp.roll(u, 1, axis=1)
    return u + 0.2 * jax.nn.sigmoid(w["diffusivity"]) * (right - 2 * u + left) - 0.1 * w["speed"] * u * (right - left) + 0.1 * x


@cell("Sparse", {12: BATCH}, weights={"linear": (7,), "cubic": (7,)}, state={"q": (BATCH, 6), "v": (BATCH, 6)}, xs=(BATCH, 6))
def coupled_oscillators(state, x, w):
    """A chain of springs by symplectic Euler. Positions come before velocities, so the bands are four, one a quarter."""
    stretch = jnp.diff(jnp.pad(state["q"], ((0, 0), (1, 1))), axis=1)
    tension = jax.nn.softplus(w["linear"]) * stretch + w["cubic"] * stretch**3
    v = state["v"] + 0.1 * (jnp.diff(tension, axis=1) + x)
    return {"q": state["q"] + 0.1 * v, "v": v}


EDGES = np.array([*((i, (i + 1) % 12) for i in range(12)), (0, 5), (3, 10)]).T


@cell("Sparse", {12: BATCH}, weights=(EDGES.shape[1],), state=(BATCH, 12), xs=(BATCH, 12))
def kuramoto_on_a_graph(phase, x, w):
    """Phases that pull one another along the edges of a known graph."""
    a, b = EDGES
    pull = w * jnp.sin(phase[:, b] - phase[:, a])
    return phase + 0.3 * (x + jnp.zeros_like(phase).at[:, a].add(pull).at[:, b].add(-pull))
