"""Random programs: no dependence is missed, and blocks are as small as they can be. `scripts/fuzz_structure.py` is the long version."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from fuzzing import tally
from oracle import Tally
from programs import RandomProgram
from support import found_before, run_script

from parscan.jaxprs import elements, moves

cached = functools.cache(tally)


def test_no_missed_dependence():
    found = cached(narrow=False, count=60, seed="suite")
    assert not found.violations
    assert len(found.primitives) >= 30


def test_block_sizes_are_those_that_jacobians_show():
    found = cached(narrow=True, count=60, seed="suite")
    assert not found.violations
    assert found.share("tight") >= 0.95
    assert found.share("dense") <= 0.5


def test_always_dense_is_not_tight(monkeypatch):
    monkeypatch.setattr(oracle, "components", lambda *args: tuple(np.zeros_like(labels) for labels in elements.components(*args)))
    assert tally(narrow=True, count=20, seed="suite").share("tight") < 0.95


MISSED = {
    "a reversal taken for nothing": (moves.MOVES, "rev", lambda eqn, arrays: [arrays[0]], lambda x: jnp.flip(x, 1)),
    "a sum taken for its last term": (elements._RULES, "cumsum", lambda graph, eqn, ins: [ins[0].nodes], lambda x: jnp.cumsum(x, 1)),
    "what may be taken ignored": (elements._RULES, "select_n", lambda graph, eqn, ins: [ins[1].nodes], lambda x: jnp.where(x > 0, x[::-1], x)),
}


@pytest.mark.parametrize("name", MISSED)
def test_a_missed_dependence_is_found(name, monkeypatch):
    table, primitive, wrong, f = MISSED[name]
    program = RandomProgram([(3, 4)], [(name, [], lambda values, constants: f(values[0]))], [1], [], narrow=False)
    right, found = Tally(narrow=False), Tally(narrow=False)
    right.add(program)
    assert not right.violations
    monkeypatch.setitem(table, primitive, wrong)
    found.add(program)
    assert any(violation.startswith("pattern") for violation in found.violations)


def test_the_script_goes_on_where_it_stopped(tmp_path):
    state = tmp_path / "state.json"
    run = lambda *arguments: run_script("fuzz_structure.py", "--examples", 3, "--state", state, *arguments)
    first = run()
    assert first.returncode == 0, first.stderr
    assert "3 programs" in first.stdout and "0 violations" in first.stdout
    found_before(state)
    again = run()
    assert again.returncode == 1 and "1 violations\n  found before" in again.stdout  # the chunk was not run again
    other = run("--seed", "1")
    assert other.returncode == 2 and "Traceback" not in other.stderr and "seed 0" in other.stderr
