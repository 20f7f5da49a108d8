"""Type checkers see the types of carries, outputs, states and gradients through every public function."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from beartype import beartype
from jaxtyping import Array, Float, TypeCheckError, jaxtyped
from support import ROOT, assert_close

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


# --- checked at run time: by whoever decorates steps and layers, by shape --------------------------------------------------

checked = jaxtyped(typechecker=beartype)
Scalar, Vector, Batch, Matrix = (Float[Array, shape] for shape in ("", "n", "b n", "n n"))
Scalars, Vectors = Float[Array, "t"], Float[Array, "t n"]


@checked
def step(h: Vector, x: Vector) -> tuple[Vector, Scalar]:
    h = jnp.tanh(0.5 * h + x)
    return h, h.sum()


@checked
def layer(w: Matrix, h: Batch) -> Batch:
    return h + jnp.tanh(h @ w)


@pytest.mark.parametrize("method", ["auto", "tree"])
def test_steps_and_layers_may_be_checked_at_run_time(method):
    @checked
    def run(h: Vector, xs: Vectors, method: str) -> tuple[Vector, Scalars]:
        return beartype(parscan.scan)(step, h, xs, method=method)

    gradients = [jax.jit(jax.grad(lambda h, by=by: run(h, jnp.ones((9, 2)), by)[1].sum()))(jnp.zeros(2)) for by in (method, "lax")]
    assert_close(*gradients, 1e-10)
    weights = jnp.full((5, 2, 2), 0.1)
    y, activations = beartype(parscan.forward)(layer, weights, jnp.ones((3, 2)), method=method)
    grads = beartype(parscan.parallel_backward)(layer, weights, activations, y, method=method)
    assert_close(grads.params, jax.grad(lambda w: (beartype(parscan.chain)(layer, method=method)(w, jnp.ones((3, 2))) ** 2).sum() / 2)(weights), 1e-10)


def test_a_shape_that_is_wrong_is_told_in_the_checkers_words():
    with pytest.raises(TypeCheckError, match=r"parameters of .*step"):
        parscan.scan(step, jnp.zeros(2), jnp.ones((9, 3)), method="tree")


def test_completion_offers_what_is_public():
    assert set(dir(parscan)) == {*parscan.__all__, "__version__"}
