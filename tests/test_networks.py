"""Chains of different layers: gradients of every method against the plain loop, what is batched, what the plan says."""

from __future__ import annotations

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import NETWORKS, Network, arrays, block, dense, layer
from support import METHODS, TOLERANCE, a_machine_that_walks, assert_close, equations, gap

import parscan
from parscan import planning

is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)


@functools.cache
def made(name, dtype):
    return NETWORKS[name](dtype)


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]


def run_loop(network, params, x, nudges):
    """h_0 … h_L of a plain Python loop, each floating-point leaf nudged: the derivative in a nudge is the accumulated gradient."""

    def nudged(h, nudge):
        return jax.tree.map(lambda leaf, some: leaf + some if is_float(leaf) else leaf, h, nudge)

    states = [nudged(x, nudges[0])]
    for f, p, nudge in zip(network.layers, params, nudges[1:], strict=True):
        states.append(nudged(f(p, states[-1]), nudge))
    return states


@functools.cache
def cotangents(name, dtype):
    """(at the end, at inner layers): random, for the floating-point leaves."""
    network, random = made(name, dtype), np.random.default_rng(1)
    states = plain(name, dtype)
    like = lambda h: jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype) if is_float(leaf) else leaf, h)
    last = len(network.layers)
    inner = {i: like(states[i]) for i in range(0, last + 1, 2)}
    return like(states[-1]), inner


@functools.cache
def plain(name, dtype):
    network = made(name, dtype)
    h = [network.x]
    for f, p in zip(network.layers, network.params, strict=True):
        h.append(f(p, h[-1]))
    return h


def product(a, b):
    return sum(jnp.sum(x * y) for x, y in zip(floats(a), floats(b), strict=True))


def with_floats(tree, values):
    rest = iter(values)
    return jax.tree.map(lambda leaf: next(rest) if is_float(leaf) else leaf, tree)


@functools.cache
def wanted(name, dtype):
    """Gradients in the floating-point leaves of params (by place) and of every activation, by `jax.grad` of the loop. In double precision for the
    longest chain: compiling a loop of hundreds of layers takes half a minute, and running it as it stands not much less."""
    if len(made(name, dtype).layers) > 20 and dtype != "float64":
        return wanted(name, "float64")
    network, (end, inner) = made(name, dtype), cotangents(name, dtype)

    def loss(some, nudges):
        states = run_loop(network, with_floats(network.params, some), network.x, nudges)
        return product(states[-1], end) + sum(product(states[i], c) for i, c in inner.items())

    zero = [jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if is_float(leaf) else leaf, h) for h in plain(name, dtype)]
    gradient = jax.grad(loss, (0, 1), allow_int=True)
    some, nudges = (jax.jit(gradient) if len(network.layers) < 20 else gradient)(floats(network.params), zero)
    return some, [floats(n) for n in nudges]


def summed_where_shared(name, network, found):
    """`jax.grad` of a list treats entries that are one object as many."""
    if name != "shared_weights":
        return found
    total = [a + b + c for a, b, c in zip(found[:2], found[3:5], found[5:7], strict=True)]
    return [*total, found[2], *total, *total]


@functools.cache
def stored(name, dtype):
    network = made(name, dtype)
    return parscan.forward(network.layers, network.params, network.x)[1]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", NETWORKS)
def test_forward(name, dtype):
    network, activations = made(name, dtype), stored(name, dtype)
    assert_close(floats(activations), floats(plain(name, dtype)), TOLERANCE[dtype] * 1e-1)
    assert jax.tree.structure(activations) == jax.tree.structure(plain(name, dtype))
    assert [leaf.dtype for leaf in jax.tree.leaves(activations)] == [leaf.dtype for leaf in jax.tree.leaves(plain(name, dtype))]
    assert_close(floats(parscan.chain(network.layers)(network.params, network.x)), floats(plain(name, dtype)[-1]), TOLERANCE[dtype] * 1e-1)


CASES = [(name, method) for name in NETWORKS for method in (*METHODS, "auto")]


