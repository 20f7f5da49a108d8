"""Random scans beside `lax.scan`. `scripts/fuzz_scans.py` is the long version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing import FRESH, shrink_scans, tally_of_scans

from parscan import system

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "fuzz_scans.py"


@pytest.mark.parametrize("batch", range(6))
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
    def run():
        command = [sys.executable, str(SCRIPT), "--examples", "2", "--state", str(tmp_path / "state.json"), "--workers", "1"]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "JAX_PLATFORMS": "cpu"})

    first = run()
    assert first.returncode == 0, first.stderr
    assert "2 scans, 2 of them distinct" in first.stdout and "\n0 disagreements" in first.stdout
    state = json.loads((tmp_path / "state.json").read_text())
    state["chunks"]["0"]["violations"] = ["found before"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    again = run()
    assert again.returncode == 1 and "1 disagreements\nfound before" in again.stdout
