"""The methods are as exact as the sequential pass, and what says so would say if they were not. The whole grid: `scripts/accuracy.py`."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accuracy import CHAOTIC, METHODS, ORDINARY, PARTS, RADII, WHOLE, Shape, backward, measured, violations
from click.testing import CliRunner
from support import ROOT

import parscan
from parscan import guard, single
from parscan.jacobians import Dense

SHAPES = [Shape(37, 4, "float32"), Shape(37, 3, "bfloat16")]


@functools.cache
def problems(shape):
    return measured(shape, RADII)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.dtype)
def test_as_exact_as_the_sequential_pass(shape):
    some = problems(shape)
    assert all(np.isfinite(one["errors"]["sequential"]["activations"]) and one["drift"] < CHAOTIC for one in some)
    assert not [violation for method in METHODS for part in PARTS for violation in violations(some, method, part)]
    assert not [violation for method in WHOLE for violation in violations(some, method, "whole")]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.dtype)
def test_no_guard_finds_anything_in_an_ordinary_recurrence(shape):
    assert not any(one["fell_back"] for one in problems(shape) if one["radius"] <= ORDINARY)


def test_a_guard_that_finds_something_is_seen(monkeypatch):
    monkeypatch.setattr(guard, "is_sound", lambda *_: jnp.zeros((), bool))
    assert [one["fell_back"] for one in measured(SHAPES[0], RADII[:1], methods=("sequential", "walk"), whole_by=())] == [["walk"]]


def test_products_in_half_precision_are_told(monkeypatch):
    half = lambda self, first: Dense(jnp.matmul(self.matrix.astype(jnp.bfloat16), first.matrix.astype(jnp.bfloat16)).astype(self.matrix.dtype))
    monkeypatch.setattr(Dense, "after", half)
    monkeypatch.setattr(single, "joins_by_loops", lambda maps: False)  # by loops, chains as short as these take no product
    methods = {name: jax.jit(backward(by)) for name, by in (("sequential", "sequential"), ("tree", parscan.Tree(guard=False)))}
    poor = measured(SHAPES[0], RADII, methods=methods, whole_by=())
    assert all("times the sequential error in the median" in violations(poor, "tree", part)[-1] for part in PARTS)
    assert all(len(violations(poor, "tree", part)) > 1 for part in PARTS)


def test_what_is_not_finite_is_a_violation():
    good = {"length": 1, "width": 1, "dtype": "float32", "radius": 1.0, "norms": {"input": 1.0}, "errors": {"sequential": {"input": 1e-7}}}
    assert violations([good], "sequential", "input") == []
    good["errors"]["tree"] = {"input": np.nan}
    assert len(violations([good], "tree", "input")) == 2


def test_chaos_is_told_by_the_drift_and_leaves_the_backward_pass_exact():
    """The whole gradient is wrong in its first digit by JAX's own loop; at the stored states there is nothing wrong."""
    (one,) = measured(Shape(101, 5, "float32"), RADII[-1:], methods=("sequential", "walk", "lax"), whole_by=("sequential", "lax"))
    assert one["drift"] > CHAOTIC
    assert all(one["errors"][method]["whole"] > CHAOTIC * one["norms"]["whole"] for method in ("sequential", "lax"))
    assert not [violation for part in PARTS for violation in violations([one], "walk", part)]
    assert one["errors"]["walk"]["activations"] < 1e-2 * one["norms"]["activations"]


# --- the script ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    """`scripts/accuracy.py`, its grid being that of these tests."""
    monkeypatch.setenv("JAX_ENABLE_X64", "1")  # it sets this itself; here it is taken back
    monkeypatch.syspath_prepend(ROOT / "scripts")
    spec = importlib.util.spec_from_file_location("accuracy_script", ROOT / "scripts" / "accuracy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "shapes", lambda quick: SHAPES)
    monkeypatch.setattr(module.accuracy, "measured", lambda shape, radii, seed: problems(shape))
    return module


def test_the_script_reports_and_draws(script, tmp_path):
    done = CliRunner().invoke(script.main, ["--quick", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "| bfloat16 | tree | " in done.output and "0 violations" in done.output
    assert len(json.loads((tmp_path / "accuracy.json").read_text())["problems"]) == len(SHAPES) * len(RADII)
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_the_script_fails_where_a_method_is_poor(script, tmp_path, monkeypatch):
    poor = {shape: copy.deepcopy(problems(shape)) for shape in SHAPES}
    for one in poor[SHAPES[0]]:
        one["errors"]["tree"]["input"] = 1e-3 * one["norms"]["input"]
    monkeypatch.setattr(script.accuracy, "measured", lambda shape, radii, seed: poor[shape])
    done = CliRunner().invoke(script.main, ["--quick", "--out", str(tmp_path)])
    assert done.exit_code == 1 and f"{len(RADII) + 1} violations" in done.output
