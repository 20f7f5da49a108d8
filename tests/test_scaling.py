"""`scripts/scaling.py`: exponents that are known are found, FLOPs and bytes counted over all turns of a loop, a run goes on where it was."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROOT, run_script

run = functools.partial(run_script, without=("XLA_FLAGS",))
ASKED = ("--quick", "--sweep", "L", "--most-steps", 512, "--method", "sequential", "--method", "walk", "--most-bytes", 1, "--rounds", 3)


pytestmark = pytest.mark.usefixtures("scripts_on_path")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("scaling")
    done = run("scaling.py", *ASKED, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "rnn:4:8:512, walk: skipped, forms" in done.stderr and "Traceback" not in done.stderr
    return out, done.stdout


def test_everything_is_written(measured):
    out, said = measured
    results = json.loads((out / "scaling.json").read_text())["results"]
    assert list(results["points"]) == results["sweeps"]["L"] == [f"rnn:4:8:{length}" for length in (8, 32, 128, 512)]
    programs = {"forward lax", "gradient lax", "gradient sequential", "backward lax", "backward sequential"}
    assert all(set(point["seconds"]) == programs and set(point["skipped"]) == {"walk"} for point in results["points"].values())
    assert [point["depth"]["tree"] for point in results["points"].values()] == [7, 11, 15, 19]
    lines = list(csv.DictReader((out / "scaling.csv").read_text().splitlines()))
    assert len(lines) == 4 * len(programs) and all(float(line["median_s"]) > 0 < float(line["flops"]) for line in lines)
    assert all((out / f"{name}.png").stat().st_size > 10_000 for name in ("gradient_L", "speed_up_backward_L", "depth", "roofline"))
    page = (out / "scaling.html").read_text()
    assert page.count("data:image/png;base64,") == len(list(out.glob("*.png"))) == 8
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page), "the page is to open offline; letters of a picture may spell anything"
    assert "rnn:4:8:512, walk: skipped, forms" in page
    assert "2.00 … 2.00" in said and "2 a doubling" in said


def test_it_goes_on_and_refuses_what_is_another_runs(measured, tmp_path):
    kept = json.loads((measured[0] / "scaling.json").read_text())
    longest = kept["results"]["points"].popitem()[0]
    (tmp_path / "scaling.json").write_text(json.dumps(kept))
    done = run("scaling.py", *ASKED, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    now = json.loads((tmp_path / "scaling.json").read_text())["results"]
    assert longest in now["points"] and {row: now["points"][row] for row in kept["results"]["points"]} == kept["results"]["points"]
    done = run("scaling.py", *ASKED, "--seed", 1, "--out", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "give another" in " ".join(done.stderr.split())


def test_too_large_and_too_late_are_said_in_a_line(capsys):
    from scaling import run_all, too_large

    def measured(row):
        raise MemoryError("no room")

    saved, results = [], {"points": {}}
    run_all({"L": ["rnn:4:8:2"], "n": ["rnn:4:9:2"]}, results, time.perf_counter() + 60, measured, lambda: saved.append(1))
    assert results["points"]["rnn:4:8:2"]["skipped"] == {"every method": "no room"} and len(saved) == 2
    run_all({"B": ["rnn:5:8:2", "rnn:6:8:2"]}, results, time.perf_counter() - 1, measured, lambda: saved.append(1))
    said = capsys.readouterr().err
    assert "rnn:4:8:2, every method: skipped, no room" in said and "rnn:5:8:2: left out, the time is used up" in said and len(saved) == 2
    assert too_large(RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating")) == "RESOURCE_EXHAUSTED: Out of memory"
    assert too_large(RuntimeError("INTERNAL: a bug")) is None and too_large(ValueError("a shape")) is None


def test_an_interrupt_leaves_a_report(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "scaling.py", *map(str, ASKED[:-2]), "--out", tmp_path]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    until = time.monotonic() + 60
    while not (tmp_path / "scaling.json").exists() and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 0 and "Traceback" not in error and "interrupted after" in error
    assert (tmp_path / "scaling.html").exists()


def test_a_missing_device_is_said_in_a_line(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "scaling.py", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "JAX_PLATFORMS": "cuda"})
    assert done.returncode == 1 and done.stderr.startswith("Error: JAX finds no device") and done.stderr.count("\n") == 1


def test_exponents_of_power_laws_are_found():
    from scaling_report import Theory, fit, verdict

    sizes = [2.0**k for k in range(4, 12)]
    exact = fit(sizes, [3 * size**1.7 for size in sizes])
    assert exact is not None and abs(exact.slope - 1.7) < 1e-9 and exact.half < 1e-9 and (exact.least, exact.sizes) == (256, 4)
    assert [verdict(exact, Theory("", low, high)) for low, high in ((1.7, 1.7), (2, 2), (1, 1), (1, 2))] == ["agrees", "below", "above", "agrees"]
    depth = fit(sizes, [2 * np.log2(size) + 5 for size in sizes], per_doubling=True)
    assert depth is not None and abs(depth.slope - 2) < 1e-9
    assert fit(sizes[:2], [1.0, 2.0]) is None and fit(sizes, [0.0] * 8) is None


def test_the_interval_holds_the_exponent_as_often_as_it_says():
    from scaling_report import fit

    random, sizes = np.random.default_rng(0), [2.0**k for k in range(8)]
    fits = [fit(sizes, [size**1.3 * np.exp(0.2 * random.standard_normal()) for size in sizes]) for _ in range(1000)]
    held = np.mean([abs(found.slope - 1.3) <= found.half for found in fits if found is not None])
    assert 0.93 < held < 0.97


def test_a_loops_body_counts_as_often_as_it_turns():
    from hlo_costs import costs

    def step(h, x):
        return jnp.tanh(h @ x + h), h

    inputs, start = jnp.ones((12, 16, 16)), jnp.ones((4, 16))
    programs = [jax.jit(lambda h, u=u: jax.lax.scan(step, h, inputs, unroll=u)).lower(start).compile() for u in (1, 12)]
    looped, unrolled = (costs(program.as_text()) for program in programs)
    said = programs[1].cost_analysis()
    assert abs(looped.flops / (12 * 4 * 16 * (2 * 16 + 2)) - 1) < 0.01
    assert abs(unrolled.flops / (said["flops"] + said["transcendentals"]) - 1) < 0.01 and abs(unrolled.bytes / said["bytes accessed"] - 1) < 0.01
    assert 0.5 < looped.bytes / unrolled.bytes < 3
