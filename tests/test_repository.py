"""What the repository says of itself is true: versions, files that texts name, what a release holds."""

from __future__ import annotations

import re
import sys
import tomllib

import pytest
from support import ROOT, run_script

import parscan

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CITATION = (ROOT / "CITATION.cff").read_text()


def test_versions_and_licence_are_the_same_everywhere():
    assert PROJECT["project"]["version"] == parscan.__version__
    assert re.findall(r"^version: (.*)$", CITATION, re.MULTILINE) == [parscan.__version__]
    assert re.findall(r"^license: (.*)$", CITATION, re.MULTILINE) == [PROJECT["project"]["license"]]
    assert f"## {parscan.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_what_is_cited_is_what_docstrings_name():
    cited = re.findall(r"^  - type: .*\n    title: \"?(.*?)\"?$", CITATION, re.MULTILINE)
    assert len(cited) == 3 and any("BPPSA" in title for title in cited)
    for key in ("cff-version: 1.2.0", "message: ", "title: ", "authors:"):
        assert re.search(f"^{key}", CITATION, re.MULTILINE)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_files_that_are_named_are_there(page):
    text = (ROOT / page).read_text()
    named = {name for name in re.findall(r"(?:`|\b)((?:parscan|scripts|tests|docs|notebooks)/[\w./-]*\w)", text)}
    linked = {name for name in re.findall(r"\]\(([^)#:]+)\)", text)}
    assert named | linked and not [name for name in sorted(named | linked) if not (ROOT / name).exists()]


def test_names_in_contributing_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name, file in (("BY_NAME", "methods"), ("sized", "methods"), ("through_one", "single"), ("KINDS", "jacobians/registry")):
        assert f"`{name}`" in text and re.search(rf"^(def )?{name}\b", (ROOT / "parscan" / f"{file}.py").read_text(), re.MULTILINE)
    for name, file in (("METHODS", "tests/support"), ("LOG_DEPTH", "tests/support"), ("CELLS", "scripts/problems"), ("SUITES", "scripts/suites")):
        assert f"`{name}`" in text and re.search(rf"^{name}\b", (ROOT / f"{file}.py").read_text(), re.MULTILINE)


def test_hooks_are_what_the_checks_run():
    hooks, run = (ROOT / ".pre-commit-config.yaml").read_text(), (ROOT / ".ci" / "run").read_text()
    assert all(f"entry: {tool}" in hooks and tool in run for tool in ("ruff check", "pyright")) and "entry: ruff format" in hooks


def test_a_report_of_a_bug_asks_for_what_the_machine_says():
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text()
    assert "`python -m parscan`" in text and "required: true" in text
    assert (ROOT / ".github" / "ISSUE_TEMPLATE" / "feature_request.yml").exists()


# --- releases: the parts that build nothing; `python scripts/check_release.py` does it all -----------------------------------------


@pytest.fixture
def check_release(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import check_release

    return check_release


METADATA = [f"parscan-0.1.0.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")]


def test_a_wheel_holds_the_package_alone(check_release):
    package = check_release.package_files()
    assert "parscan/jaxprs/__init__.py" in package and "parscan/py.typed" in package and not [name for name in package if "__pycache__" in name]
    assert check_release.strange_in_wheel([*package, *METADATA], package) == []
    more = [*package, *METADATA, "tests/support.py", "parscan/notes.txt", "parscan-0.1.0.data/scripts/x"]
    assert check_release.strange_in_wheel(more, package) == [
        f"{name} is in it" for name in ("parscan-0.1.0.data/scripts/x", "parscan/notes.txt", "tests/support.py")
    ]
    less = [name for name in [*package, *METADATA] if name not in ("parscan/py.typed", METADATA[0], METADATA[3])]
    assert check_release.strange_in_wheel(less, package) == [
        "parscan/py.typed is missing",
        "no METADATA in its metadata",
        "no licenses/LICENSE in its metadata",
    ]


def test_an_sdist_holds_what_is_needed_to_build_and_test(check_release):
    names = [f"parscan-0.1.0/{name}" for name in check_release.SOURCES]
    assert all((ROOT / name).is_file() for name in check_release.SOURCES)
    assert check_release.strange_in_sdist(names) == []
    assert check_release.strange_in_sdist([*names[1:], "parscan-0.1.0/parscan/__pycache__/scan.pyc"]) == [
        "parscan/__pycache__/scan.pyc is in it",
        "pyproject.toml is missing",
    ]


def test_the_example_that_is_run_is_readmes_first(check_release):
    assert "parscan.scan(rnn, h0, xs)" in check_release.first_example((ROOT / "README.md").read_text())
    with pytest.raises(ValueError, match="no block of Python"):
        check_release.first_example("```bash\nls\n```\n")


def test_check_release_complains_in_words(check_release, tmp_path, monkeypatch):
    from click import ClickException

    with pytest.raises(ClickException, match="/nowhere/python does not run"):
        check_release.tried("/nowhere/python", tmp_path / "parscan.whl", tmp_path)
    with pytest.raises(ClickException, match="sorry"):
        check_release._run([sys.executable, "-c", "raise SystemExit('sorry')"], tmp_path)


@pytest.mark.parametrize("script", ["check_release.py", "draw_layers.py"])
def test_help_has_real_text(script):
    done = run_script(script, "--help")
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 6
