"""What the package imports, how long that takes, and how its modules stand to one another."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "parscan").rglob("*.py"))

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def in_fresh_interpreter(code: str) -> dict:
    """Runs code whose last print is a JSON object, with nothing imported before."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # compiled once, as for any user
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_imports_only_go_down():
    """In a process of its own: the linter configures logging anew, which closes the handlers of libraries that other tests have imported."""
    code = "from importlinter import cli; raise SystemExit(cli.lint_imports(config_filename='pyproject.toml', no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_imports_no_more_than_jax_and_numpy_do():
    found = in_fresh_interpreter(
        "import json, sys\n"
        "import jax, numpy\n"
        "tops = lambda: {name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "before = tops()\n"
        "import parscan\n"
        "print(json.dumps({'new': sorted(tops() - before)}))"
    )
    assert found["new"] == ["parscan"]


def test_importing_changes_no_jax_setting():
    found = in_fresh_interpreter(
        "import json\n"
        "import jax, numpy\n"
        "before = dict(jax.config.values)\n"
        "import parscan\n"
        "after = dict(jax.config.values)\n"
        "changed = [name for name in before.keys() | after.keys() if name not in before or name not in after or before[name] != after[name]]\n"
        "print(json.dumps({'settings': len(before), 'changed': sorted(changed)}))"
    )
    assert found["settings"] > 0
    assert found["changed"] == []


def test_importing_is_quick():
    """In processor time: how busy the machine is beside is not ours."""
    timed = "import json, time\nimport jax\nbegin = time.process_time()\nimport parscan\nprint(json.dumps({'seconds': time.process_time() - begin}))"
    seconds = [in_fresh_interpreter(timed)["seconds"] for _ in range(3)]
    assert min(seconds) < 0.2, f"`import parscan` took {seconds} s of processor time on top of `import jax`"


@each_module
def test_stays_out_of_jax_internals(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        assert not any(f"{name}.".startswith("jax._src.") for name in names), f"{path.name}:{node.lineno} uses jax._src"


@each_module
def test_is_no_longer_than_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


def code_lines(function):
    """Lines of a function without its docstring."""
    documented = ast.get_docstring(function) is not None
    body = function.body[1:] if documented else function.body
    docstring = (function.body[0].end_lineno or 0) - function.body[0].lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring if body else 0


@each_module
def test_has_no_function_with_more_than_45_lines_of_code(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {node.name: lines for node in functions if (lines := code_lines(node)) > 45}
    assert not long
