"""Type checkers see the types of carries, outputs, states and gradients through every public function."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support import ROOT

import parscan

WRONG = """
import jax.numpy as jnp
import parscan
from jax import Array

def rnn(h: Array, x: Array) -> tuple[Array, Array]:
    return h + x, h

carried: int = parscan.scan(rnn, jnp.zeros(4), jnp.ones((10, 4)))[0]
parscan.scan(rnn, "no array", jnp.ones((10, 4)))
parscan.forward(lambda w, h: "no array", jnp.ones(10), jnp.ones(4))
parscan.parallel_backward(lambda w, h: h * w, jnp.ones(10), jnp.ones(11), 1.0).activations.nowhere
"""


def errors(path):
    pytest.importorskip("pyright")
    done = subprocess.run([sys.executable, "-m", "pyright", "--outputjson", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [(one["range"]["start"]["line"] + 1, one["message"]) for one in json.loads(done.stdout)["generalDiagnostics"] if one["severity"] == "error"]


def test_the_examples_have_the_types_they_say():
    assert errors(ROOT / "tests" / "typing_examples.py") == []


def test_what_is_wrong_is_an_error(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    assert sorted({line for line, _ in errors(tmp_path / "wrong.py")}) == [9, 10, 11, 12]


def test_the_examples_name_every_public_function():
    text = (ROOT / "tests" / "typing_examples.py").read_text()
    functions = [name for name in parscan.__all__ if callable(getattr(parscan, name)) and name[0].islower()]
    assert [name for name in functions if f"parscan.{name}(" not in text] == ["calibrate"]  # which returns a class of its own whatever is given


def test_what_is_installed_says_that_it_is_typed():
    assert (ROOT / "parscan" / "py.typed").read_text() == ""
