"""The scripts do their job on a small scale, and complain in one line."""

from __future__ import annotations

import functools
import json

import pytest
from support import run_script

run = functools.partial(run_script, without=("XLA_FLAGS",))  # compiled as for any user: with none of the suite's settings for XLA


def test_train_on_real_series(tmp_path):
    done = run("train.py", "--steps", 3, "--batch", 4, "--backward", "both", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "largest difference of the loss curves" in done.stdout
    assert json.loads((tmp_path / "train.json").read_text())["comparison"]["largest_loss_difference"] < 1e-4
    assert (tmp_path / "train.png").stat().st_size > 10_000


def test_train_a_deep_network(tmp_path):
    done = run("train.py", "deep", "--steps", 3, "--layers", 12, "--batch", 8, "--backward", "both", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "largest difference of the loss curves" in done.stdout
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("deep.png", "deep_gradients.png"))
    figures = json.loads((tmp_path / "deep.json").read_text())
    assert set(figures["runs"]) == {"lax", "parscan"}
    assert figures["settings"]["layers"] == 12
    assert figures["comparison"]["largest_relative_loss_difference"] < 1e-4


@pytest.mark.parametrize("arguments", [("--steps", 0), ("--batch", 101), ("--width", -1), ("--cell", "xyz")])
def test_train_complains_in_one_line(arguments, tmp_path):
    done = run("train.py", *arguments, "--out", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert arguments[0] in done.stderr


@pytest.mark.parametrize("arguments", [("--layers", 2), ("--batch", 1438)])
def test_deep_complains_in_one_line(arguments, tmp_path):
    done = run("train.py", "deep", *arguments, "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and arguments[0] in done.stderr


def test_an_unknown_task_is_named_in_one_line():
    done = run("train.py", "wide")
    assert done.returncode == 2
    assert done.stderr == "Error: no task 'wide'; there are sequence and deep\n"


def test_help_explains_both_tasks():
    every, sequence, deep = (run("train.py", *task, "--help").stdout for task in ((), ("sequence",), ("deep",)))
    assert "power-consumption" in every and "handwritten digits" in every
    assert "--cell" in sequence and "--layers" not in sequence
    assert "--layers" in deep and "--cell" not in deep and "deep_gradients.png" in deep


def test_bench_measures_what_it_says(tmp_path):
    done = run("bench.py", "--row", "rnn:2:3", "--row", "gru:2:2", "--length", 16, "--pairs", 5, "--method", "tree", "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert [r["row"] for r in results] == ["rnn:2:3", "gru:2:2"]
    assert all(set(r["ratio"]) == {"lax", "sequential", "auto", "tree"} and r["ratio"]["lax"] == 1 for r in results)
    assert all(max(r["gap"].values()) < 1e-4 for r in results)


def test_bench_memory_measures_what_it_says(tmp_path):
    done = run("bench_memory.py", "--row", "rnn:2:3", "--length", 32, "--rounds", 3, "--json", tmp_path / "memory.json")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "memory.json").read_text())
    residuals, peak = result["residual bytes"], result["peak bytes"]
    assert residuals["Tree(segment=2)"] == residuals["Tree(segment=32)"] <= residuals["lax"]
    assert peak["Tree(segment=2)"] < peak["lax"] < peak["Tree(segment=32)"]
    assert len(result["guard"]) == 6 and done.stdout.count("\n| ") == 11


def test_bench_auto_measures_judges_and_goes_on(tmp_path):
    path = tmp_path / "auto.json"
    asked = ("--rounds", 3, "--most", 3e5, "--unroll", 1, "--unroll", 2, "--json", path)
    assert run("bench_auto.py", "--count", 1, *asked).returncode == 0
    (first,) = json.loads(path.read_text())["results"]
    assert {"lax 1", "lax 2", "sequential", "auto"} <= set(first["seconds"]) and {len(times) for times in first["seconds"].values()} == {3}
    done = run("bench_auto.py", "--count", 2, *asked)
    assert done.returncode == 0, done.stderr
    kept, second = json.loads(path.read_text())["results"]
    assert kept == first and second["row"] != first["row"]
    assert "2 problems" in done.stdout and "within 1.25" in done.stdout
    for file, said in ((path, "seed 0"), (tmp_path / "broken.json", "no file of results")):
        (tmp_path / "broken.json").write_text("{")
        done = run("bench_auto.py", "--seed", 1, "--json", file)
        assert done.returncode == 2 and "Traceback" not in done.stderr and said in " ".join(done.stderr.split())


def test_bench_auto_calls_lost_what_is_behind_beyond_the_spread(scripts_on_path):
    from bench_auto import judged

    row = {"row": "rnn:4:8:1000", "auto": "Walk()", "reason": ""}
    behind = judged({**row, "seconds": {"lax 1": [4.0] * 4, "lax 2": [2.0] * 4, "sequential": [1.0] * 4, "auto": [1.2] * 4}})
    assert (behind["lost"], behind["base"], behind["coordinates"]) == (True, "sequential", 32)
    assert abs(behind["gain"] - 4 / 1.2) < 1e-9 and abs(behind["own"] - 1.2) < 1e-9
    assert not judged({**row, "seconds": {"lax 1": [4.0] * 4, "sequential": [1.0] * 4, "auto": [1.0, 1.0, 1.3, 1.3]}})["lost"]
    unrolled = judged({**row, "seconds": {"lax 1": [2.0] * 4, "lax 4": [1.0] * 4, "sequential": [3.0] * 4, "auto": [2.0] * 4}})
    assert (unrolled["lost"], unrolled["base"], unrolled["own"]) == (True, "lax 4", 1.0)


def test_problems_are_drawn_from_the_seed(scripts_on_path):
    from problems import CELLS, draw, parse

    rows = draw(3, 150)
    assert rows == draw(3, 150) != draw(4, 150)
    assert len(set(rows)) == 150 and {parse(row, 0)[0] for row in rows} == set(CELLS)


def test_bench_complains_in_one_line():
    done = run("bench.py", "--row", "pairs:2:3")
    assert done.returncode == 2 and "even in number" in done.stderr
    done = run("bench.py", "--row", "lstm:2")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "CELL:B:N" in done.stderr


def test_conformance_complains_in_one_line(tmp_path):
    done = run("conformance.py", "--python", "3.9=python", "--home", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "VERSION=PATH" in done.stderr
    done = run("conformance.py", "--jax", "0.12", "--python", "3.13=/nowhere/python", "--home", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "/nowhere/python" in done.stderr


@pytest.mark.parametrize(
    "script", ["train.py", "bench.py", "draw_tree.py", "conformance.py", "accuracy.py", "bench_memory.py", "bench_auto.py", "scaling.py", "performance.py"]
)
def test_help_has_real_text(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 6


def test_the_picture_is_drawn_from_the_schedule(tmp_path):
    done = run("draw_tree.py", "--out", tmp_path / "tree.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tree.png").stat().st_size > 10_000
