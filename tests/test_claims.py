"""Claims are checked: by `check_structure` before anything runs, by `debug=True` while it runs."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import assert_close, equations, round_through

import parscan
from parscan import testing as checking
from parscan.claims import Band, Blocks
from parscan.testing import StructureError, check_structure

each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def normal(dtype, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))


def rnn(w, h):
    return jnp.tanh(h @ w)


def lstm(w, state):
    i, f, g = jnp.split(state["h"] @ w, 3, axis=-1)
    c = jax.nn.sigmoid(f) * state["c"] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return {"c": c, "h": jnp.tanh(c)}


def elementwise_lstm(w, state):
    c = jax.nn.sigmoid(w * state["h"]) * state["c"] + jnp.tanh(state["h"])
    return {"c": c, "h": jnp.tanh(c)}


def heads(w, h):
    """Blocks of the size of w."""
    return jnp.tanh(h.reshape(-1, len(w)) @ w).reshape(h.shape)


def normalised(_, h):
    return jnp.tanh(h - h.mean(0))


def conv(w, h):
    return jnp.convolve(h, w, mode="same")


def batched_conv(w, h):
    return jax.vmap(conv, (None, 0))(w, h)


def ring(w, h):
    return h + w * (jnp.roll(h, 1) - 2 * h + jnp.roll(h, -1))


def line(w, h):
    padded = jnp.pad(h, 1)
    return h + w * (padded[2:] - 2 * h + padded[:-2])


def coupling(w, h):
    kept, moved = jnp.split(h, 2, axis=-1)
    return jnp.concatenate([kept, moved * jnp.exp(jnp.tanh(kept @ w))], axis=-1)


def drawn(*shape):
    return lambda dtype: normal(dtype, *shape)


def pair(*shape):
    return lambda dtype: {"c": normal(dtype, *shape), "h": normal(dtype, *shape, seed=1)}


def of(value):
    return lambda dtype: None if value is None else jnp.asarray(value, dtype)


def named(entries, new="h", old="h"):
    """Pairs of indices as pairs of coordinates."""
    at = lambda name, index: f"{name}[{', '.join(map(str, np.atleast_1d(index)))}]"
    return {(at(new, i), at(old, j)) for i, j in entries}


def apart(n, least=1, most=None):
    return [(i, j) for i, j in itertools.product(range(n), repeat=2) if least <= abs(i - j) <= (n if most is None else most)]


ORDER = (1, 4, 2, 0, 3, 5)
CELLS = list(itertools.product(range(2), range(3)))

WRONG = {
    # name: (layer, parameters, state, claim, all dependences that it denies)
    "RNN, diagonal": (rnn, drawn(4, 4), drawn(4), "diagonal", named(apart(4))),
    "LSTM's pair, diagonal": (lstm, drawn(3, 9), pair(3), "diagonal", named(itertools.product(range(3), repeat=2), "h['c']", "h['h']") | named(apart(3), "h['h']", "h['h']") | named([(i, i) for i in range(3)], "h['h']", "h['c']")),
    "elementwise LSTM, diagonal": (elementwise_lstm, drawn(2), pair(2), "diagonal", named([(0, 0), (1, 1)], "h['c']", "h['h']") | named([(0, 0), (1, 1)], "h['h']", "h['c']")),
    "batch statistics": (normalised, of(None), drawn(3, 1), Blocks(axis=0), named(((i, 0), (j, 0)) for i, j in apart(3))),
    "the other axis of an RNN": (rnn, drawn(3, 3), drawn(2, 3), Blocks(axis=1), named((a, b) for a in CELLS for b in CELLS if a[0] == b[0] and a[1] != b[1])),
    "blocks of 8 as blocks of 4": (heads, drawn(8, 8), drawn(16), Blocks(size=4), named((i, j) for i, j in apart(16) if i // 8 == j // 8 and i // 4 != j // 4)),
    "blocks of 3 as blocks of 2": (heads, drawn(3, 3), drawn(6), Blocks(size=2), named((i, j) for i, j in apart(6) if i // 3 == j // 3 and i // 2 != j // 2)),
    "bandwidth 2 as 1": (conv, drawn(5), drawn(5), Band(1), named(apart(5, 2, 2))),
    "bandwidth 2 as 1, in a batch": (batched_conv, drawn(5), drawn(2, 6), Band(1, axis=0), named(((b, i), (b, j)) for b in range(2) for i, j in apart(6, 2, 2))),
    "a band over the rows of a batch": (lambda w, h: line(w, h.ravel()).reshape(h.shape), of(0.25), drawn(2, 3), Band(1, axis=0), named([((0, 2), (1, 0)), ((1, 0), (0, 2))])),
    "the corners of a ring": (ring, of(0.25), drawn(9), Band(1), named([(0, 8), (8, 0)])),
    "permutation, diagonal": (lambda _, h: h[jnp.array(ORDER)], of(None), drawn(6), "diagonal", named((i, j) for i, j in enumerate(ORDER) if i != j)),
    "leaves that change places, diagonal": (lambda _, h: {"c": h["h"], "h": h["c"]}, of(None), pair(2), "diagonal", named([(0, 0), (1, 1)], "h['c']", "h['h']") | named([(0, 0), (1, 1)], "h['h']", "h['c']")),
    "sort along the batch": (lambda _, h: jnp.sort(h, axis=0), of(None), of([[3, 1], [1, 2], [2, 3]]), Blocks(axis=0), named([((0, 0), (1, 0)), ((1, 0), (2, 0)), ((2, 0), (0, 0))])),
    "straight-through round of a product": (lambda w, h: round_through(h @ w), drawn(3, 3), drawn(3), "diagonal", named(apart(3))),
    "coupling layer, diagonal": (coupling, drawn(2, 2), drawn(4), "diagonal", named(itertools.product((2, 3), (0, 1)))),
    "a weight that starts at zero": (lambda w, h: h + h @ w, of(np.zeros((3, 3))), drawn(3), "diagonal", named(apart(3))),
    "nothing at the state itself": (lambda _, h: h + h[::-1] ** 2, of(None), of(np.zeros(4)), "diagonal", named((i, 3 - i) for i in range(4))),
    "a custom VJP": (lambda w, h: clipped(h @ w), drawn(3, 3), drawn(3), "diagonal", named(apart(3))),
    "a counter and a scalar beside": (lambda w, s: (s[0] + 1, s[1] + s[2][1], w * s[2]), of(2), lambda dtype: (jnp.int32(2), jnp.ones((), dtype), jnp.ones(2, dtype)), "diagonal", {("h[1]", "h[2][1]")}),
}  # fmt: skip

RIGHT = {
    # name: (layer, parameters, state, claim)
    "RNN on a batch": (rnn, drawn(4, 4), drawn(3, 4), Blocks(axis=0)),
    "RNN on a batch, by size": (rnn, drawn(4, 4), drawn(3, 4), Blocks(size=4)),
    "RNN, dense": (rnn, drawn(4, 4), drawn(4), "dense"),
    "RNN, a band that is all": (rnn, drawn(4, 4), drawn(4), Band(9)),
    "LSTM on a batch": (lstm, drawn(3, 9), pair(2, 3), Blocks(axis=0)),
    "LSTM on a batch that is last": (lambda w, s: jax.tree.map(jnp.transpose, lstm(w, jax.tree.map(jnp.transpose, s))), drawn(3, 9), pair(3, 2), Blocks(axis=-1)),
    "elementwise LSTM": (elementwise_lstm, drawn(3), pair(3), Blocks(axis=0)),
    "elementwise": (lambda w, s: jax.tree.map(lambda h: jnp.tanh(w * h), s), drawn(3), pair(3), "diagonal"),
    "blocks of 8": (heads, drawn(8, 8), drawn(16), Blocks(size=8)),
    "bandwidth 2": (conv, drawn(5), drawn(9), Band(2)),
    "bandwidth 2, in a batch": (batched_conv, drawn(5), drawn(3, 9), Band(2, axis=0)),
    "a line": (line, of(0.25), drawn(9), Band(1)),
    "an identity matrix": (lambda _, h: jnp.tanh(h @ jnp.eye(4, dtype=h.dtype)), of(None), drawn(4), "diagonal"),
    "to Fourier space and back": (lambda _, h: jnp.fft.ifft(jnp.fft.fft(h)).real, of(None), drawn(16), "diagonal"),
    "rows of a batch by lax.map": (lambda w, h: lax.map(lambda h: jnp.tanh(h @ w), h), drawn(4, 4), drawn(3, 4), Blocks(axis=0)),
    "a state that changes its width": (rnn, drawn(4, 2), drawn(3, 4), Blocks(axis=0)),
    "a scalar": (jnp.multiply, of(2.0), of(3.0), "diagonal"),
    "no coordinate at all": (lambda _, h: h, of(None), drawn(0, 4), Blocks(axis=0)),
    "not finite away from the state": (lambda _, h: jnp.sqrt(h) @ jnp.eye(2, dtype=h.dtype), of(None), of(np.full(2, 0.01)), "diagonal"),
}  # fmt: skip


def pairs_in(text):
    return re.findall(r"`(h[^`]*)` (?:of the new state depends )?on `(h[^`]*)`", text)


# --- check_structure ---------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_claim_is_found_and_the_coordinates_are_named(name, dtype):
    layer, params, state, claim, denied = WRONG[name]
    with pytest.raises(StructureError) as raised:
        check_structure(layer, params(dtype), state(dtype), structure=claim)
    text = str(raised.value)
    found = set(pairs_in(text))
    assert "denies" in text and f"`structure={claim!r}`" in text
    assert found <= denied
    assert len(found) == min(len(denied), checking.LISTED)
    assert len(denied) == 1 or f" {len(denied)} such pairs" in text


@each_dtype
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_claim_passes(name, dtype):
    layer, params, state, claim = RIGHT[name]
    assert check_structure(layer, params(dtype), state(dtype), structure=claim) is None


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ("diagonal", "in the raveled state they are coordinates 4 and 5"),
        (Blocks(axis=1), "their indices along axis 1 are 1 and 2"),
        (Blocks(size=1), "in the raveled state they are coordinates 4 and 5, in the blocks 4 and 5 of 1"),
        (Band(0), "in the raveled state they are coordinates 4 and 5, 1 apart"),
        (Band(0, axis=0), "in the raveled rest they are coordinates 1 and 2, 1 apart"),
        (Band(1, axis=-1), "their indices along axis -1 are 1 and 2"),
    ],
)
def test_the_reason_is_said_in_the_coordinates_of_the_claim(claim, words):
    with pytest.raises(StructureError) as raised:
        check_structure(lambda _, h: h.at[1, 1].add(2 * h[1, 2]), None, jnp.ones((2, 3)), structure=claim)
    assert str(raised.value) == f"`h[1, 1]` of the new state depends on `h[1, 2]` of the old one (derivative 2), which `structure={claim!r}` denies: {words}."


def test_a_step_of_a_scan():
    def step(carry, x):
        carry = jnp.tanh(carry * x).at[1].add(carry[0])
        return carry, carry

    with pytest.raises(StructureError, match=r"^`h\[1\]` of the new state depends on `h\[0\]` of the old one \(derivative 1\)"):
        check_structure(lambda x, h: step(h, x)[0], jnp.ones(3), jnp.ones(3), structure="diagonal")


def test_layers_are_checked_one_by_one():
    bent = lambda w, h: jnp.tanh(w * h)
    mixing = lambda w, h: jnp.tanh(w * h).at[2].add(h[0])
    weights = [jnp.ones(3)] * 4
    check_structure([bent] * 4, weights, jnp.ones(3), structure="diagonal")
    with pytest.raises(StructureError, match=r"^Layer 2 of the chain: `h\[2\]` of the new state depends on `h\[0\]` of the old one"):
        check_structure([bent, bent, mixing, bent], weights, jnp.ones(3), structure="diagonal")
    widths = [jnp.ones((3, 5)), jnp.ones((5, 2)), None]
    check_structure([rnn, rnn, lambda _, h: h.sum(1, keepdims=True)], widths, jnp.ones((4, 3)), structure=Blocks(axis=0))
    with pytest.raises(StructureError, match=r"^Layer 2 of the chain: `h\[0, 0\]` of the new state depends on `h\[1, [01]\]` of the old one"):
        check_structure([rnn, rnn, lambda _, h: h + h[::-1]], widths, jnp.ones((2, 3)), structure=Blocks(axis=0))


def test_equal_layers_have_weights_of_their_own():
    layer = lambda w, h: h + h @ w
    zero, weight = jnp.zeros((3, 3)), jnp.zeros((3, 3)).at[0, 2].set(1.0)
    check_structure([layer] * 3, [zero] * 3, jnp.ones(3), structure="diagonal", vary_params=False)
    with pytest.raises(StructureError, match=r"^Layer 1 of the chain: `h\[2\]` of the new state depends on `h\[0\]` of the old one \(derivative 1\)"):
        check_structure([layer] * 3, [zero, weight, zero], jnp.ones(3), structure="diagonal", vary_params=False)


def test_it_is_said_where_a_dependence_shows():
    with pytest.raises(StructureError, match=r"This shows at a random state near the given one\.$"):
        check_structure(*(make("float64") if i else make for i, make in enumerate(WRONG["nothing at the state itself"][:3])), structure="diagonal")
    layer, params, state = lambda w, h: h + h @ w, jnp.zeros((3, 3)), jnp.ones(3)
    with pytest.raises(StructureError, match=r"This shows with random parameters near the given ones; `vary_params=False` leaves them alone\.$"):
        check_structure(layer, params, state, structure="diagonal")
    check_structure(layer, params, state, structure="diagonal", vary_params=False)


def test_it_is_proved_where_it_can_be(monkeypatch):
    def forbidden(*_):
        raise AssertionError("a derivative was computed")

    monkeypatch.setattr(checking, "_pulled", forbidden)
    check_structure(rnn, jnp.ones((8, 8)), jnp.ones((3, 8)), structure=Blocks(axis=0))
    check_structure(rnn, jnp.ones((8, 8)), jnp.ones((3, 8)), structure=Blocks(size=8))
    check_structure(elementwise_lstm, jnp.ones(500_000), {"c": jnp.ones(500_000), "h": jnp.ones(500_000)}, structure=Blocks(axis=0))
    check_structure(jnp.multiply, jnp.ones(500_000), jnp.ones(500_000), structure="diagonal")
    with pytest.raises(AssertionError, match="a derivative was computed"):
        check_structure(rnn, jnp.ones((8, 8)), jnp.ones((3, 8)), structure="diagonal")


def test_what_is_never_finite_is_not_called_right():
    with pytest.raises(ValueError, match=r"cannot be checked: the derivative of `h\[0\]` of the new state is not finite"):
        check_structure(lambda _, h: (h @ jnp.eye(2)) * jnp.nan, None, jnp.ones(2), structure="diagonal")


@pytest.mark.parametrize("claim", [Blocks(axis=2), Blocks(size=5), Band(1, axis=-3), "auto", "triangular"])
def test_a_claim_that_does_not_fit_is_refused_as_by_plan(claim):
    step = lambda h, x: (jnp.tanh(h * x), None)
    with pytest.raises(ValueError) as raised:
        check_structure(lambda x, h: step(h, x)[0], jnp.ones(4), jnp.ones((2, 4)), structure=claim)
    if claim == "auto":
        assert "claims nothing" in str(raised.value)
        return
    with pytest.raises(ValueError) as planned:
        parscan.plan(step, jnp.ones((2, 4)), jnp.ones((3, 4)), structure=claim)
    assert str(raised.value) == str(planned.value)


# --- states too large for the whole Jacobian --------------------------------------------------------------------------------------


LARGE = {
    # name: (layer, state, claim, the pair)
    "one in a diagonal": (lambda _, h: (h * 2).at[777].add(h[1500]), (2000,), "diagonal", ("h[777]", "h[1500]")),
    "one in a batch": (lambda _, h: jnp.tanh(h @ jnp.ones((4, 4))).at[300, 1].add(h[12, 3]), (500, 4), Blocks(axis=0), ("h[300, 1]", "h[12, 3]")),
    "the far corner of a band": (lambda _, h: line(0.1, h).at[0].add(h[-1]), (2000,), Band(1), ("h[0]", "h[1999]")),
    "next to a band": (lambda _, h: line(0.1, h).at[1000].add(h[1003]), (2000,), Band(2), ("h[1000]", "h[1003]")),
    "a neighbouring segment": (lambda _, h: line(0.1, h).at[1002].add(h[997]), (2000,), Band(2), ("h[1002]", "h[997]")),
    "a band that leaves its row": (lambda _, h: jax.vmap(lambda h: line(0.1, h))(h).at[4, 0].add(h[3, 99]), (20, 100), Band(1, axis=0), ("h[4, 0]", "h[3, 99]")),
}  # fmt: skip


@each_dtype
@pytest.mark.parametrize("name", LARGE)
def test_large_states_are_probed(name, dtype, monkeypatch):
    monkeypatch.setattr(checking, "ENTRIES", 2**10)
    layer, shape, claim, (new, old) = LARGE[name]
    with pytest.raises(StructureError) as raised:
        check_structure(layer, None, normal(dtype, *shape), structure=claim)
    assert pairs_in(str(raised.value)) == [(new, old)]
    right = {"diagonal": lambda _, h: jnp.sin(h)}.get(claim) if isinstance(claim, str) else None
    right = right or (
        (lambda _, h: jnp.tanh(h @ jnp.ones((4, 4))))
        if isinstance(claim, Blocks)
        else lambda _, h: jax.vmap(lambda h: line(0.1, h))(jnp.atleast_2d(h)).reshape(h.shape)
    )
    check_structure(right, None, normal(dtype, *shape), structure=claim)


@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("width", [1, 3, 8, 29])
@pytest.mark.parametrize("band", [None, 0, 1, 3])
def test_some_set_of_rows_shows_every_denied_entry(blocks, width, band):
    random = np.random.default_rng(width)
    old, new = (
        checking._Coordinates(*(axis.ravel()[order] for axis in np.indices((blocks, width))))
        for order in (random.permutation(blocks * width) for _ in range(2))
    )
    allowed = checking._Allowed(old, new, band)
    every = np.arange(blocks * width)
    entries = allowed.entries(every[:, None], every)
    want = (new.block[:, None] == old.block) & (abs(new.place[:, None] - old.place) <= (width if band is None else band))
    assert np.array_equal(entries, want)
    shown = np.zeros_like(entries)
    for rows in allowed.sets():
        columns = allowed.columns(rows)
        assert np.array_equal(columns, want[rows].any(0))
        shown |= rows[:, None] & ~columns
    assert np.array_equal(shown, ~want)


# --- debug=True ----------------------------------------------------------------------------------------------------------------------


STEPS = {
    # name: (step, carry, x, wrong claim, coordinates of which one is named, right claim)
    "RNN": (lambda h, x: jnp.tanh(h @ normal(h.dtype, 4, 4) + x), drawn(2, 4), (2, 4), "diagonal", r"carry\[[01], [0-3]\]", Blocks(axis=0)),
    "LSTM's pair": (lambda s, x: elementwise_lstm(x, s), pair(3), (3,), "diagonal", r"carry\['[ch]'\]\[[012]\]", Blocks(axis=0)),
    "batch statistics": (lambda h, x: normalised(None, h) + x, drawn(4, 2), (4, 2), Blocks(axis=0), r"carry\[[0-3], [01]\]", Blocks(axis=1)),
    "one entry": (lambda h, x: jnp.tanh(h * x).at[5].add(h[2]), drawn(9), (9,), "diagonal", r"carry\[5\]", "dense"),
    "a key, a counter, a scalar": (
        lambda s, x: (s[0] + 1, s[1], jnp.tanh(s[2] * x).at[0].add(s[3]) * jax.random.bernoulli(s[1], 0.9, (3,)), s[3] * 0.9),
        lambda dtype: (jnp.int32(0), jax.random.key(0), normal(dtype, 3), jnp.ones((), dtype)), (3,), "diagonal", r"carry\[2\]\[0\]", "dense",
    ),
}  # fmt: skip


def scanned(step, x, claim, method, watch=True):
    xs = lambda state: normal(next(a.dtype for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.floating)), 4, *x, seed=3)

    options = {} if watch is None else {"debug": watch}

    def loss(state):
        final, _ = parscan.scan(lambda h, x: (step(h, x), None), state, xs(state), method=method, structure=claim, **options)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(final) if jnp.issubdtype(leaf.dtype, jnp.floating))

    return loss


@pytest.mark.parametrize("name, dtype", [*((name, "float32") for name in STEPS), ("RNN", "float64")])  # the finer the digits, the less is forgiven
def test_debug_names_the_step_and_the_coordinate(name, dtype):
    step, state, x, wrong, coordinate, right = STEPS[name]
    gradient = lambda claim: jax.jit(jax.grad(scanned(step, x, claim, "walk"), allow_int=True))(state(dtype))
    with pytest.raises(
        Exception, match=rf"StructureError: In step [0-3] `{coordinate}` of the new state moves by .* the claim is wrong, and so is the gradient"
    ):
        jax.block_until_ready(gradient(wrong))
    jax.block_until_ready(gradient(right))
    jax.block_until_ready(gradient("auto"))


@pytest.mark.parametrize("reverse", [False, True])
def test_debug_names_the_one_step_that_is_wrong(reverse):
    step = lambda h, x: jnp.tanh(h) + x * h[::-1]
    xs = jnp.zeros((7, 4)).at[3, 1].set(0.5)
    loss = lambda h: parscan.scan(lambda h, x: (step(h, x), None), h, xs, method="tree", structure="diagonal", debug=True, reverse=reverse)[0].sum()
    with pytest.raises(Exception, match=r"In step 3 `carry\[1\]` of the new state"):
        jax.block_until_ready(jax.grad(loss)(jnp.ones(4)))


WAYS = {
    "grad": jax.grad,
    "jit of grad": lambda f: jax.jit(jax.grad(f)),
    "grad of jit": lambda f: jax.grad(jax.jit(f)),
    "vmap of grad": lambda f: lambda h: jax.vmap(jax.grad(f))(jnp.stack([h, 2 * h])),
    "jit of vmap of grad": lambda f: jax.jit(lambda h: jax.vmap(jax.grad(f))(jnp.stack([h, 2 * h]))),
    "jvp": lambda f: lambda h: jax.jvp(f, (h,), (h,)),
    "hessian": jax.hessian,
    "grad of checkpoint": lambda f: jax.jit(jax.grad(jax.checkpoint(f))),
    "inside a loop": lambda f: jax.jit(jax.grad(lambda h: lax.scan(lambda h, _: (h + f(h), None), h, None, 2)[0].sum())),
    "inside a scan of its own": lambda f: jax.grad(lambda h: parscan.scan(lambda h, _: (h + f(h), None), h, None, 2, method="walk")[0].sum()),
}


@pytest.mark.parametrize("way", WAYS)
def test_debug_works_under_every_transformation(way):
    step, state, x, wrong, _, right = STEPS["RNN"]
    run = lambda claim: jax.block_until_ready(WAYS[way](scanned(step, x, claim, "walk"))(state("float64")))
    run(right)
    with pytest.raises(Exception, match="the claim is wrong"):
        run(wrong)


CHAINS = {
    "chain": lambda claim: parscan.chain(rnn, method="tree", structure=claim, debug=True),
    "forward": lambda claim: lambda w, x: parscan.forward(rnn, w, x, method="walk", structure=claim, debug=True)[0],
    "chain, of layers": lambda claim: lambda w, x: parscan.chain([rnn] * 4, method="tree", structure=claim, debug=True)(list(w), x),
}


@pytest.mark.parametrize("kind, dtype", [*((kind, "float32") for kind in CHAINS), ("chain", "float64")])
def test_debug_of_chains(kind, dtype):
    x, weights = normal(dtype, 4), normal(dtype, 4, 4, 4) / 2
    gradient = lambda claim: jax.block_until_ready(jax.jit(jax.grad(lambda w: CHAINS[kind](claim)(w, x).sum()))(weights))
    with pytest.raises(Exception, match=r"In layer [0-3] `h\[[0-3]\]` of the new state moves by .* `structure='diagonal'` claims"):
        gradient("diagonal")
    gradient("dense")
    gradient("auto")


def test_debug_of_parallel_backward():
    bent, mixing = lambda w, h: {"m": jnp.tanh(h["m"] * w)}, lambda w, h: {"m": jnp.tanh(h["m"] * w).at[2].add(h["m"][0])}
    params = [normal("float64", 3, seed=i) for i in range(5)]

    def backward(layers, claim):
        y, activations = parscan.forward(layers, params, {"m": jnp.ones(3)})
        return jax.block_until_ready(parscan.parallel_backward(layers, params, activations, y, method="tree", structure=claim, debug=True).input)

    backward([bent] * 5, "diagonal")
    with pytest.raises(Exception, match=r"In layer 3 `h\['m'\]\[2\]` of the new state"):
        backward([bent, bent, bent, mixing, bent], "diagonal")
    backward([bent, bent, bent, mixing, bent], "auto")


def test_debug_costs_nothing_when_off():
    step, state, x, _, _, right = STEPS["RNN"]
    programs = {watch: jax.make_jaxpr(jax.grad(scanned(step, x, right, "tree", watch)))(state("float64")) for watch in (False, True)}
    plain = jax.make_jaxpr(jax.grad(scanned(step, x, right, "tree", None)))(state("float64"))
    called = {watch: any("callback" in eqn.primitive.name for eqn in equations(program)) for watch, program in programs.items()}
    assert called == {False: False, True: True}
    assert [e.primitive.name for e in equations(programs[False])] == [e.primitive.name for e in equations(plain)]


def test_debug_has_nothing_to_check_where_the_loop_is_left_to_jax():
    step, state, x, wrong, _, _ = STEPS["RNN"]
    watched, plain = (jax.make_jaxpr(jax.grad(scanned(step, x, wrong, "lax", watch)))(state("float64")) for watch in (True, False))
    assert str(watched) == str(plain)


def test_debug_finds_a_proof_that_is_wrong(monkeypatch):
    """Proofs are checked as claims are: here one that forgets what a matrix product mixes."""
    from parscan import proof

    forgetful = lambda closed, tangents: [{0: tuple(range(len(v.aval.shape)))} for v in closed.jaxpr.outvars]
    monkeypatch.setattr(proof, "dependence", forgetful)
    weights = normal("float64", 5, 5, seed=17)
    loss = lambda h: parscan.scan(lambda h, x: (jnp.tanh(h @ weights), None), h, None, 4, method="tree", debug=True)[0].sum()
    try:
        with pytest.raises(Exception, match="the proof is wrong, which is a fault of parscan's"):
            jax.block_until_ready(jax.grad(loss)(jnp.ones((2, 5))))
    finally:
        for cached in (proof.derivative, proof.proved, proof._influences):
            cached.cache_clear()
        from parscan import structure

        structure._structures.cache_clear()


@pytest.mark.parametrize("kind, shape", [("LowRank", (3, 12)), ("Kronecker", (2, 4, 4)), ("Banded", (2, 9)), ("Permutation", (2, 5))])
def test_debug_checks_every_kind_as_it_is_formed(kind, shape):
    down, up, left = normal("float64", 12, 2) / 4, normal("float64", 2, 12, seed=1) / 4, normal("float64", 4, 4, seed=2) / 2
    step = {
        "LowRank": lambda h: h + jnp.tanh(h @ down) @ up,
        "Kronecker": lambda h: jnp.tanh(left @ h @ left.T),
        "Banded": lambda h: jnp.tanh(h).at[:, 1:].add(0.3 * jnp.sin(h[:, :-1])),
        "Permutation": lambda h: jnp.tanh(h)[:, ::-1],
    }[kind]
    f, state = lambda h, x: (step(h) + 0.1 * x, None), normal("float64", *shape, seed=3)
    xs = normal("float64", 5, *shape, seed=4)
    assert parscan.plan(f, state, xs, method="walk").kind == kind
    gradient = lambda scan, **options: jax.jit(jax.grad(lambda h: jnp.sum(scan(f, h, xs, **options)[0] ** 2)))(state)
    assert_close(gradient(parscan.scan, method="walk", debug=True), gradient(jax.lax.scan), 1e-10)


@pytest.mark.parametrize("f, h", [(lambda w, h: h.conj()[::-1], jnp.ones(3, "complex64")), (lambda w, h: h * 1j, jnp.ones(3))])
def test_a_complex_state_is_refused(f, h):
    """Of which only the real part would be looked at."""
    with pytest.raises(TypeError, match="must be real; got complex"):
        parscan.testing.check_structure([f], [None], h, structure="diagonal")
