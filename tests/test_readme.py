"""The code of the README and of the pages in docs, and the docstrings' examples run as they are printed, and print what they show."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import parscan
from parscan import jacobians, structure

README = Path(__file__).resolve().parents[1] / "README.md"
FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)
PYTHON_LIKE = {"py", "python3", "pycon", "ipython", "{python}", "{code-cell}"}  # would be shown as code, but not run


def blocks(text: str) -> list[tuple[str, int, str]]:
    """Every fenced block: language, line before its code, code."""
    return [(m["language"].strip(), text.count("\n", 0, m.start("code")), m["code"]) for m in FENCE.finditer(text)]


def sections(text: str) -> dict[str, list[tuple[int, str]]]:
    """From `## ` heading to its Python blocks; "#" is what stands before the first."""
    fenced = {line for _, before, code in blocks(text) for line in range(before + 1, before + 1 + code.count("\n"))}
    headings = [(0, "#"), *((n, line[3:].strip()) for n, line in enumerate(text.splitlines(), 1) if line.startswith("## ") and n not in fenced)]
    found: dict[str, list[tuple[int, str]]] = {}
    for language, before, code in blocks(text):
        if language == "python":
            found.setdefault(max(heading for heading in headings if heading[0] <= before)[1], []).append((before, code))
    return found


SECTIONS = sections(README.read_text())


@pytest.fixture
def readers_settings():
    """JAX in single precision, as a reader finds it; every setting gets its value back."""
    before = dict(jax.config.values)
    jax.config.update("jax_enable_x64", False)
    yield
    for name, value in before.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)


def test_readme_has_code_and_all_of_it_is_run():
    assert SECTIONS
    assert not [language for language, _, _ in blocks(README.read_text()) if language.split(" ")[0].lower() in PYTHON_LIKE]
    assert not [language for language, _, _ in blocks(README.read_text()) if language.startswith("python") and language != "python"]


def test_headings_are_told_apart():
    titles = re.findall(r"^## (.+)$", README.read_text(), re.MULTILINE)
    assert len(titles) == len(set(titles)), "two sections of one name would share a namespace"


@pytest.mark.parametrize("section", SECTIONS)
def test_readme_section(section, tmp_path, monkeypatch, readers_settings):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for before, code in SECTIONS[section]:
        exec(compile("\n" * before + code, str(README), "exec"), namespace)


FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PAGES = [page for page in sorted(README.parent.glob("docs/**/*.md")) if sections(page.read_text())]


@pytest.fixture
def no_new_kinds():
    """Kinds that a page registers are forgotten again."""
    before = list(jacobians.KINDS)
    yield
    jacobians.KINDS[:] = before
    structure._structures.cache_clear()


def with_output(text: str) -> list[tuple[int, str, str | None]]:
    """Python blocks, each with the `text` block that stands directly below it and shows what it prints."""
    found = blocks(text)
    below = {before - 2: code for language, before, code in found if language == "text"}
    return [(before, code, below.get(before + code.count("\n") + 1)) for language, before, code in found if language == "python"]


def comparable(printed: str) -> str:
    """Without times, arithmetic and bytes, which differ from one release of JAX to the next, and without the line of a file at which something stands."""
    return re.sub(r" at \S+:\d+", " at FILE", re.sub(r"\b\d[\d.]* (ns|µs|ms|s|[kMG]?B|[kMG])\b", "NUMBER", printed))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(README.parent)))
def test_page(page, tmp_path, monkeypatch, readers_settings, no_new_kinds):
    monkeypatch.chdir(tmp_path)
    assert not [language for language, _, _ in blocks(page.read_text()) if language.split(" ")[0].lower() in PYTHON_LIKE]
    namespace = {"__name__": "__main__"}
    for before, code, printed in with_output(page.read_text()):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("\n" * before + code, str(page), "exec"), namespace)
        same = doctest.OutputChecker().check_output(comparable(printed or ""), comparable(out.getvalue()), FLAGS)
        assert printed is None or same, f"line {before}: the page shows\n{printed}\nwhere this is printed:\n{out.getvalue()}"


# --- docstrings -----------------------------------------------------------------------------------------------------------


def given() -> dict:
    """What examples may use without saying so: a scan `f, init, xs`, a chain `layer, params, activations, c`."""

    def f(h, x):
        h = jnp.tanh(0.5 * h + x)
        return h, h

    def layer(w, h):
        return jnp.tanh(w * h)

    params, x = jnp.full((16, 4), 0.5), jnp.ones(4)
    _, activations = parscan.forward(layer, params, x)
    scanned = {"f": f, "init": jnp.zeros(4), "xs": jnp.ones((16, 4))}
    return scanned | {"layer": layer, "params": params, "activations": activations, "c": jnp.ones(4), "jax": jax, "jnp": jnp, "parscan": parscan}


MODULES = ["parscan", *(module.name for module in pkgutil.walk_packages(parscan.__path__, "parscan."))]
EXAMPLES = [test for name in MODULES for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name) if test.examples]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_docstring(example, readers_settings):
    skipped = [e.source for e in example.examples if e.options.get(doctest.SKIP)]
    assert not skipped, f"an example that is not run says nothing: {skipped}"
    report: list[str] = []
    example.globs = given()
    result = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.append)
    assert result.attempted == len(example.examples)
    assert result.failed == 0, "".join(report)
