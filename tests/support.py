"""What the tests share: one comparison, one table of tolerances, one set of chains, one way to look for loops in a program."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import parscan
from parscan import guard, machines
from parscan.jaxprs import Flat, trace

TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
METHODS: dict[str, Any] = {
    "lax": parscan.Lax(),
    "sequential": parscan.Sequential(),
    "walk": parscan.Walk(),
    "associative": parscan.Associative(),
    "tree": parscan.Tree(),
    "chunked": parscan.Chunked(),
}
LOG_DEPTH = {"tree": parscan.Tree(), "chunked": parscan.Chunked(8), "associative": parscan.Associative()}
KINDS = {"Dense": parscan.Dense, "BlockDiagonal": parscan.BlockDiagonal, "Diagonal": parscan.Diagonal}


def gap(got: Any, want: Any) -> float:
    """The largest norm-relative difference of two pytrees' leaves; exact zeros must be zeros, NaN is never close."""

    def one(g, w):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert g.shape == w.shape, (g.shape, w.shape)
        scale = np.linalg.norm(w)
        difference = np.linalg.norm(g - w)
        return difference / scale if scale else difference

    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want), (len(got), len(want))
    gaps = [one(g, w) for g, w in zip(got, want, strict=True)]
    assert not any(np.isnan(gaps)), "not a number"
    return max(gaps, default=0.0)


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    found = gap(got, want)
    assert found <= tolerance, f"norm-relative gap {found:.2e} > {tolerance:.0e}"


# --- chains with Jacobians that do not commute, near enough to isometries that no gradient vanishes over 1000 steps -----------


class Chain(NamedTuple):
    layer: Any
    params: Any
    x: Any
    params_axes: Any


@functools.cache
def a_machine_that_walks() -> machines.Machine:
    """One where an operation on explicit Jacobians takes next to nothing, and what is computed at once, too: `auto` takes `Walk`."""
    return replace(
        machines.default("cpu"), start=1e-3, level=1e-3, entry=1e-6, **dict.fromkeys(("all_call", "all_product", "all_element", "all_function"), 1e-6)
    )


def make_chain(kind: str, length: int, dtype: str, seed: int = 0) -> Chain:
    """A chain of `length` layers whose Jacobians are of that kind; a bias is shared by all layers."""
    random = np.random.default_rng(seed)
    n = 4
    shape = {"Dense": (n,), "BlockDiagonal": (3, n), "Diagonal": (5,)}[kind]
    if kind == "Diagonal":
        weights = random.choice([-1.0, 1.0], (length, 5)) * np.exp(0.02 * random.standard_normal((length, 5)))
    else:
        weights = np.linalg.qr(random.standard_normal((length, n, n)))[0] if length else np.zeros((0, n, n))
    params = {"w": jnp.asarray(weights, dtype), "b": jnp.asarray(0.3 * random.standard_normal(shape[-1]), dtype)}

    def layer(p, h):
        turned = p["w"] * h if kind == "Diagonal" else h @ p["w"]
        return turned + 0.01 * jnp.sin(h + p["b"])

    return Chain(layer, params, jnp.asarray(random.standard_normal(shape), dtype), {"w": 0, "b": None})


@functools.cache
def make_cotangents(kind: str, length: int, dtype: str, everywhere: bool) -> tuple[Any, Any]:
    """(cotangent at the end, cotangents at every layer or None)."""
    random = np.random.default_rng(1)
    shape = make_chain(kind, length, dtype).x.shape
    end = jnp.asarray(random.standard_normal(shape), dtype)
    return end, jnp.asarray(random.standard_normal((length + 1, *shape)), dtype) if everywhere else None


def loop_activations(chain: Chain, params: Any, x: Any, nudges: Any) -> Any:
    """h_0 … h_L of a plain Python loop, every activation nudged: the derivative in a nudge is the accumulated gradient."""
    first, *rest = jnp.unstack(nudges)
    states = [x + first]
    for w, nudge in zip(jnp.unstack(params["w"]) if rest else [], rest, strict=True):
        states.append(chain.layer({"w": w, "b": params["b"]}, states[-1]) + nudge)
    return jnp.stack(states)


def scan_activations(chain: Chain, params: Any, x: Any, nudges: Any) -> Any:
    """The same by `lax.scan`."""

    def step(h, one):
        w, nudge = one
        h = chain.layer({"w": w, "b": params["b"]}, h) + nudge
        return h, h

    first = x + nudges[0]
    return jnp.concatenate([first[None], lax.scan(step, first, (params["w"], nudges[1:]))[1]])


def reference(activations: Any, chain: Chain, end: Any, everywhere: Any) -> tuple[Any, Any]:
    """Gradients in params and in every activation, by `jax.grad` of a sequential program."""
    zero = jnp.zeros((chain.params["w"].shape[0] + 1, *chain.x.shape), chain.x.dtype)
    return _gradient(activations, chain.layer)(chain.params, chain.x, zero, end, zero if everywhere is None else everywhere)


