"""What a machine takes for the work that a gradient is made of: defaults by platform, and what `calibrate` has measured on this one."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import platform as host
import tempfile
import warnings
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

import jax

logger = logging.getLogger("parscan")

FUSES_LOOPS = jax.__version_info__ >= (0, 12)  # whether XLA makes one kernel of the body of any loop on a CPU that multiplies no matrices


@dataclass(frozen=True)
class Machine:
    """What one of each takes, in nanoseconds.

    Attributes:
        start: a call of a compiled program.
        fused: a step of a loop that the compiler makes one kernel of; on a CPU alone.
        call, kernel, slot: in a step of any other loop, a product of matrices, any other kernel, and an array that is read from, or written to, one that
            holds all steps: its launch, its arguments, its result.
        product, element, function: inside of a loop, a floating-point operation of a matrix product, an entry computed by arithmetic, and one by a
            transcendental function.
        kept: an entry of an array that holds all steps, read or written by a loop.
        all_call, all_kept, all_product, all_element, all_function: as above, where all steps are computed at once.
        launch: a kernel over all steps, or over those of a segment; on a CPU.
        fresh: a byte of memory that the system hands out anew at every call, a page at a time; on a CPU alone.
        level: an operation on explicit Jacobians that waits for another: a step of a walk, a level of a tree.
        entry: a multiply-add of explicit Jacobians.

    Example:
        >>> parscan.calibrate(progress=False, save=False, budget=0.1).machine
        Machine(start=..., fused=..., ...)
    """

    start: float
    fused: float
    call: float
    kernel: float
    slot: float
    product: float
    element: float
    function: float
    kept: float
    all_call: float
    all_kept: float
    all_product: float
    all_element: float
    all_function: float
    launch: float
    fresh: float
    level: float
    entry: float


# Fitted, in logarithms, to the times of 120 recurrences (since JAX 0.12: of 70) by `lax`, `sequential`, whole and in segments, and `walk`, on 2 cores of
# a Xeon: `draw` in `scripts/problems.py`, seed 4. Another machine may well be three times as fast in all: what is chosen follows from their ratios.
CPU_BEFORE = Machine(
    start=1400, fused=12, call=410, kernel=62, slot=16,
    product=0.014, element=0.22, function=2.4, kept=0.0021,
    all_call=30, all_kept=0.012, all_product=2e-5, all_element=0.065, all_function=1.2, launch=1400, fresh=0.3, level=170, entry=1.3,
)  # fmt: skip  # JAX 0.10.2
CPU_SINCE = Machine(
    start=18000, fused=17, call=440, kernel=68, slot=0.21,
    product=0.018, element=0.21, function=3.2, kept=0.02,
    all_call=46, all_kept=0.0064, all_product=5e-5, all_element=0.12, all_function=0.9, launch=1200, fresh=0.39, level=245, entry=1.5,
)  # fmt: skip  # JAX 0.12.0.1

# Fitted to the 21 whole gradients on an H100 of docs/explanation/choosing.md (JAX 0.11.2, `lax`, `sequential`, `Chunked`): within a factor of 2 of each.
# No more than the order of magnitude of what waits there: a kernel, a product, a level. What computes hardly shows in those times.
GPU = Machine(
    start=2.0e5, fused=8100, call=1800, kernel=3500, slot=300,
    product=8e-6, element=8e-4, function=8e-4, kept=8e-4,
    all_call=0.8, all_kept=0.009, all_product=1.2e-5, all_element=1.8e-3, all_function=8e-4, launch=1e-3, fresh=1e-9, level=34000, entry=8e-6,
)  # fmt: skip
TPU = GPU  # a guess: nobody has measured one


def default(platform: str) -> Machine:
    """Of `"cpu"`, `"gpu"`, `"tpu"`; of any other, an accelerator's."""
    if platform == "cpu":
        return CPU_SINCE if FUSES_LOOPS else CPU_BEFORE
    return TPU if platform == "tpu" else GPU


@functools.cache
def machine(platform: str) -> Machine:
    """What plans use: what `calibrate` has measured on JAX's default device, if that is of this platform; else the default. Read once in a process.

    A file that cannot be read is said in the log alone: whatever the user makes of warnings, a plan must be made.
    """
    if platform != jax.default_backend():
        return default(platform)
    found, problem = _read()
    if problem:
        logger.warning(problem)
    return found or default(platform)


# --- the cache --------------------------------------------------------------------------------------------------------------


def identity() -> dict[str, str]:
    """What a calibration holds for: the device, its platform, and the versions that compile for it. JAX has one name for all CPUs."""
    device = jax.devices()[0]
    kind = f"{host.machine()}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    try:
        version = metadata.version("parscan")
    except metadata.PackageNotFoundError:  # not installed, but on the path
        version = "source"
    return {"platform": device.platform, "device": kind, "jax": jax.__version__, "parscan": version}


def path() -> Path | None:
    """The file of this machine's calibration, where the platform's conventions put caches; None without `platformdirs`."""
    try:
        from platformdirs import user_cache_path
    except ImportError:
        return None
    name = "-".join("".join(c if c.isalnum() or c == "." else "_" for c in part) for part in identity().values())
    return user_cache_path("parscan") / f"calibration-{name}.json"


def _read() -> tuple[Machine | None, str]:
    """The machine in the cache, if there is one; and why the file that is there is not read, if it is not."""
    file = None
    try:
        file = path()
        if file is None or not file.is_file():
            return None, ""
        found = json.loads(file.read_text())
        if found["of"] != identity():
            raise ValueError(f"it is of {found['of']}")
        values = {name: float(found["nanoseconds"][name]) for name in (one.name for one in fields(Machine))}
        if not all(math.isfinite(value) and value > 0 for value in values.values()):
            raise ValueError("not all of its times are positive numbers")
        return Machine(**values), ""
    except Exception as error:  # whatever lies there
        return None, f"The calibration in {file or 'the cache'} is not read: {error!r:.200}. Defaults are used; `parscan.calibrate()` measures again."


def load() -> Machine | None:
    """The machine in the cache; None if there is none, or, with a warning, if the file is not what `save` writes for this device and these versions."""
    found, problem = _read()
    if problem:
        warnings.warn(problem, stacklevel=3)
    return found


def folder() -> Path:
    """Where calibrations are kept, made if need be.

    Raises:
        ImportError: there is no `platformdirs`. OSError: it cannot be written to.
    """
    file = path()
    if file is None:
        raise ImportError("`parscan.calibrate(save=True)` needs `platformdirs` to say where caches lie: `pip install 'parscan[calibrate]'`.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            return file.parent
    except OSError as error:
        raise OSError(f"`parscan.calibrate(save=True)` cannot write to {file.parent} ({error.strerror}): make it writable, or pass `save=False`.") from None


def save(found: Machine) -> Path:
    """Written beside and moved, so that no other process reads half a file."""
    within, file = folder(), path()
    assert file is not None
    with tempfile.NamedTemporaryFile("w", dir=within, suffix=".part", delete=False) as beside:
        json.dump({"of": identity(), "nanoseconds": asdict(found)}, beside, indent=1)
    Path(beside.name).replace(file)
    machine.cache_clear()
    return file
