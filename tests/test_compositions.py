"""Every transformation of JAX over `scan`, `chain`, `forward`, `linear_scan` and `parallel_backward`, against the same over `lax.scan`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import assert_close, rnn_problem

import parscan

LOSS, (WEIGHTS, START, INPUTS) = rnn_problem(5, 3, 4)


# Each entry point as a scan: (f, init, xs) -> (final, ys), where f is one tanh RNN.
def by_scan(method):
    return functools.partial(parscan.scan, method=method)


def plain(weights, start, inputs):
    """Final state and all states of the RNN by `lax.scan`."""

    def f(h, x):
        h = jnp.tanh(h @ weights + x)
        return h, h

    return lax.scan(f, start, inputs)


def by_chain(method):
    def run(weights, start, inputs):
        apply = parscan.chain(lambda p, h: jnp.tanh(h @ p[0] + p[1]), params_axes=(None, 0), return_activations=True, method=method)
        y, activations = apply((weights, inputs), start)
        return y, activations[1:]

    return run


def by_forward(method):
    def run(weights, start, inputs):
        y, activations = parscan.forward(lambda p, h: jnp.tanh(h @ p[0] + p[1]), (weights, inputs), start, params_axes=(None, 0), method=method)
        return y, activations[1:]

    return run


def by_public_scan(method):
    def run(weights, start, inputs):
        def f(h, x):
            h = jnp.tanh(h @ weights + x)
            return h, h

        return parscan.scan(f, start, inputs, method=method)

    return run


def plain_linear(weights, start, inputs):
    """The linear recurrence of the same shapes, one block."""

    def f(h, b):
        h = (jnp.kron(jnp.eye(3), weights.T) @ h.ravel() + b.ravel()).reshape(h.shape)
        return h, h

    return lax.scan(f, start, inputs)


def by_linear_scan(method):
    def run(weights, start, inputs):
        maps = parscan.BlockDiagonal(jnp.broadcast_to(weights.T, (5, 3, 4, 4)))
        hs = parscan.linear_scan(maps, inputs.reshape(5, -1), start.ravel(), method=method).reshape(inputs.shape)
        return hs[-1], hs

    return run


ENTRIES = {"scan": (by_public_scan, plain), "chain": (by_chain, plain), "forward": (by_forward, plain), "linear_scan": (by_linear_scan, plain_linear)}


def scalar(run):
    def loss(weights, start, inputs):
        final, states = run(weights, start, inputs)
        return jnp.sum(final**2) + jnp.sum(jnp.sin(states))

    return loss


def directions(*args):
    return tuple(jnp.cos(jnp.arange(float(a.size))).reshape(a.shape) for a in args)


def transformed(name, run):
    """The transformation by its name, as a function of (weights, start, inputs)."""
    loss, all_ = scalar(run), (0, 1, 2)
    by_start = lambda w, s, x: lambda s: loss(w, s, x)
    batch = lambda a: jnp.stack([a, 0.5 * a, -a])
    return {
        "value": run,
        "jit": jax.jit(run),
        "grad": jax.grad(loss, all_),
        "value_and_grad": jax.value_and_grad(loss, all_),
        "jit of grad": jax.jit(jax.grad(loss, all_)),
        "vjp": lambda *a: (lambda out, back: back(jax.tree.map(jnp.cos, out)))(*jax.vjp(run, *a)),
        "jvp": lambda *a: jax.jvp(run, a, directions(*a)),
        "jacfwd": jax.jacfwd(run, 1),
        "jacrev": jax.jacrev(run, 1),
        "hessian": jax.hessian(loss, 1),
        "hessian in weights": jax.hessian(loss, 0),
        "grad of grad": lambda w, s, x: jax.grad(lambda s: jnp.sum(jax.grad(by_start(w, s, x))(s) ** 2))(s),
        "jvp of grad": lambda *a: jax.jvp(jax.grad(loss, all_), a, directions(*a)),
        "grad of jvp": lambda *a: jax.grad(lambda *b: jax.jvp(loss, b, directions(*b))[1], all_)(*a),
        "grad of jvp in weights alone": lambda w, s, x: jax.grad(lambda w: jax.jvp(lambda s: loss(w, s, x), (s,), directions(s))[1])(w),
        "linearize": lambda *a: jax.linearize(run, *a)[1](*directions(*a)),
        "vmap over starts": lambda w, s, x: jax.vmap(run, (None, 0, None))(w, batch(s), x),
        "vmap over weights": lambda w, s, x: jax.vmap(run, (0, None, None))(batch(w), s, x),
        "vmap over all": lambda *a: jax.vmap(run)(*map(batch, a)),
        "vmap of grad": lambda *a: jax.vmap(jax.grad(loss, all_))(*map(batch, a)),
        "vmap of grad over inputs": lambda w, s, x: jax.vmap(jax.grad(loss, all_), (None, None, 0))(w, s, batch(x)),
        "grad of vmap": lambda *a: jax.grad(lambda *b: jnp.sum(jax.vmap(loss)(*map(batch, b))), all_)(*a),
        "vmap of hessian": lambda w, s, x: jax.vmap(jax.hessian(loss, 1), (None, 0, None))(w, batch(s), x),
        "checkpoint": lambda *a: jax.grad(jax.checkpoint(loss), all_)(*a),
        "in scan": lambda w, s, x: jax.grad(lambda w: lax.scan(lambda s, _: (run(w, s, x)[0], loss(w, s, x)), s, None, length=3)[1].sum())(w),
        "in cond": lambda w, s, x: jax.grad(lambda w: lax.cond(s.sum() > -1e9, lambda w: loss(w, s, x), lambda w: 0.0 * w.sum(), w))(w),
        "in while_loop": lambda w, s, x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] - 0.01 * jax.grad(loss)(c[1], s, x)), (0, w))[1],
        "jvp in while_loop": lambda w, s, x: jax.jvp(
            lambda w: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] + 0.1 * loss(c[1], s, x)), (0, w))[1], (w,), directions(w)
        ),
    }[name]


NAMES = [
    "value",
    "jit",
    "grad",
    "value_and_grad",
    "jit of grad",
    "vjp",
    "jvp",
    "jacfwd",
    "jacrev",
    "hessian",
    "hessian in weights",
    "grad of grad",
    "jvp of grad",
    "grad of jvp",
    "grad of jvp in weights alone",
    "linearize",
    "vmap over starts",
    "vmap over weights",
    "vmap over all",
    "vmap of grad",
    "vmap of grad over inputs",
    "grad of vmap",
    "vmap of hessian",
    "checkpoint",
    "in scan",
    "in cond",
    "in while_loop",
    "jvp in while_loop",
]


@functools.cache
def wanted(name, entry):
    return jax.jit(transformed(name, ENTRIES[entry][1]))(WEIGHTS, START, INPUTS)


# Everything for `scan`; for the entries that are made of it, or of the same solve, one of each sort.
SOME = ["jit", "value_and_grad", "vjp", "jvp", "jacfwd", "jacrev", "hessian", "jvp of grad", "grad of jvp", "vmap of grad", "checkpoint", "in scan", "in cond"]
SOME += ["in while_loop"]
UNCOMPILED = ["value", "grad", "vjp", "jvp", "linearize", "vmap over all", "vmap of grad"]  # for `scan`
CHOSEN = {"scan": NAMES, "chain": SOME, "linear_scan": SOME, "forward": ["jit", "value_and_grad", "jvp"]}  # what a chain gives with its activations
PAIRS = [(entry, name) for entry in ENTRIES for name in CHOSEN[entry]]


@pytest.mark.parametrize("entry, name", PAIRS)
def test_by_a_tree(entry, name):
    run = transformed(name, ENTRIES[entry][0]("tree"))
    run = run if entry == "scan" and name in UNCOMPILED else jax.jit(run)  # one compilation costs less than those of many small operations
    assert_close(run(WEIGHTS, START, INPUTS), wanted(name, entry), 1e-10)


@pytest.mark.parametrize("name", ["grad", "jvp", "hessian", "grad of jvp", "jvp of grad", "vmap of grad", "checkpoint"])
@pytest.mark.parametrize("method", ["auto", "sequential", "walk", parscan.Chunked(3)], ids=str)
def test_scan_by_every_method(method, name):
    assert_close(jax.jit(transformed(name, by_public_scan(method)))(WEIGHTS, START, INPUTS), wanted(name, "scan"), 1e-10)


def test_a_closed_over_array_is_differentiated_twice():
    def nested(scan):
        def loss(weights, start, inputs):
            def outer(h, x):
                def inner(g, z):
                    g = jnp.tanh(g @ weights + z + h.mean())
                    return g, g.sum()

                g, sums = scan(inner, h, jnp.stack([x, 0.5 * x, -x]))
                return g, sums

            final, ys = scan(outer, start, inputs)
            return jnp.sum(final**2) + jnp.sum(ys**2)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(WEIGHTS, START, INPUTS)

    want = nested(lax.scan)
    for method in ("auto", "tree", "walk"):
        assert_close(nested(by_scan(method)), want, 1e-10)


# What a step may hold: (weights, h, method) -> h, of the state's shape.
def _layer(w, h):
    return jnp.tanh(h @ w)


INSIDE = {
    "scan": lambda w, h, method: parscan.scan(lambda g, x: (_layer(w, g) + x, None), h, INPUTS[:2], method=method)[0],
    "chain": lambda w, h, method: parscan.chain(_layer, params_axes=None, length=2, method=method)(w, h),
    "chain of a sequence": lambda w, h, method: parscan.chain([_layer, lambda _, g: g.T, lambda _, g: jnp.sin(g.T)], method=method)([w, None, None], h),
    "forward": lambda w, h, method: parscan.forward(_layer, w, h, params_axes=None, length=2, method=method)[1][1:].mean(0),
    "linear_scan": lambda w, h, method: jax.vmap(lambda r: parscan.linear_scan(parscan.Dense(w), INPUTS[:3, 0], r, method=method)[-1])(h) * 0.1,
    "parallel_backward": lambda w, h, method: (
        parscan.parallel_backward(_layer, w, jnp.stack([h, _layer(w, h), _layer(w, _layer(w, h))]), h, params_axes=None, method=method).input
    ),
}
AROUND = {
    "scan": lambda f, h, method: parscan.scan(lambda h, x: (f(h) + x, h), h, INPUTS[:3], method=method),
    "a sequence": lambda f, h, method: parscan.chain([lambda _, h: f(h), lambda x, h: h * x, lambda _, h: f(h)], method=method)([None, INPUTS[0], None], h),
}


@pytest.mark.parametrize("inner", INSIDE)
@pytest.mark.parametrize("outer", AROUND)
def test_each_inside_each(outer, inner):
    def loss(method, w, h):
        out = AROUND[outer](lambda h: INSIDE[inner](w, h, method), h, method)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))

    by = {method: jax.jit(jax.value_and_grad(functools.partial(loss, method), (0, 1)))(WEIGHTS, START) for method in ("lax", "walk")}
    assert_close(by["walk"], by["lax"], 1e-10)


PLAIN_CHAIN = {
    "value_and_grad": lambda f: jax.value_and_grad(f, (0, 1)),
    "jvp": lambda f: lambda w, h: jax.jvp(f, (w, h), (w, h)),
    "jacfwd": lambda f: jax.jacfwd(f, 1),
    "hessian": lambda f: jax.hessian(f, 1),
    "grad of jvp": lambda f: jax.grad(lambda w, h: jax.jvp(f, (w, h), (w, h))[1], (0, 1)),
    "vmap of grad": lambda f: lambda w, h: jax.vmap(jax.grad(f, (0, 1)), (None, 0))(w, jnp.stack([h, -h])),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f), (0, 1)),
}


@pytest.mark.parametrize("name", PLAIN_CHAIN)
def test_a_chain_without_its_activations(name):
    def loss(method, w, h):
        apply = parscan.chain(lambda p, h: jnp.tanh(h @ p[0] + p[1]), params_axes=(None, 0), method=method)
        return jnp.sum(apply((w, INPUTS), h) ** 3)

    by = [jax.jit(PLAIN_CHAIN[name](functools.partial(loss, method)))(WEIGHTS, START) for method in ("walk", "lax")]
    assert_close(*by, 1e-10)


def test_nested_in_each_other_the_batch_is_still_found():
    def f(h, x):
        inner = parscan.scan(lambda g, z: (jnp.tanh(g @ WEIGHTS + z), None), h, jnp.stack([x, x]), method="tree")[0]
        return inner, None

    assert parscan.plan(f, START, INPUTS).blocks == {4: 3}


def layer(p, h):
    return jnp.tanh(h @ p[0] + p[1])


def backward(method, params, activations, end):
    grads = parscan.parallel_backward(layer, params, activations, end, params_axes=(None, 0), method=method)
    return grads.params, grads.activations


def plain_backward(params, activations, end):
    """The same, every layer's own VJP in a plain loop."""
    (weights, inputs), states, to_weights, to_inputs = params, [end], jnp.zeros_like(params[0]), []
    for x, h in reversed(list(zip(inputs, activations[:-1], strict=True))):
        (to_w, to_x), before = jax.vjp(layer, (weights, x), h)[1](states[0])
        to_weights, to_inputs, states = to_weights + to_w, [to_x, *to_inputs], [before, *states]
    return (to_weights, jnp.stack(to_inputs)), jnp.stack(states)


