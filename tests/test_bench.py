"""The suites of scripts/bench.py measure what they say on a small scale, survive an interrupt, and the page made of them is current."""

from __future__ import annotations

import json
import re
import shutil
import sys

import click
import jax
import pytest
from click.testing import CliRunner
from support import ROOT

DOCS = ROOT / "docs"
TINY = {
    "bppsa": "rnn:2:3:8",
    "deer": "gru:1:2:8",
    "elementwise": "decay:1:4:8",
    "deep": "mlp:2:4:8",
    "auto": "rnn:2:3:8",
    "compile": "gru:2:2:8",
    "memory": "rnn:2:3:16",
}
QUANTITIES = {"forward", "backward", "gradient", "step"}


pytestmark = pytest.mark.usefixtures("scripts_on_path")


def settings(limit=1e8):
    from suites import Settings

    return Settings(rounds=3, limit=limit, seed=0, quick=True)


def bench(*arguments):
    from bench import main

    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture
def suite(monkeypatch):
    """Stands in for a suite: three rows, each measured by a function that the test gives."""
    import suites

    def install(measure):
        some = suites.Suite("Made up.", lambda seed: ["rnn:1:2:4", "rnn:2:2:4", "rnn:3:2:4"], lambda seed: ["rnn:1:2:4"], measure)
        monkeypatch.setitem(suites.SUITES, "compile", some)

    return install


def made_up(row="", settings=None):
    return {"auto": "Lax()", "s": {"lax": [1.0] * 3, "auto": [2.0] * 3}, "ratio": {"lax": 1.0, "auto": 2.0}}


# --- what is measured -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_row_of_a_suite_has_its_figures_and_its_line(name):
    from suites import SUITES
    from tables import table

    row = {"row": TINY[name]} | SUITES[name].measure(TINY[name], settings()) | {"seed": 0, "quick": True}
    assert row == json.loads(json.dumps(row))
    assert table(name, [row]).count("\n| ") >= 2
    if name in ("bppsa", "deer", "elementwise", "deep"):
        assert set(row["ms"]) == QUANTITIES and all({"lax", "auto"} <= set(some) for some in row["ms"].values())
        assert {"lax", "sequential", "associative", "auto"} == set(row["ms"]["gradient"]) == set(row["ms"]["backward"])
        assert row["gap"] < 1e-5 and row["unroll"] in (1, 2, 4, 8)
        assert all(low <= middle <= high for some in row["ms"].values() for middle, low, high in some.values())


def test_the_structure_suite_compares_kinds_with_full_blocks(monkeypatch):
    import bench_structure
    from suites import SUITES
    from tables import table

    monkeypatch.setattr(bench_structure, "backward_pass", lambda layer, shape, length, method, structure: (lambda: jax.numpy.ones(2), "Banded"))
    row = {"row": "Banded:9"} | SUITES["structure"].measure("Banded:9", settings())
    assert set(row["walk"]["ms"]) == {"special", "full"} and "| Banded | 9 | Banded |" in table("structure", [row])


def test_quick_rows_are_few_and_drawn_rows_many():
    from bench import SUITE_NAMES
    from suites import SUITES

    assert tuple(SUITES) == SUITE_NAMES
    assert all(set(suite.quick(0)) <= set(suite.rows(0)) and len(suite.quick(0)) <= 3 for suite in SUITES.values())
    assert len(SUITES["auto"].rows(0)) == 120 and SUITES["auto"].rows(0) != SUITES["auto"].rows(1)
    assert "rnn:256:20:30000" in SUITES["bppsa"].rows(0) and "gru:16:64:1000000" in SUITES["deer"].rows(0)
    assert "gated:1:4096:262144" in SUITES["elementwise"].rows(0) and "mlp:4:128:4096" in SUITES["deep"].rows(0)