# In the precision that tells most; in the other what `auto` takes, and products of maps.
@pytest.mark.parametrize("name, method, dtype", [(*case, d) for case in CASES for d in TOLERANCE if case[1] in ("auto", "tree") or d == "float64"])
def test_parallel_backward(name, method, dtype):
    network, (end, inner), activations = made(name, dtype), cotangents(name, dtype), stored(name, dtype)
    grads = parscan.parallel_backward(network.layers, network.params, activations, end, layer_cotangents=inner, method=METHODS.get(method, method))
    params, states = wanted(name, dtype)
    assert_close(floats(grads.params), summed_where_shared(name, network, params), TOLERANCE[dtype])
    assert [gap(floats(g), s) for g, s in zip(grads.activations, states, strict=True)] <= [TOLERANCE[dtype]] * len(states)
    assert jax.tree.structure(grads.params) == jax.tree.structure(network.params)
    for got, like in zip(jax.tree.leaves((grads.params, grads.activations)), jax.tree.leaves((network.params, activations)), strict=True):
        assert got.shape == like.shape and got.dtype == (like.dtype if is_float(like) else jax.dtypes.float0)
    assert_close(floats(grads.input), states[0], TOLERANCE[dtype])


@pytest.mark.parametrize("method", ["auto", "tree", "lax"])
@pytest.mark.parametrize("name", NETWORKS)
def test_grad_of_chain(name, method):
    """Deep supervision under `jax.grad`, which treats places apart."""
    network, (end, inner) = made(name, "float64"), cotangents(name, "float64")
    apply = parscan.chain(network.layers, return_activations=True, method=method)

    def loss(some, x):
        y, states = apply(with_floats(network.params, some), with_floats(network.x, x))
        assert jax.tree.structure(y) == jax.tree.structure(states[-1])
        return product(y, end) + sum(product(states[i], c) for i, c in inner.items())

    params, states = wanted(name, "float64")
    assert_close(jax.jit(jax.grad(loss, (0, 1)))(floats(network.params), floats(network.x)), (params, states[0]), 1e-10)


TRANSFORMED = {
    "value_and_grad": lambda f: jax.value_and_grad(f, (0, 1)),
    "jvp": lambda f: lambda w, x: jax.jvp(f, (w, x), (w, x)),
    "jacfwd": lambda f: jax.jacfwd(f),
    "hessian": lambda f: jax.hessian(f, 1),
    "jvp of grad": lambda f: lambda w, x: jax.jvp(jax.grad(f, (0, 1)), (w, x), (x.T @ x @ w, x)),
    "grad of jvp": lambda f: jax.grad(lambda w, x: jax.jvp(f, (w, x), (w, x))[1], (0, 1)),
    "vmap of grad": lambda f: lambda w, x: jax.vmap(jax.grad(f, (0, 1)), (None, 0))(w, jnp.stack([x, 2 * x])),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f), (0, 1)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_every_transformation_of_a_chain(name):
    network = made("autoencoder", "float64")

    def by(method):
        apply = parscan.chain(network.layers, method=method)
        loss = lambda w, x: jnp.sum(apply([{**network.params[0], "w": w}, *network.params[1:]], x) ** 3)
        return jax.jit(TRANSFORMED[name](loss))(network.params[0]["w"], network.x)

    want = by("lax")
    for method in ("auto", "tree"):
        assert_close(by(method), want, 1e-10)


@pytest.mark.parametrize("method", ["auto", "tree", "sequential"])
def test_the_backward_pass_itself_under_jit_vmap_and_grad(method):
    network = made("mlp", "float64")
    y, activations = parscan.forward(network.layers, network.params, network.x)

    def norm(params, activations, c):
        grads = parscan.parallel_backward(network.layers, params, activations, c, method=method)
        return sum(jnp.sum(g**2) for g in jax.tree.leaves((grads.params, grads.activations)))

    def by_grad(params, activations, c):
        """The same, every layer's own VJP in a plain loop."""
        total, g = jnp.sum(c**2), c
        for f, p, h in reversed(list(zip(network.layers, params, activations[:-1], strict=True))):
            to_p, g = jax.vjp(f, p, h)[1](g)
            total += sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves((to_p, g)))
        return total

    arguments = (network.params, activations, y)
    assert_close(jax.jit(jax.grad(norm, (0, 1, 2)))(*arguments), jax.jit(jax.grad(by_grad, (0, 1, 2)))(*arguments), 1e-10)
    several = (network.params, activations, jnp.stack([y, 2 * y]))
    assert_close(*(jax.jit(jax.vmap(f, (None, None, 0)))(*several) for f in (norm, by_grad)), 1e-10)