def transformed_backward(name, run):
    """The transformation by its name, as a function of the arguments of `run`."""
    batch = lambda tree: jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), tree)
    loss = lambda *a: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(run(*a)))
    return {
        "jit": jax.jit(run),
        "vmap": lambda *a: jax.vmap(run)(*map(batch, a)),
        "grad": jax.grad(loss, (0, 1, 2)),
        "vmap of grad": lambda *a: jax.vmap(jax.grad(loss, (0, 1, 2)))(*map(batch, a)),
        "hessian": jax.hessian(loss, 2),
    }[name]


@functools.cache
def backward_arguments():
    return (WEIGHTS, INPUTS), parscan.forward(layer, (WEIGHTS, INPUTS), START, params_axes=(None, 0))[1], START


@functools.cache
def wanted_backward(name):
    return jax.jit(transformed_backward(name, plain_backward))(*backward_arguments())


@pytest.mark.parametrize("method", ["lax", "sequential", "walk", "tree", "associative", "chunked", "auto"])
@pytest.mark.parametrize("name", ["jit", "vmap", "grad", "vmap of grad", "hessian"])
def test_parallel_backward(name, method):
    run = transformed_backward(name, functools.partial(backward, method))
    run = jax.jit(run) if name in ("vmap of grad", "hessian") else run
    assert_close(run(*backward_arguments()), wanted_backward(name), 1e-10)


def test_vmap_with_an_axis_name_outside_is_no_obstacle():
    run = jax.vmap(lambda s: parscan.scan(lambda h, x: (jnp.tanh(h @ WEIGHTS + x), None), s, INPUTS, method="tree")[0], axis_name="batch")
    assert run(jnp.stack([START, START])).shape == (2, 3, 4)
