"""What a pass really does, counted in the program that runs and never timed: vectors pushed through steps, and what the maps of a tree are, level by level."""

from __future__ import annotations

import functools
import itertools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from support import TOLERANCE, assert_close, is_fallback, sub_jaxprs

import parscan
from parscan import affine, costs, system

L = 4
RANDOM = np.random.default_rng(0)


# --- vectors pushed through steps ------------------------------------------------------------------------------------------


@jax.custom_jvp
def marked(h):
    """As it is; but every tangent and every cotangent that passes is multiplied by ones that depend on the step, and then copied."""
    return h


marked.defjvp(lambda primals, tangents: (primals[0], jnp.copy(tangents[0] * (1 + 0 * primals[0]))))


def running(jaxpr):
    """(equation, how often it runs), those of sub-jaxprs included; of a linear solve the solution alone, not the equations that it solves; no fallback."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if is_fallback(eqn):
            continue
        yield eqn, 1
        solved = eqn.primitive.name == "custom_linear_solve"
        for inner in sub_jaxprs({"solve": eqn.params["jaxprs"].solve} if solved else eqn.params):
            yield from ((one, times * eqn.params.get("length", 1)) for one, times in running(inner))


def vectors(f, *arguments):
    """How many numbers pass `marked` in the derivatives that f takes."""
    copies = [(eqn, times) for eqn, times in running(jax.make_jaxpr(f)(*arguments)) if eqn.primitive.name in ("copy", "copy_p")]
    return sum(times * math.prod(v.aval.shape) for eqn, times in copies for v in eqn.outvars)


def normal(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape) / 3)


def lstm(weights):
    def step(state, x):
        c, h = map(marked, state)
        i, f, o, g = (h * w + x for w in weights)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return c, jax.nn.sigmoid(o) * jnp.tanh(c)

    return step


def through(linear):
    """A step of one leaf."""
    return lambda h, x: jnp.tanh(linear(marked(h)) + x)


def pairs(w):
    return through(lambda h: (h.reshape(-1, 2) @ w).ravel())


def band(below, above):
    """Every entry from as many before it, and as many behind it."""
    kernel = normal(below + above + 1, 1, 1)
    convolved = lambda h: lax.conv_general_dilated(h, kernel, (1,), [(below, above)], dimension_numbers=("NWC", "WIO", "NWC"))
    return through(lambda h: convolved(h[None, :, None])[0, :, 0])


def stencil(channels):
    """On images with channels, or batches of them."""
    kernel = normal(3, 3, channels, channels)
    return through(lambda h: lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))


W = normal(5, 5)
STEPS = {  # name: (step, state, shape of x, basis vectors that a step takes, kind)
    "elementwise LSTM": (lstm(normal(4, 64)), (normal(64), normal(64)), (64,), 2, "BlockDiagonal"),
    "interleaved pairs": (pairs(normal(2, 2)), normal(24), (24,), 2, "BlockDiagonal"),
    "batched RNN": (through(lambda h: h @ W), normal(6, 5), (6, 5), 5, "BlockDiagonal"),
    "elementwise": (through(lambda h: 0.9 * h), normal(6, 5), (6, 5), 1, "Diagonal"),
    "stencil": (stencil(1), normal(1, 8, 9, 1), (1, 8, 9, 1), 9, "Sparse"),
    "batched stencil": (stencil(1), normal(2, 8, 8, 1), (2, 8, 8, 1), 9, "Sparse"),
    "two channels": (stencil(2), normal(1, 7, 7, 2), (1, 7, 7, 2), 18, "Sparse"),
    **{f"band {b}, {b}": (band(b, b), normal(24), (24,), 2 * b + 1, "Banded") for b in (1, 3)},
    **{f"band {b}, 0": (band(b, 0), normal(24), (24,), b + 1, "Banded") for b in (1, 3)},
    **{f"band 0, {b}": (band(0, b), normal(24), (24,), b + 1, "Banded") for b in (1, 3)},
}


def passes(step, method, structure="auto"):
    """A reverse pass and a forward pass through a scan, and the engine's: functions of (state, xs). Without the guard, which pushes a vector or two more through some steps."""
    method = {"tree": parscan.Tree(guard=False), "walk": parscan.Walk(guard=False)}.get(method, method) if isinstance(method, str) else method
    options = {"method": method, "structure": structure}
    scanned = lambda state, xs: parscan.scan(lambda h, x: (step(h, x), None), state, xs, **options)[0]
    loss = lambda state, xs: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(scanned(state, xs)))
    layer = lambda x, h: step(h, x)

    def engine(state, xs):
        activations = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (L + 1, *leaf.shape)), state)
        return parscan.parallel_backward(layer, xs, activations, state, **options)

    return {"reverse": jax.jit(jax.grad(loss, (0, 1))), "forward": lambda *at: jax.jvp(scanned, at, at), "engine": engine}


