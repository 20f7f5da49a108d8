"""`python -m parscan`: what it says of a machine, and that it notices a gradient that is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from support import ROOT

import parscan
from parscan import selfcheck
from parscan.__main__ import main


def run(code, tmp_path, **environment):
    """A process of its own, with an empty cache."""
    command = [sys.executable, *code]
    everything = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), **environment}
    return subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=300)


def test_says_versions_devices_and_that_there_is_no_calibration(tmp_path):
    done = run(["-m", "parscan", "--no-check"], tmp_path, XLA_FLAGS="")
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert list(lines) == ["parscan", "python", "jax", "jaxlib", "numpy", "platform", "settings", "devices", "calibration"]
    assert lines["parscan"] == parscan.__version__ and lines["jax"] == jax.__version__ and lines["devices"] == "1 × cpu (cpu)"
    assert "JAX_PLATFORMS=cpu" in lines["settings"]
    assert lines["calibration"].startswith("none") and "parscan.calibrate()" in lines["calibration"]


def test_where_there_is_no_device_that_is_said_below_the_settings_that_are_why(tmp_path):
    done = run(["-m", "parscan"], tmp_path, JAX_PLATFORMS="nowhere")
    *_, settings, devices = done.stdout.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert settings.startswith("settings    JAX_PLATFORMS=nowhere") and devices.startswith("devices     none, JAX finds no device to run on: ")


def test_gradients_agree_here(tmp_path):
    done = run(["-m", "parscan"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    count, seconds = re.findall(r"All (\d+) gradients agree, in (.*) s", done.stdout)[0]
    assert int(count) == 18 or "more were not compared" in done.stdout
    assert float(seconds) < 2 * selfcheck.BUDGET and "float32" in done.stdout


BROKEN = """
import jax, sys
from parscan import selfcheck
from parscan.__main__ import main
original = selfcheck.scan
wrong = jax.custom_jvp(lambda x: x)
wrong.defjvp(lambda primals, tangents: (primals[0], 1.01 * tangents[0]))
selfcheck.scan = lambda f, init, xs, method: original(f, wrong(init) if method == "auto" else init, xs, method=method)
selfcheck.RECURRENCES = {"elementwise": selfcheck.RECURRENCES["elementwise"]}
selfcheck.METHODS = {"auto": "auto", "sequential": "sequential"}
sys.exit(main([]))
"""


def test_a_wrong_gradient_is_said_and_told_by_the_exit_code(tmp_path):
    done = run(["-c", BROKEN], tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"The gradient of the elementwise recurrence by method='auto' does not agree: it differs by 1\.0e-02", done.stdout)
    assert "1 of 2 gradients do not agree: do not rely on these methods" in done.stdout and "All" not in done.stdout


@pytest.fixture
def one_recurrence(monkeypatch):
    monkeypatch.setattr(selfcheck, "RECURRENCES", {"elementwise": selfcheck.RECURRENCES["elementwise"]})


def test_what_raises_is_named(one_recurrence, monkeypatch, capsys):
    def scan(*args, method):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(selfcheck, "scan", scan)
    assert main([]) == 1
    said = capsys.readouterr().out
    assert said.count("raised RuntimeError: out of luck") == len(selfcheck.METHODS) and "6 of 6 gradients do not agree" in said


def test_not_a_number_does_not_agree(one_recurrence, monkeypatch):
    monkeypatch.setattr(selfcheck, "METHODS", {"auto": "auto"})
    monkeypatch.setattr(selfcheck, "scan", lambda f, init, xs, method: jax.lax.scan(f, init * jnp.nan, xs))
    assert [one.agrees for one in selfcheck.findings()] == [False]


def test_what_there_was_no_time_for_is_said(monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "findings", lambda: iter([selfcheck.Finding("GRU", "tree", 1e-8, 1e-4)]))
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "All 1 gradients agree" in said and "17 more were not compared" in said


def test_calibrations_are_said(monkeypatch, capsys, tmp_path):
    from parscan import machines

    path = tmp_path / "calibration.json"
    monkeypatch.setattr(machines, "path", lambda: path)
    machines.machine.cache_clear()
    try:
        path.write_text("{")
        assert main(["--no-check"]) == 0 and "is not read" in capsys.readouterr().out
        machines.save(machines.CPU_SINCE)
        assert main(["--no-check"]) == 0 and f"measured, in {path}" in capsys.readouterr().out
        monkeypatch.setattr(machines, "path", lambda: None)
        assert main(["--no-check"]) == 0 and "pip install 'parscan[calibrate]'" in capsys.readouterr().out
    finally:
        machines.machine.cache_clear()
