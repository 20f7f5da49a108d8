"""`python -m parscan`: versions, devices, the calibration, and whether gradients agree on this machine; what a report of a bug should begin with."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence

import jax
import jaxlib
import numpy as np

import parscan
from parscan import machines, selfcheck

SETTINGS = ("JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DISABLE_JIT", "JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS")  # shown if they are set


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints all that, and checks gradients unless told not to.

    Args:
        arguments: of the command line; those of this process if not given.

    Returns:
        0, or 1 if a gradient does not agree or there is no device.

    Example:
        >>> from parscan.__main__ import main
        >>> main(["--no-check"])
        parscan     ...
        calibration ...
        0
    """
    parser = argparse.ArgumentParser("python -m parscan", description=f"Prints {(__doc__ or '').partition(':')[2].partition(';')[0].strip()}.")
    parser.add_argument("--no-check", action="store_true", help=f"leave out the gradients, which take up to {selfcheck.BUDGET:.0f} seconds or so")
    parsed = parser.parse_args(arguments)
    for label, text in _versions():
        print(f"{label:12}{text}")
    try:
        kinds = [f"{device.platform} ({device.device_kind})" for device in jax.devices()]
    except (RuntimeError, AssertionError) as error:  # JAX fails so where JAX_PLATFORMS names what is not there
        print(f"{'devices':12}none, JAX finds no device to run on: {type(error).__name__} {error}".rstrip())
        return 1
    print(f"{'devices':12}" + ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)))
    print(f"{'calibration':12}{_calibration()}")
    return 0 if parsed.no_check else _checked()


def _versions() -> Iterator[tuple[str, str]]:
    yield "parscan", parscan.__version__
    yield "python", f"{platform.python_version()}, {platform.python_implementation()}"
    yield "jax", jax.__version__
    yield "jaxlib", jaxlib.__version__
    yield "numpy", np.__version__
    yield "platform", f"{platform.platform()}, {os.cpu_count()} CPUs"
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    if settings:
        yield "settings", " ".join(settings)


def _calibration() -> str:
    """Which times plans use."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = parscan.calibration()
    if found is not None:
        return f"measured, in {machines.path()}"
    if said:
        return str(said[0].message)
    needed = "" if machines.path() else ", after `pip install 'parscan[calibrate]'`"
    return f"none, plans use defaults; `parscan.calibrate()` in Python measures this machine, in half a minute{needed}"


def _checked() -> int:
    """Prints how far gradients are from JAX's as they are found, a line for each recurrence; and in words what that means."""
    dtype = jax.numpy.zeros(()).dtype.name
    print(f"\nGradients beside those of jax.grad(jax.lax.scan): norm-relative differences, {dtype}, at most {selfcheck.TOLERANCE[dtype]:.0e}\n")
    print(f"{'':12}" + "".join(f"{name:>12}" for name in selfcheck.RECURRENCES), end="")
    begun, found, row = time.perf_counter(), [], ""
    for one in selfcheck.findings():
        if one.method != row:
            print(f"\n{one.method:12}", end="")
        print(f"{'raised' if one.problem else f'{one.gap:.0e}' + ('' if one.agrees else ' !'):>12}", end="", flush=True)
        found, row = [*found, one], one.method
    print("\n")
    wrong, left = [one for one in found if not one.agrees], len(selfcheck.RECURRENCES) * len(selfcheck.METHODS) - len(found)
    for one in wrong:
        what = f"raised {one.problem}" if one.problem else f"differs by {one.gap:.1e}, where {one.tolerance:.0e} would be rounding"
        print(f"The gradient of the {one.recurrence} recurrence by method={one.method!r} does not agree: it {what}.")
    if not wrong:
        print(f"All {len(found)} gradients agree, in {time.perf_counter() - begun:.1f} s." if found else "No gradient was compared.")
    if left:
        print(f"{left} more were not compared: {selfcheck.BUDGET:.0f} s were over.")
    if wrong:
        print(f"{len(wrong)} of {len(found)} gradients do not agree: do not rely on these methods on this machine, and please report all of the above.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
