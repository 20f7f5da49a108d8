#!/usr/bin/env python
"""`lax.scan` and `parscan.scan` side by side, over releases of JAX and of Python.

For each release of JAX a virtual environment is made with the interpreter that goes with it, parscan and what the tests need are installed, and
all conformance cases are run, then the tests of semantics, of what is handed over, of bad input. An environment that is there already is used again.

Interpreters are looked for on PATH, then among pyenv's; `--python 3.11=/usr/bin/python3.11` names one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import click

ROOT = Path(__file__).resolve().parent.parent
RELEASES = {"0.10": "3.11", "0.11": "3.12", "0.12": "3.13"}  # of JAX, of Python
TESTS = ("tests/test_conformance.py", "tests/test_semantics.py", "tests/test_handed_over.py", "tests/test_bad_input.py")
NEEDED = ("pytest>=8", "hypothesis>=6.100")


class Row(NamedTuple):
    """What one environment showed."""

    jax: str
    python: str
    tests: str
    cases: int
    passed: int
    failed: int
    seconds: float


def interpreter(version: str, given: dict[str, str]) -> str:
    """The path of Python `version`: the one that was named, one on PATH, the newest of pyenv's."""
    found = given.get(version) or shutil.which(f"python{version}")
    if found and runs(found):  # pyenv's shims are there also where the version is not
        return found
    if version in given:
        raise click.ClickException(f"{found} is no Python that runs")
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    here = [path for path in (root / "versions").glob(f"{version}.*/bin/python") if path.exists()]
    if not here:
        raise click.ClickException(f"no Python {version}: not on PATH, not in {root / 'versions'}; give `--python {version}=PATH`")
    return str(max(here, key=lambda path: [int(n) for n in re.findall(r"\d+", path.parts[-3])]))


def runs(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def environment(home: Path, release: str, python: str) -> Path:
    """The interpreter of the environment for this release, made if it is not there."""
    inside = home / f"jax-{release}" / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", str(inside.parent.parent)], check=True)
    install = [str(inside), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-e", str(ROOT), f"jax=={release}.*", *NEEDED]
    subprocess.run(install, check=True)
    return inside


def run(inside: Path, test: str, report: Path) -> tuple[int, int, float, str]:
    """Cases, failures, seconds and output of one file of tests."""
    begun = time.perf_counter()
    command = [str(inside), "-m", "pytest", test, "-o", "addopts=", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    settings = {**os.environ, "JAX_PLATFORMS": "cpu", "PARSCAN_CONFORMANCE": "all"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if not report.exists() or done.returncode not in (0, 1):
        return 0, 1, seconds, done.stdout + done.stderr
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return counts["tests"] - counts["skipped"], counts["failures"] + counts["errors"], seconds, done.stdout


def version_of(inside: Path) -> tuple[str, str]:
    code = "import jax, platform; print(jax.__version__, platform.python_version())"
    jax, python = subprocess.run([str(inside), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return jax, python


def table(rows: list[Row]) -> str:
    lines = ["| JAX | Python | tests of | cases | passed | failed | time, s |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {r.jax} | {r.python} | {r.tests} | {r.cases} | {r.passed} | {r.failed} | {r.seconds:.0f} |" for r in rows]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--jax", "releases", multiple=True, type=click.Choice(list(RELEASES)), help="Releases of JAX; all of them if none is given.")
@click.option("--python", "pythons", multiple=True, metavar="VERSION=PATH", help="An interpreter, such as 3.11=/usr/bin/python3.11.")
@click.option(
    "--home", type=click.Path(path_type=Path), default=ROOT / "out" / "conformance", help="Where the environments are made; out/conformance if not given."
)
def main(releases: tuple[str, ...], pythons: tuple[str, ...], home: Path) -> None:
    given = {version: path for version, _, path in (one.partition("=") for one in pythons)}
    unknown = [one for one in pythons if one.partition("=")[0] not in RELEASES.values() or not one.partition("=")[2]]
    if unknown:
        raise click.UsageError(f"--python takes VERSION=PATH, VERSION being {', '.join(RELEASES.values())}; got {unknown[0]}.")
    chosen = {release: interpreter(RELEASES[release], given) for release in releases or RELEASES}
    rows = []
    for release, python in chosen.items():
        click.echo(f"JAX {release}, {python}", err=True)
        inside = environment(home, release, python)
        for test in TESTS:
            cases, failed, seconds, output = run(inside, test, home / f"jax-{release}" / f"{Path(test).stem}.xml")
            rows.append(Row(*version_of(inside), Path(test).stem.removeprefix("test_"), cases, max(cases - failed, 0), failed, seconds))
            if failed:
                click.echo(output)
    click.echo(table(rows))
    sys.exit(any(row.failed or not row.cases for row in rows))


if __name__ == "__main__":
    main()