def test_a_baseline_that_grows_faster_than_its_work_is_not_quoted(monkeypatch):
    import contest
    from tables import table

    monkeypatch.setattr(contest, "growth", lambda *_: 5.0)
    row = {"row": "rnn:1:2:4"} | contest.contest("rnn:1:2:4", contest.recurrence("rnn:1:2:4", 1e8, 0), 3, 1e8, 0)
    assert row["ratio"] == {} and "associative" not in row["ms"]["gradient"]
    assert "5.0 × the time for twice the steps, grows faster than its work" in table("bppsa", [row])


def test_the_growth_is_that_of_twice_the_steps():
    import contest

    task = contest.recurrence("rnn:1:2:9", 1e8, 0)
    assert task.length == 9 and task.halved()[2].shape == (5, 1, 4) and task.halved()[1].shape == (1, 2)
    assert len(contest.deep("mlp:2:4:8", 1e8, 0).halved()[0]["W"]) == 4


def test_a_training_step_goes_down_the_gradient():
    import contest

    task = contest.recurrence("rnn:1:2:4", 1e8, 0)
    _, (weights, start) = contest.program(task, "lax 1", "step").call()
    _, (grads, along) = contest.program(task, "auto", "gradient").call()
    moved = (task.arguments[0]["W"] - weights["W"]) / contest.RATE
    assert jax.numpy.allclose(moved, grads["W"], atol=1e-4) and jax.numpy.allclose((task.arguments[1] - start) / contest.RATE, along, atol=1e-4)


# --- what stands in the way -----------------------------------------------------------------------------------------------


def test_a_row_that_is_too_large_is_skipped_before_it_is_made():
    import contest
    from results import measured

    for build, row in ((contest.recurrence, "gated:1:4096:262144"), (contest.deep, "mlp:4:100000:100000")):
        found = measured(row, lambda build=build, row=row: build(row, 5e8, 0))
        assert found["row"] == row and "more than the 500 MB allowed" in found["skipped"] and row not in found["skipped"]


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes")])
def test_no_memory_is_one_line(error):
    from results import measured

    def measure():
        raise error

    assert measured("rnn:1:2:4", measure) == {"row": "rnn:1:2:4", "skipped": "too large: no memory"}


def test_other_errors_are_not_hidden():
    from results import measured

    with pytest.raises(ZeroDivisionError):
        measured("rnn:1:2:4", lambda: {"ms": 1 / 0})


def test_jacobians_that_do_not_fit_leave_the_associative_scan_out():
    import contest

    row = contest.contest("rnn:1:2:4", contest.recurrence("rnn:1:2:4", 1e8, 0), 3, 100, 2**31)
    assert row["notes"] and "associative: Jacobians" in row["notes"][0] and set(row["ms"]["gradient"]) == {"lax", "sequential", "auto"}


def test_gradients_that_disagree_are_skipped_and_say_so(monkeypatch, suite, tmp_path):
    def measure(row, settings):
        raise click.ClickException(f"{row}: gradients disagree, 0.5")

    suite(measure)
    done = bench("--suite", "compile", "--quick", "--json", tmp_path / "a.json")
    assert done.exit_code == 0 and "skipped rnn:1:2:4: gradients disagree, 0.5" in done.output


def test_a_missing_torch_is_one_line(monkeypatch):
    import torch_baselines
    from problems import make

    monkeypatch.setitem(sys.modules, "torch", None)
    assert torch_baselines.entrants(make("rnn:1:2:4", 0, 0), "cpu", None) == ({}, ["torch: not installed"])


# --- files of results -----------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(suite, tmp_path):
    asked, path = [], tmp_path / "one.json"

    def interrupted(row, settings):
        asked.append(row)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return made_up()

    suite(interrupted)
    done = bench("--suite", "compile", "--json", path)
    assert done.exit_code == 0 and "interrupted after 1 of 3 rows" in done.output and "| rnn 1 × 2 | 4 |" in done.output
    assert [row["row"] for row in json.loads(path.read_text())["suites"]["compile"]] == ["rnn:1:2:4"]
    done = bench("--suite", "compile", "--json", path)
    assert done.exit_code == 0 and asked == ["rnn:1:2:4", "rnn:2:2:4", "rnn:2:2:4", "rnn:3:2:4"]
    assert done.output.count("\n| rnn") == 3 and not list(tmp_path.glob("*.part"))


