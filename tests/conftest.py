"""Double precision is on for the whole suite: float32 cases ask for float32.

Most of the suite's time is XLA's code generation. XLA's own passes, which decide what is fused and folded, stay as they are; machine code is
not optimised any further, and where the release has an older way of emitting fusions, which takes half the time to compile, it is taken, and so
is one module of machine code for each program, where cutting it up for several threads takes a sixth longer.
The scripts are run as any user runs them, fully optimised. `XLA_FLAGS`, where it is set, takes the place of all this.

The default run, which is to take less than ten minutes on two cores, leaves out cases of the largest grids, and most of what runs scripts and pages: see
`ONE_IN`. `PARSCAN_TESTS=rest` runs what it leaves out, and `PARSCAN_TESTS=all` all.

Programs are millions of small Python objects, none of which is garbage until a test is over: the collector looks for some less often.
"""

import collections
import gc
import importlib.metadata
import os

os.environ.setdefault(  # jaxlib 0.12 does not know the others, and an unknown one ends the process
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1" * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import jax
import pytest
from support import ROOT

jax.config.update("jax_enable_x64", True)
gc.set_threshold(200_000, 20, 100)

ONE_IN = {  # so many cases is run by default
    "test_bench.py::test_a_row_of_a_suite_has_its_figures_and_its_line": 6,
    "test_cells.py": 2,
    "test_compositions.py::test_by_a_tree": 2,
    "test_compositions.py::test_each_inside_each": 3,
    "test_compositions.py::test_parallel_backward": 2,
    "test_compositions.py::test_scan_by_every_method": 2,
    "test_gradients.py::test_linear_scan": 2,
    "test_gradients.py::test_parallel_backward": 3,
    "test_memory.py::test_in_segments_derivatives_are_the_loops": 3,
    "test_memory.py": 2,
    "test_networks.py::test_grad_of_chain": 2,
    "test_networks.py::test_parallel_backward": 2,
    "test_numbers.py::test_finite_and_equal": 2,
    "test_numbers.py::test_as_one_step_after_another": 2,
    "test_numbers.py::test_linear_scan_through_growth_along_no_axis": 2,
    "test_readme.py::test_page": 6,
    "test_scaling.py": 2,
    "test_scan_fuzz.py": 2,
    "test_scripts.py::test_bench": 20,
    "test_scripts.py::test_train": 2,
}
TESTS = os.environ.get("PARSCAN_TESTS", "some")


def pytest_collection_modifyitems(config, items):
    """Which cases of a test are run by default is as if drawn, and the same in every run."""
    if TESTS == "all":
        return
    seen, parts = collections.Counter(), {"some": [], "rest": []}
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        found = next((start for start in ONE_IN if name.startswith(start)), None)
        drawn = found is None or (seen[found] * 0x9E3779B1 >> 7) % ONE_IN[found] == 0
        seen[found] += 1
        parts["some" if drawn else "rest"].append(item)
    chosen = "rest" if TESTS == "rest" else "some"
    config.hook.pytest_deselected(items=parts["some" if chosen == "rest" else "rest"])
    items[:] = parts[chosen]


@pytest.fixture
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
