"""Faults from outside: a host callback that raises, an interrupt in the middle of a compilation, a stack that runs out. Nothing of them may stay behind."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from support import ROOT, assert_close

import parscan

WEIGHTS = jnp.asarray(0.4 * np.random.default_rng(0).standard_normal((3, 3)))
XS = jnp.asarray(np.random.default_rng(1).standard_normal((5, 3)))


def rnn(scale):
    """A step that no cache has seen, for every scale."""

    def step(h, x):
        h = jnp.tanh(scale * (h @ WEIGHTS) + x)
        return h, h

    return step


def gradient(step, scan, **options):
    return jax.grad(lambda h: jnp.sum(scan(step, h, XS, **options)[1] ** 2))


expected = functools.cache(lambda scale: gradient(rnn(scale), lax.scan)(jnp.ones(3)))

# --- a host callback that raises -----------------------------------------------------------------------------------------------------


class NoValue(Exception):
    pass


def on_the_host(x):
    if x >= 3:
        raise NoValue("nothing from 3 on")
    return np.sin(x)


LIKE = jax.ShapeDtypeStruct((), jnp.float64)
called = jax.custom_jvp(lambda x: jax.pure_callback(on_the_host, LIKE, x, vmap_method="sequential"))
called.defjvp(lambda primals, tangents: (called(*primals), jnp.cos(primals[0]) * tangents[0]))


def seen(callback):
    """A step beside which something else is called."""

    def step(h, x):
        callback(x)
        return jnp.tanh(h + x), h

    return step


STEPS = {
    "pure_callback": lambda h, x: (jnp.tanh(h + jax.pure_callback(on_the_host, LIKE, x, vmap_method="sequential")), h),
    "pure_callback with a derivative": lambda h, x: (jnp.tanh(h + called(x)), h),
    "pure_callback of the carry": lambda h, x: (called(h) + x, h),
    "io_callback": lambda h, x: (jnp.tanh(h + io_callback(on_the_host, LIKE, x)), h),
    "ordered io_callback": lambda h, x: (jnp.tanh(h + io_callback(on_the_host, LIKE, x, ordered=True)), h),
    "debug.callback": seen(lambda x: jax.debug.callback(on_the_host, x)),
    "ordered debug.callback": seen(lambda x: jax.debug.callback(on_the_host, x, ordered=True)),
}
DIFFERENTIABLE = ["pure_callback with a derivative", "pure_callback of the carry", "debug.callback", "ordered debug.callback"]
RUNS = [(name, "forward", "auto") for name in STEPS]
RUNS += [(name, mode, "auto") for name in DIFFERENTIABLE for mode in ("grad", "jit of grad")]
RUNS += [(name, mode, method) for name in DIFFERENTIABLE[:2] for mode in ("forward", "jit of grad") for method in ("tree", "walk")]
RUNS += [("pure_callback", "forward", "sequential")]


@functools.cache
def with_callback(name, mode, method):
    scan = lax.scan if method is None else functools.partial(parscan.scan, method=method)
    run = lambda h, xs: scan(STEPS[name], h, xs)[0]
    return {"forward": run, "grad": jax.grad(run, (0, 1)), "jit of grad": jax.jit(jax.grad(run, (0, 1)))}[mode]


def ran(*case, xs):
    """What comes of it, callbacks included; or the error."""
    try:
        out = jax.block_until_ready(with_callback(*case)(0.5, xs))
        jax.effects_barrier()
    except Exception as error:
        return error
    return out


@pytest.mark.parametrize("name, mode, method", RUNS)
def test_a_callback_that_raises(name, mode, method):
    """The error is that of `lax.scan`, and what was compiled goes on to work."""
    got, want = (ran(name, mode, by, xs=jnp.arange(6.0)) for by in (method, None))
    assert isinstance(want, Exception) and type(got) is type(want)
    assert all("NoValue: nothing from 3 on" in str(error) for error in (got, want))
    assert_close(*(ran(name, mode, by, xs=jnp.linspace(0, 0.5, 6)) for by in (method, None)), 1e-12)


# --- an interrupt --------------------------------------------------------------------------------------------------------------------

HERE = str(Path(parscan.__file__).parent)


def calls_of_parscan(run, interrupted_at=None):
    """How many of its functions are called; the given one by a user who has had enough."""
    calls, before = 0, sys.gettrace()

    def count(frame, event, arg):
        nonlocal calls
        code = frame.f_code
        # JAX turns whatever an __eq__ raises into a ValueError, and Python drops what a generator raises while it is closed.
        if code.co_filename.startswith(HERE) and code.co_name != "__eq__" and not code.co_flags & inspect.CO_GENERATOR:
            calls += 1
            if calls == interrupted_at:
                raise KeyboardInterrupt

    sys.settrace(count)
    try:
        run()
    finally:
        sys.settrace(before)
    return calls


POINTS = 6


@pytest.mark.parametrize("method", ["tree", "walk"])
def test_an_interrupt_leaves_nothing_half_done(method):
    """At points all over the tracing, each of a step that is new."""
    compiled = lambda scale: jax.jit(gradient(rnn(scale), parscan.scan, method=method))
    plan = str(parscan.plan(rnn(1.0), jnp.ones(3), XS, method=method))
    calls = calls_of_parscan(lambda: compiled(1.0).lower(jnp.ones(3)))
    for point in range(POINTS):
        scale = 0.9 - 0.01 * point
        again = compiled(scale)
        with pytest.raises(KeyboardInterrupt):
            calls_of_parscan(lambda again=again: again.lower(jnp.ones(3)), interrupted_at=1 + calls * point // POINTS)
        assert_close(again(jnp.ones(3)), expected(scale), 1e-12)
        assert str(parscan.plan(rnn(scale), jnp.ones(3), XS, method=method)) == plan


def test_an_interrupt_within_replacing_lax_scan():
    def run():
        with parscan.replacing_lax_scan(method="tree"):
            gradient(rnn(0.7), jax.lax.scan)(jnp.ones(3))

    original = lax.scan
    with pytest.raises(KeyboardInterrupt):
        calls_of_parscan(run, interrupted_at=100)
    assert lax.scan is original


INTERRUPTED = """
import os, signal, threading, time
import jax, jax.numpy as jnp
from jax import lax
import parscan

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its jobs in the background ignore it
jax.config.update("jax_enable_x64", True)
begun = threading.Event()
W = 0.4 * jax.random.normal(jax.random.key(0), (3, 3))

