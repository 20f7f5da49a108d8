#!/usr/bin/env python
"""How exact the methods are: errors against double precision over a grid of recurrences, and recurrences at the edge of what a precision can hold.

240 problems, 4 lengths × 5 widths × 6 spectral radii × 2 precisions (tests/accuracy.py says which), each by every method: at most 3 times the sequential
pass' error is allowed in the median, at worst 10 times and 8 roundings of the gradient. Where a problem is chaotic, which its *drift* says, whole gradients
mean nothing by any method: that table stands apart. Then the recurrences of tests/finiteness.py: what is finite in `lax.scan` must be so by every method.

Writes accuracy.json and accuracy.png, errors against the spectral radius; fails if anything is more than is allowed.
"""

from __future__ import annotations

import itertools
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from chunks import settings
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
settings()  # before JAX is imported
import accuracy  # noqa: E402
import finiteness  # noqa: E402
import jax  # noqa: E402
from accuracy import CHAOTIC, DTYPES, METHODS, ORDINARY, PARALLEL, PARTS, RADII, WHOLE, Shape  # noqa: E402

Problems = Sequence[dict[str, Any]]


def shapes(quick: bool) -> list[Shape]:
    lengths, widths = (accuracy.LENGTHS[:2], accuracy.WIDTHS[1:3]) if quick else (accuracy.LENGTHS, accuracy.WIDTHS)
    return [Shape(*one) for one in itertools.product(lengths, widths, DTYPES)]


def judged(problems: Problems, methods: Sequence[str], parts: Sequence[str]) -> list[str]:
    """All violations, precision by precision; `lax.scan`'s own are in the tables, and not parscan's."""
    some = [[one for one in problems if one["dtype"] == dtype] for dtype in DTYPES]
    return [
        violation
        for these in some
        if these
        for method in methods
        if method != "lax"
        for part in parts
        for violation in accuracy.violations(these, method, part)
    ]


