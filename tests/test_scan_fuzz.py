"""Random scans beside `lax.scan`. `scripts/fuzz_scans.py` is the long version."""

from __future__ import annotations

import pytest
from fuzzing import FRESH, shrink_scans, tally_of_scans
from support import found_before, run_script

from parscan import system


@pytest.mark.parametrize("batch", range(3))
def test_like_lax_scan(batch):
    """An error shows the smallest scan that disagrees, and its step's program."""
    shrink_scans(FRESH, f"suite:{batch}")


WRONG = {
    "a cotangent of the wrong size": ("pull_inputs", lambda right: lambda *args: tuple([1.001 * c for c in some] for some in right(*args))),
    "a tangent left out": ("push_inputs", lambda right: lambda *args: [0 * v for v in right(*args)]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_derivative_is_found(name, monkeypatch):
    method, wrong = WRONG[name]
    monkeypatch.setattr(system.Linearised, method, wrong(getattr(system.Linearised, method)))
    assert tally_of_scans(5, "wrong").violations


def test_the_script_says_what_disagrees(tmp_path):
    state = tmp_path / "state.json"
    run = lambda: run_script("fuzz_scans.py", "--examples", 2, "--state", state, "--workers", 1)
    first = run()
    assert first.returncode == 0, first.stderr
    assert "2 scans, 2 of them distinct" in first.stdout and "\n0 disagreements" in first.stdout
    found_before(state)
    again = run()
    assert again.returncode == 1 and "1 disagreements\nfound before" in again.stdout
