"""What the logger `parscan` says, and that it says nothing to those who have not asked."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from support import ROOT

import parscan

XS = jnp.ones((10, 4))


def rnn(h, x):
    return jnp.tanh(h + x), h


@jax.custom_vjp
def opaque(h):
    return jnp.sin(h)


opaque.defvjp(lambda h: (jnp.sin(h), jnp.cos(h)), lambda cosine, g: (g * cosine,))


def opaque_step(h, x):
    return opaque(h + x), None


def refused(*args):
    with pytest.raises(TypeError):
        parscan.scan(*args)


@pytest.fixture
def said(caplog):
    """What is said while something runs: (level, text)."""

    def during(run):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "parscan"):
            run()
        return [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "parscan"]

    return during


def test_what_was_chosen_and_why(said):
    ((level, text),) = said(lambda: parscan.scan(rnn, jnp.zeros(4), XS))
    plan = parscan.plan(rnn, jnp.zeros(4), XS)
    assert level == "DEBUG" and text == f"{plan.method} for 10 steps, Diagonal {{1: 4}}: {plan.reason}"
    ((level, text),) = said(lambda: parscan.scan(rnn, jnp.zeros(4), XS, method="tree"))
    assert level == "DEBUG" and text == "Tree() for 10 steps, Diagonal {1: 4}: asked for"
    ((level, text),) = said(lambda: parscan.linear_scan(parscan.Diagonal(XS), XS, XS[0], method="tree"))
    assert level == "DEBUG" and text == "Tree() for 10 steps of linear_scan, Diagonal: asked for"


def test_chains_too(said):
    layer = lambda w, h: jnp.tanh(w * h)
    _, activations = parscan.forward(layer, XS, XS[0])
    for run in (
        lambda: parscan.forward(layer, XS, XS[0]),
        lambda: parscan.chain(layer)(XS, XS[0]),
        lambda: parscan.parallel_backward(layer, XS, activations, XS[0]),
    ):
        ((level, text),) = said(run)
        assert level == "DEBUG" and "for 10 steps, Diagonal {1: 4}" in text


@pytest.mark.parametrize(
    "why, run",
    {
        "asked for": lambda: parscan.scan(rnn, jnp.zeros(4), XS, method="lax"),
        "nothing in the carry is differentiable": lambda: parscan.scan(lambda i, x: (i + 1, x), jnp.int32(0), XS),
        "no scan that can be read": lambda: refused(lambda h, x: h, jnp.zeros(4), XS),
    }.items(),
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_is_not_even_traced(why, run, said):
    ((level, text),) = said(run)
    assert level == "DEBUG" and text.startswith("lax.scan for a scan of <function") and why in text


def test_what_cannot_be_parallel_is_no_mere_detail(said):
    ((level, text),) = said(lambda: parscan.scan(opaque_step, jnp.zeros(4), XS))
    assert level == "INFO" and "custom" in text and text.startswith("Lax() for 10 steps") and "asked" not in text


def test_a_method_that_was_asked_for_and_is_not_taken_is_a_warning(said):
    ((level, text),) = said(lambda: parscan.scan(opaque_step, jnp.zeros(4), XS, method="sequential"))
    assert level == "WARNING" and "custom" in text and text.endswith("; Sequential() was asked for") and text.startswith("Lax() for 10 steps")
    layer, activations = (lambda w, h: opaque(w * h)), jnp.ones((11, 4))
    ((level, text),) = said(lambda: parscan.parallel_backward(layer, XS, activations, XS[0], method="sequential"))
    assert level == "DEBUG" and text.startswith("Sequential() for 10 steps")  # what was asked for, in JAX's own order


def test_nothing_is_printed_unless_asked_for():
    code = "import logging, parscan; logging.getLogger('parscan').error('lost'); logging.basicConfig(); logging.getLogger('parscan').error('found')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stdout and done.stderr == "ERROR:parscan:found\n"