# --- what is batched -----------------------------------------------------------------------------------------------------------


def between_two_others(count, dtype="float32"):
    make = arrays(dtype)
    return Network([dense, *[block] * count, dense], [layer(make, 6, 4), *(make(4, 4, scale=0.2) for _ in range(count)), layer(make, 4, 3)], make(2, 6))


def programs(network, method):
    apply = parscan.chain(network.layers, method=method)
    gradient = jax.grad(lambda p, x: jnp.sum(apply(p, x) ** 2))
    yield jax.make_jaxpr(gradient)(network.params, network.x)
    y, activations = parscan.forward(network.layers, network.params, network.x)
    backward = lambda p, a, c: parscan.parallel_backward(network.layers, p, a, c, method=method)
    yield jax.make_jaxpr(backward)(network.params, activations, y)


@pytest.mark.parametrize("method", ["auto", "lax", "walk", "chunked", "tree"])
def test_the_program_of_500_equal_blocks_is_hardly_larger_than_that_of_50(method):
    sizes = [[sum(1 for _ in equations(p)) for p in programs(between_two_others(count), method)] for count in (50, 500)]
    assert all(large <= 3 * small for small, large in zip(*sizes, strict=True)), sizes


def test_equal_neighbours_are_traced_once_and_batched():
    calls = []

    def counted(w, h):
        calls.append(1)
        return jnp.tanh(h @ w)

    make = arrays("float64")
    layers, params = [counted] * 40 + [dense] + [counted] * 3, [make(4, 4)] * 0 + [make(4, 4) for _ in range(40)] + [layer(make, 4, 6)] + [make(6, 6)] * 3
    plan = parscan.plan(layers, params, [make(2, 4)])
    assert plan.runs == (40, 1, 3) and len(calls) == 2
    assert "44 layers in 3 runs, 40 equal neighbours, 3 equal neighbours batched" in plan.reason


def test_functions_of_equal_equations_are_batched_and_others_are_not():
    make = arrays("float64")
    alike = [lambda w, h: jnp.tanh(h @ w) for _ in range(5)]
    closing_over = lambda v: lambda w, h: jnp.tanh(h @ w + v)
    close_over = [closing_over(make(4)) for _ in range(3)]  # each its own array
    assert parscan.plan(alike + close_over, [make(4, 4) for _ in range(8)], [make(2, 4)]).runs == (5, 1, 1, 1)


def test_a_run_that_shares_its_weights_does_not_stack_them():
    make = arrays("float64")
    w = make(4, 4)
    layers, params = [block] * 30, [w] * 30
    y, activations = parscan.forward(layers, params, make(2, 4))
    program = jax.make_jaxpr(lambda w, a, y: parscan.parallel_backward(layers, [w] * 30, a, y, method="tree").params[0])(w, activations, y)
    assert not any(v.aval.shape == (30, 4, 4) and eqn.primitive.name == "stack" for eqn in equations(program) for v in eqn.outvars)
    got = parscan.parallel_backward(layers, params, activations, y, method="tree").params
    assert all(g is got[0] for g in got)
    wanted = jax.grad(lambda w: jnp.sum(parscan.chain(layers, method="lax")([w] * 30, activations[0]) * y))(w)
    assert_close(got[0], wanted, 1e-10)


@pytest.mark.parametrize("method", ["auto", "tree", "lax"])
def test_entries_are_shared_as_objects_whatever_stands_next_to_them(method):
    make = arrays("float64")
    w, x = make(3, 3), make(2, 3)
    f = lambda p, h: jnp.tanh(h @ p["w"])
    first, second, third = {"w": w}, {"w": w}, {"w": make(3, 3)}  # two entries that hold one array are two
    for params in ([first, first, second, second], [first, second, second, first], [third, first, first, third, third, second]):
        layers = [f] * len(params)
        y, activations = parscan.forward(layers, params, x)
        places = jax.grad(lambda ps, layers=layers: jnp.sum(parscan.chain(layers, method="lax")(ps, x) ** 2))([dict(p) for p in params])
        wanted = [sum(g["w"] for g, p in zip(places, params, strict=True) if p is entry) for entry in params]
        got = parscan.parallel_backward(layers, params, activations, 2 * y, method=method).params
        assert_close([g["w"] for g in got], wanted, 1e-12)


