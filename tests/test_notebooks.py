"""Every notebook is stored as it was run: once, from the top. With PARSCAN_NOTEBOOKS=run in the environment each is run again, and says what it said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# In a process of its own, since nbclient leaves sockets open. The kernel is the same interpreter, whatever else is registered as "python3".
EXECUTE = """
import sys
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

path, folder, out = sys.argv[1:]
notebook = nbformat.read(path, as_version=4)
manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True))
NotebookClient(notebook, km=manager, timeout=120, coalesce_streams=True, resources={"metadata": {"path": folder}}).execute()
nbformat.write(notebook, out)
"""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def kinds(cell):
    """What a cell puts out, in order: names of streams, types of data."""
    return [output.name if output.output_type == "stream" else sorted(output.get("data", [output.output_type])) for output in cell.outputs]


def test_there_are_notebooks():
    assert NOTEBOOKS


@each_notebook
def test_is_stored_as_it_was_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run from the top, once"
    assert any(cell.outputs for cell in cells)
    assert not [cell.source for cell in cells if "error" in kinds(cell) or ["error"] in kinds(cell) or "stderr" in kinds(cell)]
    text = path.read_text()
    assert not [place for place in (str(ROOT), "/home/", "/tmp/", "/Users/") if place in text], "a path of somebody's machine"


@each_notebook
def test_answers_its_question_draws_and_ends_with_an_exercise(path):
    first, *cells, exercise, last = nbformat.read(path, as_version=4).cells
    assert re.match(r"# .+\n", first.source) and "**The answer" in first.source
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    assert re.search(r"^## .*An exercise$", exercise.source, re.MULTILINE) and last.cell_type == "code" and last.outputs


@pytest.mark.skipif(os.environ.get("PARSCAN_NOTEBOOKS") != "run", reason="takes minutes: PARSCAN_NOTEBOOKS=run python -m pytest tests/test_notebooks.py")
@each_notebook
def test_runs_and_puts_out_what_is_stored(path, tmp_path):
    stored, bare = (nbformat.read(path, as_version=4) for _ in range(2))
    for cell in code_cells(bare):
        cell.outputs, cell.execution_count = [], None
    nbformat.write(bare, tmp_path / "bare.ipynb")
    beside = set(path.parent.iterdir())
    import_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, tmp_path / "bare.ipynb", path.parent, tmp_path / "fresh.ipynb"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": import_path, "IPYTHONDIR": str(tmp_path), "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    fresh = nbformat.read(tmp_path / "fresh.ipynb", as_version=4)
    for before, after in zip(code_cells(stored), code_cells(fresh), strict=True):
        assert kinds(before) == kinds(after), f"stored and fresh output differ in kind:\n{after.source}"
    assert set(path.parent.iterdir()) == beside, "a run leaves nothing behind"