def step(h, x):
    begun.set()
    for _ in range(16):
        h = jnp.tanh(h @ W + x)
    return h, h

def gradient(scan, **options):
    return jax.jit(jax.grad(lambda h: jnp.sum(scan(step, h, jnp.ones((17, 3)), **options)[1])))

def interrupted(work):
    begun.clear()
    threading.Thread(target=lambda: (begun.wait(), time.sleep(0.05), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
    try:
        work()
    except BaseException as error:
        causes = [error, error.__cause__]  # JAX turns what is raised in an __eq__ into a ValueError
        return any(isinstance(cause, KeyboardInterrupt) for cause in causes)
    return False

start = jnp.ones(3)
# Now and then it falls into a callback of Python's, where it is lost.
assert any(interrupted(lambda: gradient(parscan.scan, method="tree").lower(start)) for _ in range(5)), "while it is traced"
parallel = gradient(parscan.scan, method="tree")
lowered = parallel.lower(start)
assert interrupted(lambda: (begun.set(), lowered.compile())), "while XLA compiles: seen when it returns"
got, want = parallel(start), gradient(lax.scan)(start)
assert jnp.allclose(got, want, rtol=1e-10), (got, want)
print("and went on")
"""


def test_sigint():
    """A signal as a terminal sends it, then the same call again."""
    run = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert run.returncode == 0 and run.stdout == "and went on\n", run.stderr


# --- no room -------------------------------------------------------------------------------------------------------------------------


def test_a_stack_that_runs_out_is_no_obstacle_for_good():
    """Wherever it runs out: a step that has been refused once for want of room is not refused where there is some."""

    def below(frames, run):
        return below(frames - 1, run) if frames else run()

    for room in range(60, 120, 5):
        step = rnn(0.5 - 0.001 * room)
        plan = lambda step=step: parscan.plan(step, jnp.ones(3), XS, method="tree")
        try:
            below(sys.getrecursionlimit() - len(inspect.stack(0)) - room, plan)
        except (RecursionError, ValueError):
            assert plan().method == parscan.Tree()
