"""Builds the wheel and the sdist, and tries them as a user would.

The wheel must hold the package, the licence and its own metadata, nothing else; the sdist what is needed to build and test. Each is installed in an empty
environment, by every interpreter that is named, with what it depends on from the package index; there README's first example is run, and
`python -m parscan --no-check`. Nothing outside of the folder `--home` is written.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("parscan/__init__.py", "parscan/__main__.py", "parscan/py.typed")
TEXTS = ("README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE")
SOURCES = ("pyproject.toml", *TEXTS, *NEEDED, "tests/conftest.py", "scripts/train.py", "examples/sensor_series.py")
UNWANTED = re.compile(r"(^|/)(__pycache__|\.git|\.venv[^/]*|out|dist|\.[a-z]+_cache)/|\.(pyc|so)$")


def strange_in_wheel(names: Iterable[str], package: Iterable[str]) -> list[str]:
    """What a wheel should not hold, and what it lacks, in words.

    Args:
        names: of the files in it. package: those of the package, as they lie in the repository, `parscan/…`.
    """
    held, wanted = set(names), {*package, *NEEDED}
    metadata = re.compile(r"parscan-[^/]+\.dist-info/(METADATA|WHEEL|RECORD|licenses/LICENSE)")
    own = {name for name in held if metadata.fullmatch(name)}
    found = [f"{name} is in it" for name in sorted(held - wanted - own)] + [f"{name} is missing" for name in sorted(wanted - held)]
    return found + [f"no {part} in its metadata" for part in ("METADATA", "licenses/LICENSE") if not any(name.endswith("/" + part) for name in own)]


def strange_in_sdist(names: Iterable[str]) -> list[str]:
    """As of a wheel; every name begins with the sdist's own folder."""
    held = {name.partition("/")[2] for name in names}
    return [f"{name} is in it" for name in sorted(held) if UNWANTED.search(name)] + [f"{name} is missing" for name in SOURCES if name not in held]


def first_example(readme: str) -> str:
    """The first block of Python in a text of Markdown.

    Raises:
        ValueError: there is none.
    """
    found = re.search(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError("README.md has no block of Python.")
    return found[1]


def package_files() -> list[str]:
    """Of the package, as they lie in the repository."""
    return [str(path.relative_to(ROOT)) for path in (ROOT / "parscan").rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def built(home: Path) -> tuple[Path, Path]:
    """The wheel and the sdist, built by `python -m build`, the wheel from the sdist."""
    for old in (*home.glob("parscan-*.whl"), *home.glob("parscan-*.tar.gz")):
        old.unlink()
    _run([sys.executable, "-m", "build", "--outdir", str(home), str(ROOT)], home)
    (wheel,), (sdist,) = home.glob("*.whl"), home.glob("*.tar.gz")
    return wheel, sdist


def tried(python: str, archive: Path, home: Path) -> None:
    """Installs an archive in an empty environment, and runs the example there, away from the repository."""
    environment = home / f"try-{'wheel' if archive.suffix == '.whl' else 'sdist'}-{re.sub(r'[^A-Za-z0-9.]+', '_', python)}"
    inside = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    _run([python, "-m", "venv", "--clear", str(environment)], home)
    _run([str(inside), "-m", "pip", "install", "-q", "--disable-pip-version-check", str(archive)], home)
    example = environment / "example.py"
    example.write_text(first_example((ROOT / "README.md").read_text()))
    _run([str(inside), "-I", str(example)], environment)
    _run([str(inside), "-I", "-m", "parscan", "--no-check"], environment)


def _run(command: list[str], within: Path) -> None:
    """A command, with nothing on the path but what it finds installed.

    Raises:
        click.ClickException: it fails; with what it said.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(command, cwd=within, env={**environment, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    except OSError as error:
        raise click.ClickException(f"{command[0]} does not run: {error.strerror}") from None
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


@click.command(help=__doc__)
@click.option("--python", "pythons", multiple=True, metavar="PATH", help="An interpreter to try them with; may be given several times. This one if not given.")
@click.option("--home", type=click.Path(path_type=Path, file_okay=False), help="Where to build; a folder that is removed afterwards if not given.")
@click.option("--no-install", is_flag=True, help="Only build, and look at what the archives hold.")
def main(pythons: tuple[str, ...], home: Path | None, no_install: bool) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        within = (home or Path(temporary)).resolve()
        within.mkdir(parents=True, exist_ok=True)
        wheel, sdist = built(within)
        with zipfile.ZipFile(wheel) as archive:
            strange = [f"{wheel.name}: {what}" for what in strange_in_wheel(archive.namelist(), package_files())]
        with tarfile.open(sdist) as archive:
            strange += [f"{sdist.name}: {what}" for what in strange_in_sdist(archive.getnames())]
        if strange:
            raise click.ClickException("\n".join(strange))
        click.echo(f"{wheel.name}, {wheel.stat().st_size / 1e3:.0f} kB, and {sdist.name}, {sdist.stat().st_size / 1e3:.0f} kB: nothing strange")
        for python in () if no_install else pythons or (sys.executable,):
            for one in (wheel, sdist):
                tried(python, one, within)
                click.echo(f"{one.name} installs and runs README's first example by {python}")


if __name__ == "__main__":
    main()