def test_what_was_skipped_or_measured_quickly_is_measured_again(suite, tmp_path):
    asked, path = [], tmp_path / "one.json"

    def measure(row, settings):
        asked.append(row)
        if row == "rnn:2:2:4":
            raise MemoryError
        return made_up()

    suite(measure)
    for quick in (["--quick"], ["--quick"], [], [], ["--quick"]):
        assert bench("--suite", "compile", *quick, "--json", path).exit_code == 0
    assert asked == ["rnn:1:2:4", "rnn:1:2:4", "rnn:2:2:4", "rnn:3:2:4", "rnn:2:2:4"]
    assert len(json.loads(path.read_text())["suites"]["compile"]) == 3


@pytest.mark.parametrize("text, said", [('{"where": "another machine", "suites": {}}', "another machine"), ("{", "no file of results")])
def test_a_foreign_file_is_refused_in_one_line(text, said, suite, tmp_path):
    suite(made_up)
    path = tmp_path / "foreign.json"
    path.write_text(text)
    done = bench("--suite", "compile", "--json", path)
    assert done.exit_code == 2 and said in done.output and "Traceback" not in done.output and path.read_text() == text


def test_single_rows_and_suites_are_not_mixed():
    done = bench("--suite", "bppsa", "--row", "rnn:1:2")
    assert done.exit_code == 2 and "without --suite" in done.output
    assert bench("--suite", "nothing").exit_code == 2


# --- the page -------------------------------------------------------------------------------------------------------------


def performance(*arguments):
    from performance import main

    return CliRunner().invoke(main, list(map(str, arguments)))


def test_the_page_is_what_the_results_say():
    done = performance("--check")
    assert done.exit_code == 0, done.output
    text = (DOCS / "performance.md").read_text()
    assert all((DOCS / picture).stat().st_size > 10_000 for picture in re.findall(r"!\[[^]]*\]\((.*?)\)", text))


def test_a_figure_typed_by_hand_is_found(tmp_path):
    docs = tmp_path / "docs"
    shutil.copytree(DOCS / "results", docs / "results")
    text = (DOCS / "performance.md").read_text()
    (docs / "performance.md").write_text(text)
    assert performance("--check", "--docs", docs).exit_code == 0
    (docs / "performance.md").write_text(re.sub(r"\d\.\d\d \(", "9.99 (", text, count=1))
    done = performance("--check", "--docs", docs)
    assert done.exit_code == 1 and done.output.count("\n") == 1 and "run scripts/performance.py" in done.output


def test_any_part_of_the_suites_makes_a_page(tmp_path):
    source = tmp_path / "gpu.json"
    rows = [{"row": "gru:1:2:4", "seed": 0, "quick": False} | made_up(), {"row": "gru:1:2:8", "seed": 0, "quick": False, "skipped": "too large"}]
    where = "NVIDIA H100, x86_64, jax 0.10.2, Python 3.11.7, float32"
    source.write_text(json.dumps({"where": where, "platform": "gpu", "suites": {"compile": rows}, "left": 0.123456789}))
    docs = tmp_path / "docs"
    docs.mkdir()
    assert performance("--docs", docs).exit_code == 0
    assert "On a GPU and on a TPU these suites are unmeasured." in (docs / "performance.md").read_text()
    assert performance("--keep", source, "--docs", docs).exit_code == 0
    text = (docs / "performance.md").read_text()
    assert "On a TPU these" in text and "## NVIDIA H100, jax 0.10.2" in text and "- skipped gru:1:2:8: too large" in text
    assert "Unmeasured here: bppsa" in text and "![" not in text and json.loads((docs / "results/gpu.json").read_text())["left"] == 0.1235
    source.write_text("[]")
    done = performance("--keep", source, "--docs", docs)
    assert done.exit_code == 2 and "no file of results" in done.output
