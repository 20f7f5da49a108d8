"""`calibrate`: what it measures, fits and keeps, and what becomes of a file that it did not write."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, fields, replace
from pathlib import Path

import numpy as np
import pytest

import parscan
from parscan import calibrating, machines
from parscan.machines import Machine

RANDOM = np.random.default_rng(0)
NAMES = [field.name for field in fields(Machine)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of its own."""
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    machines.machine.cache_clear()
    yield tmp_path / "parscan"
    machines.machine.cache_clear()


def test_a_machine_is_found_from_the_times_it_takes():
    """The terms that the times depend on, to a few per cent; within noise; one measurement that is off by ten changes little."""
    truth = replace(machines.CPU_SINCE, call=3000.0, element=1.0, level=20.0)
    terms = 10 ** RANDOM.uniform(0, 6, (200, len(NAMES)))
    seconds = terms @ np.array(astuple(truth)) * np.exp(0.05 * RANDOM.standard_normal(200))
    seconds[7] *= 10
    found = calibrating.fitted(terms, seconds, machines.CPU_SINCE)
    told = terms @ np.array(astuple(found))
    assert np.median(np.abs(np.log(told / seconds))) < 0.08
    assert found.call == pytest.approx(truth.call, rel=0.15)


def test_what_no_measurement_tells_stays_in_proportion_to_the_default():
    terms = np.zeros((20, len(NAMES)))
    terms[:, NAMES.index("call")] = 10 ** RANDOM.uniform(3, 5, 20)
    seconds = terms @ np.array(astuple(machines.CPU_SINCE)) / 3
    found = calibrating.fitted(terms, seconds, machines.CPU_SINCE)
    assert np.array(astuple(found)) == pytest.approx(np.array(astuple(machines.CPU_SINCE)) / 3, rel=1e-3)


def test_what_is_measured_is_kept_and_read(cache, monkeypatch):
    assert parscan.calibration() is None and machines.machine("cpu") == machines.default("cpu")
    monkeypatch.setattr(calibrating, "SAMPLES", calibrating.SAMPLES[1:3])
    found = parscan.calibrate(progress=True)
    assert isinstance(found, parscan.Measured) and found.told.shape == found.seconds.shape == (6,) and (found.seconds > 0).all()
    assert np.mean(np.abs(np.log(found.told / found.seconds))) < 1
    assert parscan.calibration() == found.machine == machines.machine("cpu")
    (file,) = cache.iterdir()
    kept = json.loads(file.read_text())
    assert kept["of"] == machines.identity() and set(kept["of"]) == {"platform", "device", "jax", "parscan"}
    assert machines.machine("tpu") == machines.default("tpu")  # another platform's plans keep their default


def test_plans_follow_what_was_measured():
    plan = lambda: parscan.plan(lambda h, x: (h * x, None), np.zeros((4, 8), "float32"), np.zeros((100, 4, 8), "float32")).seconds["Lax"]
    before = plan()
    machines.save(Machine(*(10 * value for value in astuple(machines.default("cpu")))))
    assert plan() == pytest.approx(10 * before)


def test_nothing_is_kept_unless_asked_for(cache):
    assert parscan.calibrate(progress=False, save=False, budget=1e-3).seconds.size == 3 and not cache.exists()


VALID = {"of": None, "nanoseconds": dict.fromkeys(NAMES, 1.0)}
SAID = r"calibration in .* is not read: .*Defaults are used; `parscan.calibrate\(\)` measures again"
FOREIGN = {
    "not JSON": lambda of: "{",
    "a list": lambda of: "[]",
    "no times": lambda of: json.dumps({"of": of}),
    "another device": lambda of: json.dumps({**VALID, "of": {**of, "device": "another"}}),
    "another version": lambda of: json.dumps({**VALID, "of": {**of, "jax": "0.1"}}),
    "nested too deep": lambda of: "[" * 200_000,
    "a time is too large": lambda of: json.dumps({"of": of, "nanoseconds": {**VALID["nanoseconds"], "call": 10**400}}),
    "a time is missing": lambda of: json.dumps({"of": of, "nanoseconds": {"start": 1.0}}),
    "a time is no number": lambda of: json.dumps({"of": of, "nanoseconds": {**VALID["nanoseconds"], "call": "fast"}}),
    "a time is negative": lambda of: json.dumps({"of": of, "nanoseconds": {**VALID["nanoseconds"], "call": -1.0}}),
    "a time is not finite": lambda of: json.dumps({"of": of, "nanoseconds": {**VALID["nanoseconds"], "call": float("nan")}}),
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_not_read_and_said_so(text, caplog):
    file = machines.save(machines.default("cpu"))
    file.write_text(text(machines.identity()))
    machines.machine.cache_clear()
    with pytest.warns(UserWarning, match=SAID):
        assert parscan.calibration() is None
    with caplog.at_level("WARNING", "parscan"):
        assert machines.machine("cpu") == machines.default("cpu")  # no warning, which the user may have made an error
    assert re.search(SAID, caplog.text)


def test_a_folder_that_may_not_be_searched_is_no_calibration(monkeypatch, caplog):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", denied)
    assert machines.machine("cpu") == machines.default("cpu") and "Permission denied" in caplog.text


def test_where_nothing_can_be_kept_it_is_said_before_measuring(cache, monkeypatch):
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr(calibrating, "_measured", lambda sample: pytest.fail("measured"))
    with pytest.raises(OSError, match=r"`parscan.calibrate\(save=True\)` cannot write to .*: make it writable, or pass `save=False`"):
        parscan.calibrate(progress=False)


def test_processes_that_save_at_once_do_not_disturb_one_another():
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: machines.save(machines.default("cpu")), range(100)))
    assert machines.load() == machines.default("cpu")
    assert len(list(machines.folder().iterdir())) == 1


def test_the_budget_is_positive():
    with pytest.raises(ValueError, match=r"`calibrate\(budget=...\)` must be a positive number of seconds; got 0"):
        parscan.calibrate(budget=0)


@pytest.mark.parametrize("missing, arguments", [("platformdirs", {}), ("tqdm.auto", {"save": False, "progress": True})])
def test_without_the_extra_it_is_said_what_to_install(missing, arguments, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'parscan\[calibrate\]'"):
        parscan.calibrate(**arguments)
    assert machines.machine("cpu") == machines.default("cpu")