@pytest.mark.parametrize("method", ["auto", "tree", "lax"])
def test_a_layer_that_closes_over_what_its_neighbours_are_given(method):
    make = arrays("float64")
    w, x = make(4, 4), make(2, 4)
    given, closing = (lambda p, h: jnp.tanh(h @ p)), (lambda _, h: jnp.tanh(h @ w))
    for layers, params in (([closing, given, given], [None, w, w]), ([given, given, closing], [w, w, None])):
        y, activations = parscan.forward(layers, params, x)
        grads = parscan.parallel_backward(layers, params, activations, y, method=method)
        assert [p is None for p in grads.params] == [p is None for p in params]
        wanted = jax.grad(lambda x, layers=layers, params=params: 0.5 * jnp.sum(parscan.chain(layers, method="lax")(params, x) ** 2))(x)
        assert_close(grads.input, wanted, 1e-12)


def test_params_may_be_any_sequence():
    make, wrap = arrays("float64"), collections.UserList
    layers, params = [dense, dense], [layer(make, 3, 4), layer(make, 4, 2)]
    y, activations = parscan.forward(layers, wrap(params), make(2, 3))
    got = parscan.parallel_backward(layers, wrap(params), activations, y).params
    pair = collections.namedtuple("Pair", "first second")(*params)
    named = parscan.parallel_backward(layers, pair, activations, y).params
    assert isinstance(got, list) and type(named) is type(pair)
    assert_close(got, list(named), 0)


# --- structure and stretches ----------------------------------------------------------------------------------------------------


def test_the_batch_is_found_along_the_whole_chain():
    for name, blocks in {"mlp": {12: 3}, "convolution": {24: 2}, "skip_over_three": {10: 3}, "dict_to_tuple_to_array": {7: 2}}.items():
        network = made(name, "float64")
        plan = parscan.plan(network.layers, network.params, [network.x], method="tree")
        assert (plan.kind, plan.blocks) == ("BlockDiagonal", blocks), (name, plan)


def test_a_layer_that_mixes_the_batch_makes_the_chain_dense():
    make = arrays("float64")
    norm = lambda _, h: h - h.mean(0)
    plan = parscan.plan([dense, norm, dense], [layer(make, 4, 3), None, layer(make, 3, 2)], [make(5, 4)], method="walk")
    assert plan.blocks == {20: 1}


def test_claims_along_the_chain():
    network = made("mlp", "float64")
    plan = lambda claim: parscan.plan(network.layers, network.params, [network.x], method="tree", structure=claim)
    assert plan("dense").blocks == {36: 1}
    assert plan(parscan.Blocks(axis=0)).blocks == {12: 3}
    with pytest.raises(ValueError, match=r"needs as many coordinates before as after every layer; got 36, 27, 21, 15, 9, 6"):
        plan("diagonal")


@jax.custom_vjp
def clipped(h):
    return h


