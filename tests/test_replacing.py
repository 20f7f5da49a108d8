"""`replacing_lax_scan`: who is given which scan, and that everything is as it was afterwards."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import assert_close, long_loops

import parscan
from parscan import single

XS = jnp.sin(jnp.arange(60.0)).reshape(20, 3)
START = jnp.array([0.3, -0.2, 0.5])
ORIGINAL = lax.scan


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    monkeypatch.setattr(single, "joins_by_loops", lambda maps: False)  # loops are counted here
    yield
    left, lax.scan = lax.scan, ORIGINAL
    assert left is ORIGINAL


def step(h, x):
    h = jnp.tanh(0.5 * h + h.sum() + x)
    return h, h


def loss(h):
    return jnp.sum(lax.scan(step, h, XS)[1] ** 2)


def loops(f):
    """Loops of all steps in the program of a gradient: one by `lax.scan` there and one back, by a tree only the one there."""
    return len(long_loops(jax.make_jaxpr(jax.grad(f))(START), 19))


def test_as_a_context_and_as_a_decorator():
    want = jax.grad(loss)(START)
    with parscan.replacing_lax_scan(method="tree"):
        assert loops(loss) == 1
        assert_close(jax.grad(loss)(START), want, 1e-12)
    assert loops(loss) == 2
    parallel = parscan.replacing_lax_scan(method="tree")(loss)
    for _ in range(2):  # it may be used again
        assert loops(parallel) == 1
    assert_close(jax.jit(jax.grad(parallel))(START), want, 1e-12)


def test_the_innermost_counts():
    with parscan.replacing_lax_scan(method="tree"):
        with parscan.replacing_lax_scan(method="lax"):
            assert loops(loss) == 2
        assert loops(loss) == 1


def test_loops_inside_loops_are_replaced_too():
    def nested(h):
        return jnp.sum(ORIGINAL(lambda h, x: (h + loss(h + x), None), h, XS[:2])[0])

    inner = lambda f: sum(length == 20 for length, _ in long_loops(jax.make_jaxpr(jax.grad(f))(START), 19))
    assert inner(nested) == 2
    assert inner(parscan.replacing_lax_scan(method="tree")(nested)) == 1
    assert_close(
        jax.grad(parscan.replacing_lax_scan()(lambda h: jnp.sum(lax.scan(lambda h, x: (h + loss(h + x), None), h, XS[:2])[0])))(START),
        jax.grad(nested)(START),
        1e-12,
    )


def test_an_exception_leaves_nothing_behind():
    with pytest.raises(TypeError, match="scan"), parscan.replacing_lax_scan():
        lax.scan(lambda h, x: h, START, XS)
    assert lax.scan is ORIGINAL
    assert loops(loss) == 2
    with pytest.raises(ValueError, match="method"), parscan.replacing_lax_scan(method="no such method"):
        loss(START)


def test_other_threads_keep_theirs():
    inside, go_on = threading.Event(), threading.Event()

    def parallel():
        with parscan.replacing_lax_scan(method="tree"):
            inside.set()
            assert go_on.wait(60)
            return loops(loss)

    with ThreadPoolExecutor(2) as pool:
        theirs = pool.submit(parallel)
        assert inside.wait(60)
        assert lax.scan is not ORIGINAL
        ours = loops(loss)
        with parscan.replacing_lax_scan(method="lax"):  # left while the other is still in
            pass
        assert lax.scan is not ORIGINAL
        go_on.set()
        assert (theirs.result(), ours) == (1, 2)


def test_what_another_has_put_there_stays(monkeypatch):
    calls = []

    def theirs(*args, **kwargs):
        calls.append(args)
        return below(*args, **kwargs)

    below = ORIGINAL
    with monkeypatch.context() as patch:  # before us: it is there again afterwards
        patch.setattr(lax, "scan", theirs)
        with parscan.replacing_lax_scan(method="tree"):
            assert loops(loss) == 1
        assert lax.scan is theirs
        assert not calls
        assert loops(loss) == 2
        assert calls
    with parscan.replacing_lax_scan(method="tree"):  # while we are there: it is left alone
        below, lax.scan = lax.scan, theirs
    assert lax.scan is theirs
    assert loops(loss) == 2  # by way of ours, which knows what it stood for
    lax.scan = below  # ours, put back late
    with parscan.replacing_lax_scan(method="tree"):
        assert loops(loss) == 1
    assert lax.scan is ORIGINAL


@pytest.mark.parametrize("asked, error", [({"method": "nope"}, ValueError), ({"method": 3}, TypeError), ({"structure": "nope"}, ValueError)])
def test_what_is_asked_for_is_read_on_entering(asked, error):
    with pytest.raises(error, match="must be"), parscan.replacing_lax_scan(**asked):
        pass
    assert jax.lax.scan.__module__.startswith("jax")