def pushed(step, state, xs, method, structure="auto"):
    """How many vectors each pass pushes through a step."""
    size = len(xs) * sum(leaf.size for leaf in jax.tree.leaves(state))
    return {name: vectors(f, state, xs) / size for name, f in passes(step, method, structure).items()}


@pytest.mark.parametrize("name", STEPS)
def test_so_many_vectors_are_pushed_and_no_more(name):
    """Nor could fewer tell the entries of a row, or of a column, apart."""
    step, state, x, count, kind = STEPS[name]
    xs, (flat, unravel) = normal(L, *x), ravel_pytree(state)
    plan = parscan.plan(lambda h, x: (step(h, x), None), state, xs, method="tree")
    assert plan.kind == kind and plan._given.structures[0].along.pushes == plan._given.structures[0].against.pushes == count
    everywhere = dict.fromkeys(("reverse", "forward", "engine"), count)
    assert pushed(step, state, xs, "tree") == everywhere
    assert vectors(passes(step, parscan.Walk(2, guard=False))["reverse"], state, xs) == count * flat.size * L  # in two segments
    entries = np.asarray(jax.jacobian(lambda flat: ravel_pytree(step(unravel(flat), xs[0]))[0])(flat)) != 0
    assert entries.sum(0).max() == entries.sum(1).max() == count


@pytest.mark.parametrize(
    "name, method, structure, count",
    [
        ("elementwise LSTM", "tree", "dense", 128),
        ("batched RNN", "walk", parscan.Blocks(axis=0), 5),
        ("band 1, 0", "walk", "dense", 24),
        ("band 1, 0", "tree", parscan.Band(2), 5),
        ("stencil", "tree", "dense", 72),
        ("stencil", "walk", "diagonal", 1),
        ("stencil", "sequential", "auto", 1),
    ],
)
def test_the_counter_sees_what_a_claim_asks_for(name, method, structure, count):
    """A whole basis, where it is pushed; one vector, where none is formed."""
    step, state, x, _, _ = STEPS[name]
    assert set(pushed(step, state, normal(L, *x), method, structure).values()) == {count}


def test_nothing_is_counted_where_nothing_is_marked():
    assert set(pushed(lambda h, x: jnp.tanh(h * x), normal(6), normal(L, 6), "tree").values()) == {0}


@pytest.mark.parametrize("name", ["elementwise LSTM", "interleaved pairs", "batched RNN", "elementwise"])
def test_as_many_are_pushed_by_rows_as_by_columns(name, monkeypatch):
    """Jacobians are formed along the chain or against it, whichever is cheaper: here whichever is thought of last."""
    step, state, x, count, _ = STEPS[name]
    ways, free = itertools.count(), []
    monkeypatch.setattr(system, "flops", lambda jaxpr: -next(ways))
    monkeypatch.setattr(system, "masks_nothing", lambda jaxpr, masks_nothing=system.masks_nothing: free.append(masks_nothing(jaxpr)) or free[-1])
    assert set(pushed(step, state, normal(L, *x), "tree").values()) == {count}
    assert free and all(free) and next(ways) == 2 * len(free)