clipped.defvjp(lambda h: (h, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@pytest.mark.parametrize("entry", ["chain", "parallel_backward"])
def test_an_obstacle_is_crossed_alone(entry, monkeypatch):
    monkeypatch.setattr(planning, "machine", lambda _: a_machine_that_walks())
    make = arrays("float64")
    layers = [*[dense] * 9, lambda _, h: clipped(h), *[dense] * 9]
    params = [*(layer(make, 4, 4) for _ in range(9)), None, *(layer(make, 4, 4) for _ in range(9))]
    x = make(3, 4)
    y, activations = parscan.forward(layers, params, x)
    wanted = jax.grad(lambda p: jnp.sum(parscan.chain(layers, method="lax")(p, x) ** 2))(params)
    plan = parscan.plan(layers, params, activations)
    assert [type(p.method) for p in plan.stretches] == [parscan.Walk, parscan.Sequential, parscan.Walk]
    assert "custom VJP" in plan.reason and plan.length == 19
    if entry == "chain":
        got = jax.grad(lambda p: jnp.sum(parscan.chain(layers)(p, x) ** 2))(params)
    else:
        got = parscan.parallel_backward(layers, params, activations, 2 * y).params
    assert_close(floats(got), floats(wanted), 1e-10)
    with pytest.raises(ValueError, match=r"custom VJP"):
        parscan.parallel_backward(layers, params, activations, y, method="tree")


@pytest.mark.parametrize("before, after, rank", [(9, 8, 2), (11, 11, 1)])
def test_bottlenecks_of_several_ranks_are_carried_along(before, after, rank):
    """A run of odd length: a layer's map goes on beside products of two, whose rank is twice its own."""
    make = arrays("float64")
    residual, head = lambda w, h: h + jnp.tanh(h @ w[0]) @ w[1], lambda w, h: h @ w
    pair = lambda n: (make(n, rank, scale=0.2), make(rank, n, scale=0.2))
    params = [*(pair(32) for _ in range(before)), make(32, 24, scale=0.2), *(pair(24) for _ in range(after))]
    layers, x = [residual] * before + [head] + [residual] * after, make(3, 32)
    y, activations = parscan.forward(layers, params, x)
    want = parscan.parallel_backward(layers, params, activations, y, method="lax")
    assert_close(parscan.parallel_backward(layers, params, activations, y, method="tree"), want, 1e-10)


@pytest.mark.parametrize("order", [[3, 0, 1, 2], [1, 0]])
@pytest.mark.parametrize("method", ["tree", "associative"])
def test_permutations_of_several_powers_are_carried_along(order, method):
    """Their full matrices have no axis of layers, in which as many as there are coordinates would be seen."""
    make, n = arrays("float64"), len(order)
    moved, scaled = lambda _, h: h[:, np.array(order)], lambda w, h: h * w
    layers = [moved] * 9 + [scaled] * 11 + [moved] * n
    params = [None] * 9 + [make(n) for _ in range(11)] + [None] * n
    y, activations = parscan.forward(layers, params, make(3, n))
    want = parscan.parallel_backward(layers, params, activations, y, method="lax")
    got = parscan.parallel_backward(layers, params, activations, y, method=method)
    assert_close((got.activations, got.params[9:20]), (want.activations, want.params[9:20]), 1e-10)


def on(platform, network, **options):
    from parscan.methods import Sequential
    from parscan.network import read_sequence
    from parscan.planning import plan_chain

    read = read_sequence(network.layers, network.params, [network.x])
    return plan_chain(read.steps, None, None, fallback=Sequential(), platform=platform, **options)[0]


def test_wide_layers_are_crossed_by_a_product_with_the_vector():
    """On an accelerator: the narrow stretches beside 784 × 512 are parallel; a plain wide MLP stays sequential."""
    make = arrays("float32")
    widen, narrow = lambda p, h: jnp.tanh(h @ p), lambda p, h: jnp.tanh(h @ p)
    layers = [*[block] * 100, widen, narrow, narrow, *[block] * 100]
    params = [*[make(16, 16)] * 0, *(make(16, 16) for _ in range(100)), make(16, 784), make(784, 512), make(512, 8), *(make(8, 8) for _ in range(100))]
    plan = on("gpu", Network(layers, params, make(4, 16)))
    assert [type(p.method) for p in plan.stretches] == [parscan.Chunked, parscan.Sequential, parscan.Chunked]
    assert [p.runs for p in plan.stretches] == [(100, 1), (1,), (1, 100)]
    wide = [784, 512, 256, 128, 10]
    plain_mlp = Network([dense] * 4, [layer(make, a, b) for a, b in itertools.pairwise(wide)], make(8, 784))
    for platform in ("cpu", "gpu"):
        assert isinstance(on(platform, plain_mlp).method, parscan.Sequential)


def test_stretches_by_several_methods_agree_with_one():
    """The accelerator's choice, run here."""
    from parscan import backward
    from parscan.methods import Sequential
    from parscan.planning import plan_chain

    make = arrays("float64")
    layers = [*[block] * 70, dense, block]
    params = [*(make(6, 6, scale=0.3) for _ in range(70)), layer(make, 6, 400), make(400, 400, scale=0.05)]
    x = make(2, 6)
    y, activations = parscan.forward(layers, params, x)
    network, states, cotangents = backward._of_sequence(layers, params, activations, y, {3: activations[3]})
    plan, stretches = plan_chain(network.steps, None, None, fallback=Sequential(), platform="gpu")
    assert len(stretches) == 2
    got = backward._gradients(network, states, cotangents, plan, stretches, None)
    want = parscan.parallel_backward(layers, params, activations, y, layer_cotangents={3: activations[3]}, method="lax")
    assert_close(got, want, 1e-10)