@functools.cache
def _gradient(activations: Any, layer: Any) -> Any:
    """Compiled once, whichever cotangents. The loop is run as it stands: compiling steps one after another takes longer."""

    def loss(params, nudges, x, end, everywhere):
        states = activations(Chain(layer, params, x, None), params, x, nudges)
        return jnp.sum(states[-1] * end) + jnp.sum(states * everywhere)

    gradient = jax.grad(loss, (0, 1))
    gradient = gradient if activations is loop_activations else jax.jit(gradient)
    return lambda params, x, nudges, end, everywhere: gradient(params, nudges, x, end, everywhere)


# --- recurrent cells for tests of `scan` -----------------------------------------------------------------------------------


def rnn_problem(length: int = 9, batch: int = 3, width: int = 4, dtype: str = "float64", seed: int = 0) -> tuple[Any, tuple]:
    """(loss(scan, *arguments), arguments): a tanh RNN that reads its inputs, closes over its weights and emits two outputs."""
    random = np.random.default_rng(seed)
    weights = jnp.asarray(random.standard_normal((width, width)) / np.sqrt(width), dtype)
    inputs = jnp.asarray(random.standard_normal((length, batch, width)), dtype)
    start = jnp.asarray(random.standard_normal((batch, width)), dtype)

    def loss(scan, weights, start, inputs):
        def f(h, x):
            h = jnp.tanh(h @ weights + x)
            return h, (h, jnp.cos(h).sum(-1))

        final, (states, sums) = scan(f, start, inputs)
        return jnp.sum(final**2) + jnp.sum(states**3) + jnp.sum(sums**2)

    return loss, (weights, start, inputs)


# --- looking at programs ------------------------------------------------------------------------------------------------------


def sub_jaxprs(params: dict) -> Iterator[Any]:
    def inside(value):
        body = getattr(value, "jaxpr", value)
        if hasattr(body, "eqns"):
            yield body
        elif isinstance(value, (tuple, list)):
            for item in value:
                yield from inside(item)

    for value in params.values():
        yield from inside(value)


def is_fallback(eqn: Any) -> bool:
    """Whether this is what runs only where `parscan.guard` finds a result unsound."""
    return eqn.params.get("name") == guard.FALLBACK


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those of sub-jaxprs included, but for the fallback."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if is_fallback(eqn):
            continue
        yield eqn
        for inner in sub_jaxprs(eqn.params):
            yield from equations(inner)


def long_loops(jaxpr: Any, longest: int) -> list[tuple[int, tuple]]:
    """(length, shapes and dtypes carried) of each scan of more than `longest` trips; any while loop counts as one."""
    found = []
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "while":
            found.append((-1, ()))
        if eqn.primitive.name == "scan" and eqn.params["length"] > longest:
            body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
            if "num_consts" in eqn.params:
                consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
            else:
                groups = eqn.params["ft_in"].unpack()
                consts, carry = len(list(groups[0])), len(list(groups[1]))
            avals = [v.aval for v in body.invars[consts : consts + carry]]
            found.append((eqn.params["length"], tuple((a.shape, str(a.dtype)) for a in avals)))
    return found


def derivative_of(step: Any, state: Any) -> tuple[Any, range]:
    """The derivative of `step` in its state, as it is taken of a program: its inputs are tangents, then the state; and which are tangents."""
    program, consts, _ = trace(lambda _, state, x: step(state), Flat.of(()), Flat.of(state), Flat.of(()))
    leaves = jax.tree.leaves(state)

    def derivative(tangents, leaves):
        return jax.jvp(lambda some: program(consts, some, [])[0], (leaves,), (tangents,))[1]

    return jax.make_jaxpr(derivative)(leaves, leaves), range(len(leaves))


# --- steps and random programs that several tests use ---------------------------------------------------------------------------


@jax.custom_jvp
def round_through(x):
    """Rounds; its derivative is that of the identity."""
    return jnp.round(x)


round_through.defjvp(lambda primals, tangents: (round_through(*primals), tangents[0]))


def composed(program: Any, unary: list, binary: list) -> Any:
    """A step from (which unary operation, which binary one, which earlier value it joins) for each operation."""

    def step(h):
        values = [h]
        for one, two, which in program:
            values.append(binary[two](unary[one](values[-1]), values[which % len(values)]))
        return values[-1]

    return step


def labels_of_blocks(layout: Any) -> np.ndarray:
    """For every entry of a layout's vector, which block it is in."""
    sides = [group.side for group in layout.groups for _ in range(group.blocks)]
    return np.repeat(np.arange(len(sides)), sides)


# --- scripts ---------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


def run_script(name: str, *arguments: Any, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Runs one of `scripts/`, without some of the environment's variables."""
    environment = {name: value for name, value in os.environ.items() if name not in without}
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**environment, "JAX_PLATFORMS": "cpu"})


def found_before(state: Path) -> None:
    """Writes a violation into the first chunk of a script's state, as if its run had found one."""
    found = json.loads(state.read_text())
    found["chunks"]["0"]["violations"] = ["found before"]
    state.write_text(json.dumps(found))
