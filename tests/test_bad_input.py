"""Bad input gets a clear error before any work: argument, what it got, what it needs, how to mend it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import parscan

LAYER = lambda p, h: jnp.tanh(h @ p["w"])
PARAMS = {"w": jnp.ones((5, 3, 3))}
X = jnp.ones(3)
ACTIVATIONS = jnp.ones((6, 3))


def backward(layer=LAYER, params=PARAMS, activations=ACTIVATIONS, cotangent=X, **options):
    return parscan.parallel_backward(layer, params, activations, cotangent, **options)


LAYERS = [lambda w, h: jnp.tanh(h @ w), lambda w, h: h @ w, lambda _, h: h.sum()]
WEIGHTS = [jnp.ones((3, 5)), jnp.ones((5, 2)), None]
STATES = [jnp.ones(3), jnp.ones(5), jnp.ones(2), jnp.ones(())]


def through(layers=LAYERS, params=WEIGHTS, activations=STATES, cotangent=1.0, **options):
    return parscan.parallel_backward(layers, params, activations, cotangent, **options)


def named(w, h):
    return h @ w


CASES = {
    "sequence: fewer params than layers": (lambda: through(params=WEIGHTS[:2]), ValueError, r"`params` must have one entry a layer: got 2 for 3 layers.*None"),
    "sequence: stacked params": (lambda: through(params=jnp.ones((3, 3, 3))), TypeError, r"`params` must be a sequence with one entry a layer.*got ArrayImpl"),
    "sequence: a layer that is not callable": (
        lambda: parscan.chain([LAYERS[0], jnp.ones(3)]),
        TypeError,
        r"`layers\[1\]` must be a callable \(params_i, h\) -> h; got Array",
    ),
    "sequence: too few activations": (lambda: through(activations=STATES[:3]), ValueError, r"`activations` must be the list h_0 … h_L, 4 for 3 layers; got 3"),
    "sequence: stacked activations": (lambda: through(activations=jnp.ones((4, 3))), ValueError, r"must be the list h_0 … h_L, 4 for 3 layers; got ArrayImpl"),
    "sequence: an activation of another shape": (
        lambda: through([named, *LAYERS[1:]], activations=[STATES[0], jnp.ones(4), *STATES[2:]]),
        ValueError,
        r"`activations\[1\]` does not fit: layer 0 \(named\) makes another of `activations\[0\]`: activations\[1\] is float64\[4\], where float64\[5\] is needed",
    ),
    "sequence: an activation of another dtype": (
        lambda: through(activations=[*STATES[:2], jnp.ones(2, jnp.float32), STATES[3]]),
        ValueError,
        r"activations\[2\] is float32\[2\], where float64\[2\] is needed",
    ),
    "sequence: an activation of another structure": (
        lambda: through(activations=[*STATES[:2], {"a": STATES[2]}, STATES[3]]),
        ValueError,
        r"`activations\[2\]` does not fit: layer 1 .* has the structure PyTreeDef\(\{'a': \*\}\)",
    ),
    "sequence: a cotangent for a layer that does not exist": (
        lambda: through(layer_cotangents={4: STATES[0]}),
        ValueError,
        r"`layer_cotangents` has a cotangent for 4, but the activations are h_0 … h_3: give an index from 0 to 3",
    ),
    "sequence: a cotangent of another shape": (
        lambda: through(layer_cotangents={1: jnp.ones(2)}),
        ValueError,
        r"`layer_cotangents\[1\]` must match `activations\[1\]`: layer_cotangents\[1\] is float64\[2\], where float64\[5\]",
    ),
    "sequence: cotangents of another count": (
        lambda: through(layer_cotangents=[None] * 3),
        ValueError,
        r"must be a list of 4 entries, None for.*got 3 entries",
    ),
    "sequence: params_axes": (lambda: through(params_axes=None), ValueError, r"`params_axes` is for one layer repeated"),
    "sequence: length": (lambda: parscan.forward(LAYERS, WEIGHTS, STATES[0], length=3), ValueError, r"`params_axes` and `length` are for one layer repeated"),
    "sequence: complex activations": (
        lambda: through(activations=[STATES[0] + 0j, *STATES[1:]]),
        TypeError,
        r"`activations` must be real; got .*complex128\[3\]",
    ),
    "sequence: no array among params": (
        lambda: through(params=[WEIGHTS[0], "w", None]),
        TypeError,
        r"`params\[1\]` must hold arrays alone; got params\[1\]: 'w'",
    ),
    "sequence: a layer that returns no array": (
        lambda: parscan.forward([lambda w, h: "x"], [None], STATES[0]),
        TypeError,
        r"Layer 0 \(<lambda>\) must return arrays, or a pytree of them; got h: 'x'",
    ),
    "sequence: a plan for the wrong activations": (
        lambda: parscan.plan(LAYERS, WEIGHTS, STATES[:2]),
        ValueError,
        r"must be the list h_0 … h_L of activations, or \[h_0\]",
    ),
    "activations that are no arrays": (lambda: backward(activations="abc"), TypeError, r"`activations` must hold arrays alone; got activations: 'abc'"),
    "a cotangent that is no array": (
        lambda: backward(cotangent="a"),
        TypeError,
        r"`cotangent` must hold arrays like those of the last activation h_L; got cotangent: 'a'",
    ),
    "a layer that returns no array": (
        lambda: backward(layer=lambda p, h: "x"),
        TypeError,
        r"must return a state like the one it was given, made of arrays; got h: 'x'",
    ),
    "a state that is no array": (lambda: parscan.forward(LAYER, PARAMS, "s"), TypeError, r"the state must hold arrays alone; got h: 's'"),
    "linear_scan of nothing": (
        lambda: parscan.linear_scan(parscan.Diagonal(None), jnp.zeros((5, 4)), jnp.zeros(4)),
        TypeError,
        r"`A`, `b`, `h0` must be arrays",
    ),
    "params without a layer axis": (
        lambda: backward(params={"w": jnp.float64(1.0)}),
        ValueError,
        r"`params` must be stacked.*params\['w'\]: float64\[\].*jnp.stack",
    ),
    "params of different lengths": (
        lambda: backward(params={"w": jnp.ones((5, 3, 3)), "b": jnp.ones((4, 3))}),
        ValueError,
        r"equally long.*params\['b'\]: float64\[4,3\].*params_axes",
    ),
    "params for another number of layers": (
        lambda: backward(params={"w": jnp.ones((4, 3, 3))}),
        ValueError,
        r"stacked for 4 layers, but the leading axis of `activations`.*says 5",
    ),
    "params_axes that are no prefix": (lambda: backward(params_axes={"v": 0}), ValueError, r"`params_axes` must be a prefix of `params`"),
    "params_axes other than 0 and None": (lambda: backward(params_axes=1), ValueError, r"`params_axes` may hold 0 \(stacked\) and None \(shared\); got 1"),
    "no length": (lambda: parscan.forward(LAYER, PARAMS, X, params_axes=None), ValueError, r"number of layers is unknown.*give `length`"),
    "length that disagrees": (lambda: parscan.forward(LAYER, PARAMS, X, length=7), ValueError, r"stacked for 5 layers, but `length` says 7"),
    "activations without a leading axis": (
        lambda: backward(activations=jnp.float64(1.0)),
        ValueError,
        r"`activations` must be h_0 … h_L stacked.*float64\[\].*parscan.forward",
    ),
    "activations of different lengths": (
        lambda: backward(activations=(ACTIVATIONS, X)),
        ValueError,
        r"same in every leaf; got activations\[0\]: float64\[6,3\], activations\[1\]",
    ),
    "no activation": (lambda: backward(activations=jnp.ones((0, 3))), ValueError, r"must hold h_0 at least"),
    "activations of another shape than the layer makes": (
        lambda: backward(layer=lambda p, h: h[:2], activations=jnp.ones((6, 3))),
        TypeError,
        r"A layer must return a state like the one it was given: h was float64\[3\] and became float64\[2\]",
    ),
    "activations of another dtype than the layer makes": (
        lambda: backward(activations=ACTIVATIONS.astype(jnp.float32), cotangent=X.astype(jnp.float32)),
        TypeError,
        r"h was float32\[3\] and became float64\[3\]",
    ),
    "complex activations": (lambda: backward(activations=ACTIVATIONS + 0j), TypeError, r"`activations` must be real; got activations: complex128\[6,3\]"),
    "cotangent of another shape": (
        lambda: backward(cotangent=jnp.ones(4)),
        ValueError,
        r"`cotangent` must match the last activation h_L: cotangent is float64\[4\], where float64\[3\] is needed",
    ),
    "cotangent of another dtype": (lambda: backward(cotangent=jnp.ones(3, jnp.float32)), ValueError, r"cotangent is float32\[3\], where float64\[3\]"),
    "cotangent of another structure": (
        lambda: backward(cotangent=(X,)),
        ValueError,
        r"`cotangent` must match the last activation h_L: `cotangent` has the structure PyTreeDef",
    ),
    "layer_cotangents one too short": (
        lambda: backward(layer_cotangents=jnp.ones((5, 3))),
        ValueError,
        r"`layer_cotangents` must match `activations`: layer_cotangents is float64\[5,3\], where float64\[6,3\]",
    ),
    "no cotangent at all": (lambda: backward(cotangent=None), ValueError, r"both None.*Give the loss's derivative"),
    "a layer that changes the structure": (
        lambda: backward(layer=lambda p, h: (h, h)),
        TypeError,
        r"the layer's output has the structure PyTreeDef\(\(\*, \*\)\)",
    ),
    "a layer that changes a leaf of a dict": (
        lambda: parscan.forward(lambda p, h: {"a": h["a"], "b": h["b"][None]}, PARAMS, {"a": X, "b": X}),
        TypeError,
        r"h\['b'\] was float64\[3\] and became float64\[1,3\]",
    ),
    "a layer that cannot be called": (lambda: backward(layer=3), TypeError, r"`layer` must be a callable"),
    "a chain of a layer that cannot be called": (lambda: parscan.chain(3), TypeError, r"`layer` must be a callable"),
    "unknown method": (
        lambda: backward(method="fast"),
        ValueError,
        r"`method` must be one of 'auto', 'lax', 'sequential', 'walk', 'associative', 'tree', 'chunked'.*got 'fast'",
    ),
    "unknown method of scan": (lambda: parscan.scan(lambda h, x: (h, x), X, X, method="fast"), ValueError, r"`method` must be one of 'auto'"),
    "a method's class": (lambda: backward(method=parscan.Tree), TypeError, r"write `Tree\(\)`"),
    "a method of another type": (lambda: backward(method=3), TypeError, r"`method` must be one of"),
    "unknown structure": (lambda: backward(structure="sparse"), ValueError, r"`structure` must be 'auto', 'dense', 'diagonal', parscan.Blocks.*got 'sparse'"),
    "a structure of another type": (lambda: parscan.chain(LAYER, structure=8), TypeError, r"`structure` must be 'auto'"),
    "a block size that does not divide": (
        lambda: backward(structure=parscan.Blocks(size=2), method="tree"),
        ValueError,
        r"Blocks\(size=2\)` does not fit: the state has 3 coordinates",
    ),
    "a block axis that is not there": (
        lambda: backward(structure=parscan.Blocks(axis=1), method="tree"),
        ValueError,
        r"Blocks\(axis=1\)` does not fit: every leaf of the state needs that axis; got float64\[3\]",
    ),
    "an axis that is no integer": (lambda: parscan.Blocks(axis="x"), ValueError, r"`Blocks\(axis=...\)` must be an integer; got 'x'"),
    "a truth value for a size": (lambda: parscan.Blocks(size=True), ValueError, r"must be an integer of at least 1; got True"),
    "params that are no arrays": (
        lambda: parscan.forward(LAYER, {"w": PARAMS["w"], "name": "abc"}, X),
        TypeError,
        r"`params` must hold arrays alone; got params\['name'\]: 'abc'. Let the layer close over",
    ),
    "a length that is no integer": (
        lambda: parscan.forward(lambda p, h: h, PARAMS, X, length=3.0),
        ValueError,
        r"`length` must be an integer of at least 0; got 3.0",
    ),
    "a negative length": (lambda: parscan.chain(LAYER, params_axes=None, length=-1)(PARAMS, X), ValueError, r"`length` must be .* at least 0; got -1"),
    "forward through no layer": (lambda: parscan.forward(3, PARAMS, X), TypeError, r"`layer` must be a callable .*; got 3"),
    "a Jacobian of lists": (
        lambda: parscan.linear_scan(parscan.Diagonal([[1.0] * 3] * 4), jnp.ones((4, 3)), X),
        TypeError,
        r"`A`, `b`, `h0` must be arrays .* Use jnp.asarray",
    ),
    "blocks by nothing": (lambda: parscan.Blocks(), ValueError, r"exactly one of `axis` and `size`"),
    "blocks of nothing": (lambda: parscan.Blocks(size=0), ValueError, r"must be an integer of at least 1; got 0"),
    "a chunk below 1": (lambda: parscan.Chunked(size=0), ValueError, r"`Chunked\(size=...\)` must be an integer of at least 1.*got 0"),
    "levels below 0": (lambda: parscan.Chunked(levels=-1), ValueError, r"`Chunked\(levels=...\)` must be an integer of at least 0"),
    "a segment below 1": (lambda: parscan.Walk(segment=0), ValueError, r"`Walk\(segment=...\)` must be an integer of at least 1.*got 0"),
    "a bare array as A": (lambda: parscan.linear_scan(jnp.ones((5, 3, 3)), jnp.ones((5, 3)), X), TypeError, r"`A` must be parscan.Dense.*Wrap the array"),
    "shapes of linear_scan": (
        lambda: parscan.linear_scan(parscan.Dense(jnp.ones((5, 3, 3))), jnp.ones((4, 3)), X),
        ValueError,
        r"got \(5, 3, 3\), \(4, 3\), \(3,\)",
    ),
    "matrices that are not square": (lambda: parscan.linear_scan(parscan.Dense(jnp.ones((5, 2, 3))), jnp.ones((5, 3)), X), ValueError, r"must have the shapes"),
    "integers for linear_scan": (
        lambda: parscan.linear_scan(parscan.Diagonal(jnp.ones((5, 3), int)), jnp.ones((5, 3)), X),
        TypeError,
        r"`A` must be real floating-point; got int64\[5,3\]",
    ),
    "complex numbers for linear_scan": (
        lambda: parscan.linear_scan(parscan.Diagonal(jnp.ones((5, 3)) + 0j), jnp.ones((5, 3)), X),
        TypeError,
        r"real and imaginary parts",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    call, kind, text = CASES[name]
    with pytest.raises(kind, match=text):
        call()


AS_LAX_SAYS = {
    "xs of different lengths": lambda scan: scan(lambda h, x: (h, None), X, (jnp.ones(3), jnp.ones(4))),
    "length that disagrees with xs": lambda scan: scan(lambda h, x: (h, None), X, jnp.ones(3), length=4),
    "neither xs nor length": lambda scan: scan(lambda h, x: (h, None), X),
    "scalar xs": lambda scan: scan(lambda h, x: (h, None), X, 1.0),
    "a carry that changes its shape": lambda scan: scan(lambda h, x: ({"a": h["a"], "b": h["b"][None]}, None), {"a": X, "b": X}, jnp.ones(3)),
    "a carry that changes its dtype": lambda scan: scan(lambda h, x: (h.astype(jnp.float32), None), X, jnp.ones(3)),
    "a carry that changes its structure": lambda scan: scan(lambda h, x: ((h, h), None), X, jnp.ones(3)),
    "an f that returns no pair": lambda scan: scan(lambda h, x: h, X, jnp.ones(3)),
    "a length that is traced": lambda scan: jax.jit(lambda n: scan(lambda h, _: (h, None), X, None, length=n))(3),
    "an f that is no function": lambda scan: scan(3, X, jnp.ones(3)),
}


@pytest.mark.parametrize("method", ["auto", "tree"])
@pytest.mark.parametrize("name", AS_LAX_SAYS)
def test_scan_says_what_lax_scan_says(name, method):
    with pytest.raises(Exception) as theirs:
        AS_LAX_SAYS[name](lax.scan)
    with pytest.raises(type(theirs.value)) as ours:
        AS_LAX_SAYS[name](lambda *a, **k: parscan.scan(*a, **k, method=method))
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "call",
    [lambda f: parscan.scan(f, X, jnp.ones(3)), lambda f: parscan.forward(f, PARAMS, X), lambda f: parscan.chain(f)(PARAMS, X), lambda f: backward(layer=f)],
)
def test_an_error_in_the_users_function_is_shown_as_it_is(call):
    def f(*_):
        raise RuntimeError("my own trouble")

    with pytest.raises(RuntimeError, match="my own trouble"):
        call(f)


def test_nothing_runs_before_the_check():
    def layer(p, h):
        jax.debug.callback(lambda: ran.append(1))
        return h[:2]

    ran = []
    with pytest.raises(TypeError):
        parscan.forward(layer, PARAMS, X)
    assert not ran