@pytest.mark.parametrize("method", [parscan.Walk(7, guard=False), parscan.Tree(guard=False)], ids=str)
def test_layers_that_differ_are_each_pushed_what_they_need(method):
    """Bands of 1 and then of 2."""
    first, second, state = band(1, 1), band(2, 2), normal(24)
    layers, params = [lambda x, h: first(h, x)] * 4 + [lambda x, h: second(h, x)] * 3, list(normal(7, 24))
    engine = lambda state, params: parscan.parallel_backward(layers, params, [state] * 8, state, method=method)
    assert vectors(engine, state, params) == 24 * (4 * 3 + 3 * 5)


# --- the maps of a tree, level by level ---------------------------------------------------------------------------------------

DEPTH, LAST = 64, 5
PAIRS = [31, 15, 7, 3, 1]  # the journey's last map meets a vector only; of the 63 others so many pairs are joined, and of what they make


def line(before, behind):
    """A residual convolution along a line: every point hangs on so many before it, and on so many behind it."""

    def layer(w, h):
        out = lax.conv_general_dilated(h[None, :, None], w, (1,), [(before, behind)], dimension_numbers=("NWC", "WIO", "NWC"))
        return h + 0.1 * jnp.tanh(out[0, :, 0])

    return layer, (before + behind + 1, 1, 1)