def table(problems: Problems, methods: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Errors in units of the sequential pass' error, in the median and at worst; how much of what is allowed is used up; what is violated."""
    lines = [f"| dtype | method | {' | '.join(parts)} | of what is allowed, at most | violations |", "|---|---|" + "---|" * (len(parts) + 2)]
    for dtype, method in itertools.product(DTYPES, methods[1:]):
        some = [one for one in problems if one["dtype"] == dtype]
        if some:
            times = [accuracy.ratios(some, method, part) for part in parts]
            most = np.nanmax([accuracy.excess(one, method, part) for one in some for part in parts])
            count = sum(len(accuracy.violations(some, method, part)) for part in parts)
            cells = [dtype, method, *[f"{np.median(some):.2f}, {max(some):.1f}" for some in times], f"{most:.0%}", str(count)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def calm(problems: Problems) -> Problems:
    return [one for one in problems if one["drift"] <= CHAOTIC]


def relative(one: dict[str, Any], method: str, part: str) -> float:
    return one["errors"][method][part] / one["norms"][part]


def chaos(problems: Problems) -> list[str]:
    """What whole gradients are worth, by drift."""
    bounds = [0, 1e-5, 1e-3, CHAOTIC, np.inf]
    lines = ["| dtype | drift | problems | " + " | ".join(WHOLE) + " |", "|---|---|---|" + "---|" * len(WHOLE)]
    for dtype, (low, high) in itertools.product(DTYPES, itertools.pairwise(bounds)):
        some = [one for one in problems if one["dtype"] == dtype and low <= one["drift"] < high]
        if some:
            errors = [f"{np.nanmedian([relative(one, method, 'whole') for one in some]):.1e}" for method in WHOLE]
            band = f"up to {high:g}" if np.isfinite(high) else f"above {low:g}"
            lines.append(f"| {dtype} | {band} | {len(some)} | " + " | ".join(errors) + " |")
    return lines


def sentences(problems: Problems) -> list[str]:
    lost = [one for one in problems if not np.isfinite(one["errors"]["sequential"]["activations"])]
    ordinary = [one for one in problems if one["radius"] <= ORDINARY]
    fell = [(one["dtype"], one["length"], one["width"], one["radius"], method) for one in problems for method in one["fell_back"]]
    needless = [some for some in fell if some[3] <= ORDINARY]
    beyond = [one for one in problems if one["drift"] > CHAOTIC]
    return [
        f"{len(problems)} problems; in {len(lost)} the sequential pass itself is not finite, and nothing is compared: "
        + str([(one["dtype"], one["length"], one["width"], one["radius"]) for one in lost]),
        f"{len(beyond)} are chaotic: their states in double precision differ by more than {CHAOTIC:.0%} of the largest state's norm",
        f"the guard took the sequential pass in {len(needless)} of {len(ordinary) * len(PARALLEL)} passes with a radius of at most {ORDINARY}, "
        f"in {len(fell) - len(needless)} of {(len(problems) - len(ordinary)) * len(PARALLEL)} others: {fell}",
    ]


def finite() -> tuple[list[str], int]:
    """A table, and how many numbers are lost."""
    lines = ["| recurrence | " + " | ".join(finiteness.METHODS) + " |", "|---|" + "---|" * len(finiteness.METHODS)]
    lost = 0
    for name in tqdm(finiteness.CASES, unit="recurrence"):
        cells = []
        for method in finiteness.METHODS:
            count = sum(finiteness.missing(name, method, mode) for mode in finiteness.MODES)
            gap = max(finiteness.gap(name, method, mode) for mode in finiteness.MODES)
            cells.append(f"{count} lost" if count else f"{gap:.0e}")
            lost += count
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines, lost


def picture(problems: Problems, path: Path) -> None:
    """Errors of the states' cotangents against the spectral radius: the median over lengths and widths, and the worst."""
    import matplotlib.pyplot as plt

    styles = dict(zip(METHODS, ["k", "C0", "C1", "C2", "C3", "C4", "0.6"], strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharex=True, layout="constrained")
    for axis, dtype in zip(axes, DTYPES, strict=True):
        axis.axhline(float(jax.numpy.finfo(dtype).eps), color="0.8", linestyle="--", zorder=0, label="machine epsilon")
        for shift, (method, color) in enumerate(styles.items()):
            some = [[relative(one, method, "activations") for one in problems if (one["dtype"], one["radius"]) == (dtype, radius)] for radius in RADII]
            places = np.arange(len(RADII)) + 0.09 * (shift - len(styles) // 2)
            median, worst = (np.array([of(errors) for errors in some]) for of in (np.nanmedian, np.nanmax))
            axis.plot(places, median, color=color, marker="o", markersize=4, linewidth=1, label=method)
            axis.plot(places, worst, color=color, marker="v", markersize=4, linestyle="none")
            axis.vlines(places, median, worst, color=color, linewidth=0.8, alpha=0.5)
        axis.set(yscale="log", title=dtype, xlabel="spectral radius of W", xticks=range(len(RADII)), xticklabels=RADII)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("error of the states' cotangents, relative to their norm")
    axes[0].legend(title="● median, ▼ worst of all lengths and widths", frameon=False, alignment="left")
    figure.savefig(path, dpi=130)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("out/accuracy"), show_default=True, help="Where to write.")
@click.option("--seed", default=0, show_default=True, help="Of all that is random.")
@click.option("--quick", is_flag=True, help="2 lengths × 2 widths, and no recurrences at the edge.")
def main(out: Path, seed: int, quick: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    begin, problems = time.monotonic(), []
    for shape in tqdm(shapes(quick), unit="shape"):
        problems += accuracy.measured(shape, RADII, seed)
    found = judged(problems, METHODS, PARTS) + judged(calm(problems), WHOLE, ["whole"])
    text = [
        "At stored states",
        *table(problems, METHODS, PARTS),
        "",
        "Whole gradients of problems that are not chaotic",
        *table(calm(problems), WHOLE, ["whole"]),
        "",
    ]
    text += ["Whole gradients: relative error in the median", *chaos(problems), "", *sentences(problems), ""]
    edge, lost = ([], 0) if quick else finite()
    text += [*edge, f"{len(found)} violations", *found, f"{lost} numbers lost", f"seed {seed}, JAX {jax.__version__}, Python {platform.python_version()}"]
    click.echo("\n".join([*text, f"{(time.monotonic() - begin) / 60:.1f} minutes"]))
    (out / "accuracy.json").write_text(json.dumps({"seed": seed, "jax": jax.__version__, "problems": problems, "violations": found, "edge": edge}, indent=1))
    picture(problems, out / "accuracy.png")
    sys.exit(bool(found or lost))


if __name__ == "__main__":
    main()
