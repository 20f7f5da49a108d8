"""In the seats of the frameworks: their own loops, scanned by `parscan.scan`, give the values and gradients that they give by `lax.scan`."""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax import lax
from support import assert_close

import parscan

ROOT = Path(__file__).resolve().parents[1]
BATCH, LENGTH, INPUTS, WIDTH = 3, 6, 2, 4
XS = jnp.sin(jnp.arange(BATCH * LENGTH * INPUTS, dtype="float32")).reshape(BATCH, LENGTH, INPUTS)
LENGTHS = jnp.array([6, 2, 4], "int32")


@pytest.fixture(autouse=True)
def single_precision():
    """Frameworks make their parameters in single precision."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)


def squares(tree):
    return sum(jnp.sum(jnp.cos(leaf) * leaf) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact))


# --- Flax Linen: (loss, what it is differentiated in) -----------------------------------------------------------------------


def linen(model, *args, variables=None, rngs=None, mutable=False, **options):
    variables = variables or model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, *args, **options)
    rest = {name: some for name, some in variables.items() if name != "params"}
    call = functools.partial(model.apply, rngs=rngs, mutable=mutable, **options)
    return lambda params, *args: squares(call({"params": params, **rest}, *args)), (variables["params"], *args)


def linen_rnn():
    return linen(nn.RNN(nn.GRUCell(WIDTH)), XS)


def linen_rnn_with_lengths():
    return linen(nn.RNN(nn.OptimizedLSTMCell(WIDTH), return_carry=True, reverse=True, keep_order=True), XS, seq_lengths=LENGTHS)


def linen_time_major():
    return linen(nn.RNN(nn.SimpleCell(WIDTH), time_major=True, return_carry=True, unroll=2), XS.swapaxes(0, 1))


def linen_bidirectional():
    return linen(nn.Bidirectional(nn.RNN(nn.GRUCell(WIDTH)), nn.RNN(nn.LSTMCell(WIDTH))), XS, seq_lengths=LENGTHS)


class Stepwise(nn.Module):
    """A cell with dropout, drawn anew at every step, and statistics that are carried along."""

    def setup(self):
        self.mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(WIDTH))

    @nn.compact
    def __call__(self, h, x):
        h = jnp.tanh(nn.Dense(WIDTH)(h) + nn.Dense(WIDTH)(nn.Dropout(0.3, deterministic=False)(x)))
        self.mean.value = 0.9 * self.mean.value + 0.1 * h.mean(0)
        return h - self.mean.value, h


def linen_scan_of_a_cell():
    loop = nn.scan(Stepwise, variable_broadcast="params", variable_carry="batch_stats", split_rngs={"params": False, "dropout": True}, in_axes=1, out_axes=1)
    start, keys = jnp.ones((BATCH, WIDTH)), {"dropout": jax.random.key(2)}
    variables = Stepwise().init({"params": jax.random.key(0), **keys}, start, XS[:, 0])  # a collection that is carried must be there before
    return linen(loop(), start, XS, variables=variables, rngs=keys, mutable=["batch_stats"])


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return h + nn.Dropout(0.3, deterministic=False)(jnp.tanh(nn.Dense(WIDTH)(nn.LayerNorm()(h)))), None


def linen_scan_of_layers():
    layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=5)
    return linen(layers(), XS[:, :2].reshape(BATCH, WIDTH), None, rngs={"dropout": jax.random.key(2)})


# --- Flax NNX -------------------------------------------------------------------------------------------------------------------


def with_nnx(module, *args, **options):
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def loss(params, rest, *args):
        model = nnx.merge(graph, params, rest, copy=True)
        out = model(*args, **options)
        return squares((out, nnx.state(model, nnx.BatchStat)))

    return lambda params, *args: loss(params, rest, *args), (params, *args)


def nnx_rnn():
    return with_nnx(nnx.RNN(nnx.GRUCell(INPUTS, WIDTH, rngs=nnx.Rngs(0))), XS, initial_carry=jnp.ones((BATCH, WIDTH)))


def nnx_rnn_with_lengths():
    rnn = nnx.RNN(nnx.OptimizedLSTMCell(INPUTS, WIDTH, rngs=nnx.Rngs(0)), return_carry=True, reverse=True, keep_order=True)
    return with_nnx(rnn, XS, initial_carry=(jnp.ones((BATCH, WIDTH)), jnp.zeros((BATCH, WIDTH))), seq_lengths=LENGTHS)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.drop = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)
        self.mean = nnx.BatchStat(jnp.zeros(WIDTH))

    def __call__(self, h):
        h = h + self.drop(jnp.tanh(self.linear(h)))
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * h.mean(0)
        return h


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(Layer)(rngs.split(5))

    def __call__(self, h):
        return nnx.scan(lambda h, layer: layer(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(h, self.layers)


def nnx_scan_of_layers():
    return with_nnx(Layers(nnx.Rngs(0)), XS[:, :2].reshape(BATCH, WIDTH))


class Cell(nnx.Module):
    """One layer for all steps: nnx hands its weights, statistics and counts of random numbers from step to step in the carry."""

    def __init__(self, rngs):
        self.layer = Layer(rngs)

    def __call__(self, h, xs):
        axes = nnx.StateAxes({(nnx.Param,): None, ...: nnx.Carry})

        @nnx.scan(in_axes=(axes, nnx.Carry, 1), out_axes=(nnx.Carry, 1))
        def loop(layer, h, x):
            h = layer(h + x.sum(-1, keepdims=True))
            return h, h

        return loop(self.layer, h, xs)


def nnx_scan_of_a_cell():
    return with_nnx(Cell(nnx.Rngs(0)), jnp.ones((BATCH, WIDTH)), XS)


# --- Equinox, and solvers -------------------------------------------------------------------------------------------------------


def with_eqx(call, module, *args):
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return lambda params, *args: squares(call(eqx.combine(params, static), *args)), (params, *args)


def eqx_gru():
    def run(cell, h, xs):
        return lax.scan(lambda h, x: (jax.vmap(cell)(x, h),) * 2, h, xs)

    return with_eqx(run, eqx.nn.GRUCell(INPUTS, WIDTH, key=jax.random.key(0)), jnp.ones((BATCH, WIDTH)), XS.swapaxes(0, 1))


def eqx_lstm():
    def run(cell, carry, xs):
        return lax.scan(lambda carry, x: (jax.vmap(cell)(x, carry), carry[0]), carry, xs, reverse=True)

    carry = (jnp.ones((BATCH, WIDTH)), jnp.zeros((BATCH, WIDTH)))
    return with_eqx(run, eqx.nn.LSTMCell(INPUTS, WIDTH, key=jax.random.key(0)), carry, XS.swapaxes(0, 1))


def eqx_mlp():
    mlp = eqx.nn.MLP(INPUTS, 1, WIDTH, depth=6, scan=True, key=jax.random.key(0))
    return with_eqx(lambda mlp, x: jax.vmap(mlp)(x), mlp, XS[:, 0])


def runge_kutta():
    def run(field, y, dt):
        def step(y, at):
            t, dt = at
            f = lambda t, y: jax.vmap(field)(y) * jnp.cos(t)
            a = f(t, y)
            b = f(t + dt / 2, y + dt / 2 * a)
            c = f(t + dt / 2, y + dt / 2 * b)
            d = f(t + dt, y + dt * c)
            y = y + dt / 6 * (a + 2 * b + 2 * c + d)
            return y, y

        return lax.scan(step, y, (jnp.cumsum(dt) - dt, dt))

    field = eqx.nn.MLP(2, 2, 5, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    return with_eqx(lambda field, y: run(field, y, jnp.full(7, 0.3)), field, XS[:, 0])


CASES = {  # what is run, and the blocks of the carry that are found in its first loop: size to how many; statistics mix the batch
    linen_rnn: {WIDTH: BATCH},
    linen_rnn_with_lengths: {2 * WIDTH: BATCH},
    linen_time_major: {WIDTH: BATCH},
    linen_bidirectional: {WIDTH: BATCH},
    linen_scan_of_a_cell: {WIDTH * (BATCH + 1): 1},
    linen_scan_of_layers: {WIDTH: BATCH},
    nnx_rnn: {WIDTH: BATCH},
    nnx_rnn_with_lengths: {2 * WIDTH: BATCH},
    nnx_scan_of_layers: {WIDTH: BATCH},
    nnx_scan_of_a_cell: {WIDTH * (BATCH + 1): 1},  # the weights, which nnx keeps in the carry, are no part of the state
    eqx_gru: {WIDTH: BATCH},
    eqx_lstm: {2 * WIDTH: BATCH},
    eqx_mlp: {WIDTH: 1},  # under `vmap`,
    runge_kutta: {2: BATCH},
}
METHODS = {"auto": "auto", "parallel": parscan.Chunked(2)}


@functools.cache
def made(case):
    return case()


@functools.cache
def wanted(case):
    loss, args = made(case)
    return jax.jit(jax.value_and_grad(loss, tuple(range(len(args))), allow_int=True))(*args)


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0]


RUNS = [(case, "parallel") for case in CASES] + [(case, "auto") for case in (linen_scan_of_a_cell, nnx_scan_of_a_cell, eqx_lstm)]  # docs/howto has more


@pytest.mark.parametrize("case, method", RUNS, ids=lambda one: getattr(one, "__name__", one))
def test_as_by_lax_scan(case, method, caplog):
    loss, args = made(case)
    want = wanted(case)
    with caplog.at_level(logging.DEBUG, "parscan"):
        parallel = parscan.replacing_lax_scan(method=METHODS[method])(loss)
        got = jax.jit(jax.value_and_grad(parallel, tuple(range(len(args))), allow_int=True))(*args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert_close(floats(got), floats(want), 1e-5)
    plans = [record.args for record in caplog.records if record.name == "parscan" and record.funcName == "plan_chain"]
    assert plans, "no loop was met"
    assert plans[0][3] == CASES[case]
    assert all(isinstance(plan[0], parscan.Chunked) for plan in plans) or method == "auto"


def test_without_a_patch():
    """The recipe for those who would rather have no name replaced: the cell applied as a function."""
    rnn = nn.RNN(nn.GRUCell(WIDTH))
    params = rnn.init(jax.random.key(0), XS)["params"]

    def loss(params, xs):
        step = lambda h, x: rnn.cell.apply({"params": params["cell"]}, h, x)
        return squares(parscan.scan(step, jnp.zeros((BATCH, WIDTH)), xs.swapaxes(0, 1), method="tree")[1])

    want = jax.jit(jax.grad(lambda params, xs: squares(rnn.apply({"params": params}, xs)), (0, 1)))(params, XS)
    assert_close(jax.jit(jax.grad(loss, (0, 1)))(params, XS), want, 1e-5)


def test_training_by_optax():
    loss, (params, *args) = made(eqx_gru)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))

    def losses(loss):
        @jax.jit
        def step(params, state):
            value, gradient = jax.value_and_grad(loss)(params, *args)
            updates, state = optimiser.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        now, state, found = params, optimiser.init(params), []
        for _ in range(20):
            now, state, value = step(now, state)
            found.append(value)
        return jnp.stack(found)

    want, got = losses(loss), losses(parscan.replacing_lax_scan(method="tree")(loss))
    assert want[-1] < want[0] - 0.1 * abs(want[0])
    assert_close(got, want, 1e-4)


# --- data parallelism --------------------------------------------------------------------------------------------------------------

SHARDED = """
import functools, json, re
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from support import gap
import parscan

mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
specs = (P(), P("data"), P(None, "data"))
keys = jax.random.split(jax.random.key(0), 3)
values = [jax.random.normal(key, shape) / 2 for key, shape in zip(keys, ((4, 4), (16, 4), (20, 16, 4)))]
args = [jax.device_put(value, NamedSharding(mesh, spec)) for value, spec in zip(values, specs)]


def rnn(w, h, x):
    h = jnp.tanh(h @ w + x)
    return h, h


def lstm(w, carry, x):
    h, c = carry
    c = jax.nn.sigmoid(h @ w + x) * c + jnp.tanh(h @ w.T)
    h = jnp.tanh(c)
    return (h, c), h


def gradient(scan, step):
    start = lambda h: (h, h) if step is lstm else h
    return jax.jit(jax.grad(lambda w, h, xs: jnp.sum(scan(functools.partial(step, w), start(h), xs)[1] ** 2), (0, 1, 2)))


found = {}
for step in (rnn, lstm):
    want = gradient(jax.lax.scan, step)(*values)
    free = {kind.__name__.lower(): kind(guard=False) for kind in (parscan.Walk, parscan.Chunked, parscan.Tree)}
    guarded = {f"guarded {name}": type(method)() for name, method in free.items()}
    every = {"lax": "lax", "auto": "auto", **free, **guarded}
    for name, method in every.items() if step is rnn else [(name, every[name]) for name in ("lax", "auto", "guarded tree")]:
        scan = functools.partial(parscan.scan, method=method)
        compiled = gradient(scan, step).lower(*args).compile()
        got = compiled(*args)
        found[f"{step.__name__} {name}"] = {
            "collectives": re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\\(", compiled.as_text()),
            "gap": gap(got, want),
            "kept": all(g.sharding.is_equivalent_to(a.sharding, a.ndim) for g, a in zip(got, args)),
        }

# Inside a shard_map that keeps account of what varies.
inside = lambda scan: jax.jit(jax.shard_map(gradient(scan, rnn), mesh=mesh, in_specs=specs, out_specs=specs))
want = inside(jax.lax.scan)(*values)
for method in ("auto", "sequential"):
    found["inside " + method] = gap(inside(functools.partial(parscan.scan, method=method))(*values), want)
try:
    inside(functools.partial(parscan.scan, method="tree"))(*values)
except ValueError as error:
    found["inside tree"] = str(error)
print(json.dumps(found))
"""


@functools.cache
def sharded():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("method", ["auto", "sequential"])
def test_inside_a_shard_map(method):
    assert sharded()[f"inside {method}"] < 1e-6


def test_inside_a_shard_map_what_is_asked_for_and_cannot_be_is_refused():
    assert "`method=Tree()` cannot be used for this function" in sharded()["inside tree"]


BY = ["auto", *(guard + method for guard in ("", "guarded ") for method in ("walk", "chunked", "tree"))]


@pytest.mark.parametrize("step, method", [*(("rnn", method) for method in BY), ("lstm", "auto"), ("lstm", "guarded tree")])
def test_a_batch_over_eight_devices(step, method):
    """The weight's cotangent is summed over the devices, once; nothing else is sent but a guard's answer."""
    want, got = sharded()[f"{step} lax"], sharded()[f"{step} {method}"]
    assert got["gap"] < 1e-5
    assert got["kept"]
    assert set(got["collectives"]) == {"all-reduce"}
    assert len(got["collectives"]) == len(want["collectives"]) + {"guarded chunked": 2}.get(method, method.startswith("guarded"))