def image(w, h):
    """A residual convolution of 3 × 3 points, of a batch."""
    out = lax.conv_general_dilated(h[..., None], w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return h + 0.1 * jnp.tanh(out[..., 0])


def bottleneck(w, h):
    return h + 0.1 * jnp.tanh(h @ w[0]) @ w[1]


CHAINS = {  # name: (layer, shape of its parameters, of the state, dtype, places that a point hangs on along every axis: so many before it and behind it)
    "3 of 100 points": (*line(1, 1), (100,), "float32", (1, 1)),
    "3 of 65 points": (*line(1, 1), (65,), "float64", (1, 1)),
    "3 of 66 points": (*line(1, 1), (66,), "float32", (1, 1)),
    "5 of 100 points": (*line(2, 2), (100,), "float32", (2, 2)),
    "3 before of 50 points": (*line(3, 0), (50,), "float32", (3, 0)),
    "10 × 10 image": (image, (3, 3, 1, 1), (1, 10, 10), "float32", (1, 1)),
    "10 × 10 image, double": (image, (3, 3, 1, 1), (1, 10, 10), "float64", (1, 1)),
    "three 7 × 12 images": (image, (3, 3, 1, 1), (3, 7, 12), "float32", (1, 1)),
    "4 of 64": (bottleneck, ((64, 4), (4, 64)), (64,), "float32", None),
    "4 of 64, double": (bottleneck, ((64, 4), (4, 64)), (64,), "float64", None),
}
FULL = {name: math.prod(state) ** 2 // (state[0] if len(state) > 1 else 1) * np.dtype(dtype).itemsize for name, (_, _, state, dtype, _) in CHAINS.items()}
LEVELS = """
3 of 100 points        | Banded 1200   Banded 2000    Banded 3600    Banded 6800    Banded 13200   Banded 26000
3 of 65 points         | Banded 1560   Banded 2600    Banded 4680    Banded 8840    Banded 17160   Dense 33800
3 of 66 points         | Banded 792    Banded 1320    Banded 2376    Banded 4488    Banded 8712    Banded 17160
5 of 100 points        | Banded 2000   Banded 3600    Banded 6800    Banded 13200   Banded 26000   Dense 40000
3 before of 50 points  | Banded 800    Banded 1400    Banded 2600    Banded 5000    Banded 9800    Dense 10000
10 × 10 image          | Sparse 6272   Sparse 15488   Sparse 39200   Dense 40000    Dense 40000    Dense 40000
10 × 10 image, double  | Sparse 9408   Sparse 23232   Sparse 58800   Dense 80000    Dense 80000    Dense 80000
three 7 × 12 images    | Sparse 15504  Sparse 37584   BlockDiagonal 84672  BlockDiagonal 84672  BlockDiagonal 84672  BlockDiagonal 84672
4 of 64                | LowRank 2304  LowRank 4352   LowRank 8448   Dense 16384    Dense 16384    Dense 16384
4 of 64, double        | LowRank 4608  LowRank 8704   LowRank 16896  Dense 32768    Dense 32768    Dense 32768
"""


def bytes_of_power(name, kind, level):
    """What a product of 2^level maps of a chain takes as this kind: by the places where that power of a matrix is not zero, by the sum of the ranks."""
    _, shapes, state, dtype, reach = CHAINS[name]
    item = np.dtype(dtype).itemsize
    if kind == "LowRank":
        ((n, rank), _) = shapes
        return (2 * n * 2**level * rank + n) * item
    batch, *axes = state if len(state) > 1 else (1, *state)
    near = functools.reduce(np.kron, [np.tri(n, n, reach[1]) - np.tri(n, n, -reach[0] - 1) for n in axes])
    rows, columns = np.linalg.matrix_power(near, 2**level).nonzero()
    if kind == "Banded":
        return batch * (np.ptp(rows - columns) + 1) * len(near) * item
    return batch * len(rows) * (item + 4)  # an index of 4 bytes beside each entry


def said(name):
    """A line of the table, as `levels` returns it."""
    row = next(line.split("|")[1].split() for line in LEVELS.strip().splitlines() if line.split("|")[0].strip() == name)
    return list(zip(range(LAST + 1), row[::2], map(int, row[1::2]), strict=True))


@pytest.mark.parametrize("name", CHAINS)
def test_maps_are_full_matrices_from_the_level_on_where_the_bytes_cross(name):
    """What the table says is what follows from the patterns, and what a plan says."""
    layer, params, x = drawn(name)
    kind, full = said(name)[0][1], "BlockDiagonal" if x.ndim > 1 and len(x) > 1 else "Dense"
    sizes = [bytes_of_power(name, kind, level) for level in range(LAST + 1)]
    assert said(name) == [(level, kind, size) if size < FULL[name] else (level, full, FULL[name]) for level, size in enumerate(sizes)]
    layers = [jax.tree.map(operator.itemgetter(i), params) for i in range(DEPTH)]
    assert parscan.plan([layer] * DEPTH, layers, [x], method="tree").levels() == said(name)


@pytest.mark.parametrize("name", ["3 of 65 points", "10 × 10 image", "three 7 × 12 images", "4 of 64"])
def test_maps_that_a_pass_joins_are_those_of_the_table(name, monkeypatch):
    """Against the chain, and along it, which is traced with it; the gradients are those of a loop."""
    (layer, params, x), joined, then = drawn(name), [], affine.then

    def noted(second, first):
        product = then(second, first)
        joined.append(tuple((len(maps.offset), *described(maps)) for maps in (second, first, product)))
        return product

    monkeypatch.setattr(affine, "then", noted)
    got, want = jax.jit(lambda params, x: (backward(layer, params, x), loop_backward(layer, params, x)))(params, x)
    one_way = [
        ((pairs, *below), (pairs, *below), (pairs, *above)) for pairs, ((_, *below), (_, *above)) in zip(PAIRS, itertools.pairwise(said(name)), strict=True)
    ]
    assert joined in (one_way, 2 * one_way)
    assert_close(got, want, TOLERANCE[x.dtype.name])


def drawn(name):
    """Layer, parameters of all layers, state."""
    layer, shapes, state, dtype, _ = CHAINS[name]
    draw = lambda shape: jnp.asarray(RANDOM.standard_normal(shape), dtype)
    return layer, jax.tree.map(lambda shape: draw((DEPTH, *shape)), shapes, is_leaf=lambda shape: isinstance(shape[0], int)), draw(state)


def described(maps):
    """Kind and bytes of one of these maps."""
    one = jax.eval_shape(lambda matrix: jax.tree.map(lambda leaf: leaf[0], matrix), maps.matrix)
    return costs.name_of(one), one.nbytes


def backward(layer, params, x):
    y, activations = parscan.forward(layer, params, x)
    grads = parscan.parallel_backward(layer, params, activations, y, method="tree")
    return grads.params, grads.input


def loop_backward(layer, params, x):
    return jax.grad(lambda params, x: jnp.sum(lax.scan(lambda h, w: (layer(w, h), None), x, params)[0] ** 2) / 2, (0, 1))(params, x)
