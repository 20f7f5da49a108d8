"""What `scaling.py` has measured, fitted and shown: exponents beside the theory's, figures, a table for other programs, one page that holds all."""

from __future__ import annotations

import base64
import csv
import html
import itertools
import re
import string
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from problems import parse

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

AXES = {"L": "steps L", "n": "width n", "B": "batch B"}
TIMES = ("forward", "backward", "gradient")
QUANTITIES = (*TIMES, "memory", "first call", "FLOPs", "depth")
DRAWN = {  # by what is measured: words, unit
    "gradient": ("time of the whole gradient", "s"),
    "backward": ("time of the backward pass", "s"),
    "speed-up gradient": ("speed-up of the whole gradient (×)", "×"),
    "speed-up backward": ("speed-up of the backward pass (×)", "×"),
    "memory": ("temporary memory of the gradient", "B"),
    "first call": ("first call of the gradient, once (s)", "s"),
}
STYLES = {  # Okabe and Ito's colours, told apart by markers and lines as well
    "lax": ("#000000", "o", "-"),
    "sequential": ("#E69F00", "s", "--"),
    "auto": ("#0072B2", "D", "-"),
    "walk": ("#009E73", "^", "-."),
    "chunked": ("#CC79A7", "v", ":"),
    "tree": ("#D55E00", "P", (0, (5, 1, 1, 1, 1, 1))),
}
LOGARITHMIC = ("tree", "chunked")
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 % quantiles for 1 to 10 degrees of freedom
SLACK = 0.05  # how far an interval may be from the theory's and still agree: constants that fade are no noise
WIDE = 0.5  # half an interval beyond which it tells too little
FONT: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "savefig.dpi": 220,
    "legend.fontsize": 7.5,
}


class Fit(NamedTuple):
    """A slope and half its 95 % interval, over the sizes from `least` on."""

    slope: float
    half: float
    least: float
    sizes: int


class Theory(NamedTuple):
    """In words, and the slopes that it allows."""

    words: str
    low: float
    high: float


def fit(sizes: Sequence[float], values: Sequence[float], *, per_doubling: bool = False) -> Fit | None:
    """Exponent of values in sizes, over the upper half, four if there are; or what a doubling adds. None: fewer than three, or not positive."""
    points = sorted(zip(sizes, values, strict=True))
    points = points[-max(4, -(-len(points) // 2)) :]
    if len(points) < 3 or min(value for _, value in points) <= 0:
        return None
    x, y = (np.log2(column) for column in zip(*points, strict=True))
    y = 2**y if per_doubling else y
    around = x - x.mean()
    slope = float(around @ y / (around @ around))
    rest = y - y.mean() - slope * around
    error = float(np.sqrt(rest @ rest / (len(points) - 2) / (around @ around)))
    return Fit(slope, STUDENT[min(len(points) - 2, len(STUDENT)) - 1] * error, points[0][0], len(points))


def theory(quantity: str, axis: str, method: str, *, cpu: bool, mixes: bool, start: float = 2) -> Theory:
    """What is expected for large sizes; `start` is where the fit begins, `mixes` whether a step's Jacobian has n² entries a batch element."""
    loop = method in ("lax", "sequential")
    if quantity == "depth":
        return Theory("2 a doubling", 2, 2) if method in LOGARITHMIC else Theory("1", 1, 1)
    if quantity == "first call":
        if axis == "L" and method in LOGARITHMIC:
            return Theory("logarithmic", 0, 1 / np.log(start))  # the local exponent of a + b log L is at most that
        return Theory("0", 0, 0)
    if quantity == "memory":
        high, low = 1 if axis != "n" or not mixes or loop else 2, 0 if method == "walk" else 1  # walk's segments keep to a size
    else:
        high = 1 if axis != "n" or not mixes else 2 if loop else 3
        least = 2 if high == 3 and method == "walk" else high  # to form is n² where XLA sees that what is pushed through is the identity
        low = 0 if quantity in TIMES and not cpu and (axis != "L" or method in LOGARITHMIC) else least
    return Theory(f"{high}" if low == high else f"{low} to {high}", low, high)


def samples(point: dict[str, Any], quantity: str, method: str) -> list[float]:
    """A figure of a problem: of every round for times and speed-ups, else one; none where it was not measured."""
    times, what = point.get("seconds", {}), quantity.removeprefix("speed-up ")
    if what != quantity:
        return list(np.array(times[f"{what} lax"]) / times[f"{what} {method}"]) if f"{what} {method}" in times and method != "lax" else []
    if quantity in TIMES:
        return times.get(f"{quantity} {method}", [])
    kind = {"memory": "temporary", "first call": "first", "FLOPs": "flops", "depth": "depth"}[quantity]
    found = point.get(kind, {}).get(method if kind == "depth" else f"gradient {method}")
    return [] if found is None else [float(found)]


def sweep(results: dict[str, Any], axis: str) -> dict[int, dict[str, Any]]:
    """The problems measured, by size."""
    rows = [row for row in results["sweeps"].get(axis, ()) if row in results["points"]]
    return {int(parse(row, 0)["cBnL".index(axis)]): results["points"][row] for row in rows}


def curve(results: dict[str, Any], axis: str, quantity: str, method: str) -> tuple[list[float], np.ndarray]:
    """Sizes, and first quartiles, medians, third quartiles there."""
    found = {size: drawn for size, point in sweep(results, axis).items() if (drawn := samples(point, quantity, method))}
    return [float(size) for size in found], np.array([np.quantile(drawn, (0.25, 0.5, 0.75)) for drawn in found.values()]).reshape(-1, 3).T


def exponents(results: dict[str, Any]) -> Iterator[tuple[str, str, str, Fit, Theory]]:
    """Axis, quantity, method, what was found and what was expected."""
    for axis, quantity, method in itertools.product(results["sweeps"], QUANTITIES, STYLES):
        acts, least = _acts(results, axis, method)
        sizes, values = curve(results, axis, quantity, method)
        few = [(size, median) for size, median in zip(sizes, values[1], strict=True) if size >= least]
        found = fit(*zip(*few, strict=True), per_doubling=quantity == "depth" and method in LOGARITHMIC) if few else None
        if found is not None and (quantity != "depth" or axis == "L"):
            yield axis, quantity, method, found, theory(quantity, axis, acts, cpu=results["cpu"], mixes=results["mixes"], start=found.least)


def _acts(results: dict[str, Any], axis: str, method: str) -> tuple[str, float]:
    """What a method is at the largest sizes, and from which on: `auto` may change."""
    if method != "auto":
        return method, 0
    chosen = [(size, point["chosen"]["auto"].split("(")[0].lower()) for size, point in sweep(results, axis).items() if "chosen" in point]
    last = chosen[-1][1] if chosen else ""
    return last, next((size for size, _ in reversed([(0, ""), *chosen]) if dict(chosen).get(size) != last), 0) + 1


def verdict(found: Fit, expected: Theory) -> str:
    """Whether interval and theory meet; an interval too wide to tell says so."""
    if found.slope + found.half < expected.low - SLACK:
        return "below"
    if found.slope - found.half > expected.high + SLACK:
        return "above"
    return "agrees" if found.half <= WIDE else "open"


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The table of exponents, its head first."""
    rows = [["grows", "cost", "method", "exponent", "95 % interval", "theory", "", "fitted"]]
    for axis, quantity, method, found, expected in exponents(results):
        interval = f"{found.slope - found.half:z.2f} … {found.slope + found.half:z.2f}"
        fitted = f"{found.sizes} sizes from {found.least:.0f}"
        rows.append([axis, quantity, method, f"{found.slope:z.2f}", interval, expected.words, verdict(found, expected), fitted])
    return rows


def table(results: dict[str, Any]) -> str:
    """The exponents, for a terminal."""
    rows = cells(results)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


# --- figures ---------------------------------------------------------------------------------------------------------------


def _ticks(values: np.ndarray) -> list[float]:
    """Round numbers over the range of positive values, from three to seven of them where that can be."""
    low, high = float(values.min()), float(values.max())
    powers = range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 2)
    for heads in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [head * 10.0**power for power in powers for head in heads]
        found = [tick for tick in found if low / 1.3 <= tick <= high * 1.3]
        if len(found) >= 3:
            break
    return found[:: -(-len(found) // 7)]


def _frame(path: Path, draw: Callable[[Axes], None], x: str, y: str, title: str) -> None:
    """A figure for one column of a paper."""
    with matplotlib.rc_context(FONT):
        figure, axes = plt.subplots(figsize=(3.5, 3.1), layout="constrained")
        draw(axes)
        axes.set(xlabel=x, ylabel=y)
        axes.minorticks_off()
        axes.grid(alpha=0.25, linewidth=0.5)
        figure.suptitle(title, fontsize=8)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=7.5, handlelength=2.6, columnspacing=1.2)
        figure.savefig(path)
        plt.close(figure)


def _style(method: str) -> dict[str, Any]:
    colour, marker, line = STYLES[method]
    return {"color": colour, "marker": marker, "linestyle": line, "label": "lax.scan" if method == "lax" else method}


def _draw_growth(results: dict[str, Any], axis: str, quantity: str, unit: str, axes: Axes) -> None:
    """Medians of all methods against the size, and bands from quartile to quartile; speed-ups below 1 as losses."""
    seen = [np.array([0.9, 1.1])] if quantity.startswith("speed-up") else []
    for method in STYLES:
        sizes, values = curve(results, axis, quantity, method)
        if sizes:
            axes.plot(sizes, values[1], **_style(method))
            axes.fill_between(sizes, values[0], values[2], color=STYLES[method][0], alpha=0.2, linewidth=0)
            seen.append(values.ravel())
    if quantity == "gradient":
        sizes, values = curve(results, axis, "forward", "lax")
        axes.plot(sizes, values[1], color="0.55", linewidth=1, linestyle="--", label="forward alone")
        seen.append(values.ravel())
    every = np.concatenate(seen)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log" if quantity != "first call" else "linear")
    axes.set_xticks(sizes := list(sweep(results, axis)), [f"{size}" if i % -(-len(sizes) // 6) == 0 else "" for i, size in enumerate(sizes)])
    if quantity == "first call":
        axes.set_ylim(0)
    else:
        axes.set_yticks(_ticks(every))
        axes.set_ylim(every.min() / 1.3, every.max() * 1.3)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}") if unit == "×" else EngFormatter(unit))
    if quantity.startswith("speed-up"):
        axes.axhspan(every.min() / 1.3, 1, facecolor="#D55E00", alpha=0.12, hatch="////", edgecolor="#D55E00", linewidth=0)
        axes.axhline(1, color="black", linewidth=0.8)
        under = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
        axes.text(0.98, 0.02, "loss: slower than lax.scan", transform=axes.transAxes, ha="right", fontsize=7.5, bbox=under)


def _draw_depth(results: dict[str, Any], axes: Axes) -> None:
    seen = []
    for method in STYLES:
        sizes, values = curve(results, "L", "depth", method)
        if sizes:
            axes.plot(np.log2(sizes), values[1], **_style(method))
            seen.append(values[1])
    axes.set_yscale("log")
    axes.set_yticks(ticks := _ticks(np.concatenate(seen)), [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_roofline(results: dict[str, Any], axes: Axes) -> None:
    """Achieved FLOP/s of the whole gradients, by FLOPs a byte."""
    peak, bandwidth = results["peaks"]["flops"], results["peaks"]["bandwidth"]
    least = 0.1
    for method in STYLES:
        name = f"gradient {method}"
        own = [point for point in results["points"].values() if name in point.get("seconds", {})]
        intensity = [point["flops"][name] / point["bytes"][name] for point in own]
        rates = [point["flops"][name] / np.median(point["seconds"][name]) for point in own]
        if own:
            axes.plot(intensity, rates, **{**_style(method), "linestyle": "none"}, alpha=0.8, markeredgewidth=0)
            least = min(least, *intensity)
    x = np.geomspace(least / 2, 4 * peak / bandwidth, 200)
    axes.plot(x, np.minimum(peak, bandwidth * x), color="0.4", linewidth=2, label="roof, memory")
    cached = results["peaks"]["cache"]
    if cached > 1.5 * bandwidth:
        axes.plot(x, np.minimum(peak, cached * x), color="0.4", linewidth=1, linestyle="--", label="roof, cache")
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_formatter(EngFormatter())
    words = f"peak {EngFormatter('FLOP/s', places=0)(peak)}\nmemory {EngFormatter('B/s', places=0)(bandwidth)}"
    words += f"\ncache {EngFormatter('B/s', places=0)(cached)}" if cached > 1.5 * bandwidth else ""
    axes.text(0.98, 0.03, words, transform=axes.transAxes, ha="right", fontsize=7.5)


def figures(out: Path, results: dict[str, Any]) -> list[tuple[Path, str]]:
    """Draws them all: path and caption."""
    cell, wanted = results["cell"], []
    for axis, label in AXES.items():
        if not any("seconds" in point for point in sweep(results, axis).values()):
            continue
        _, *at = parse(results["sweeps"][axis][0], 0)
        title = f"{cell}, " + ", ".join(f"{key} = {size}" for key, size in zip("BnL", at, strict=True) if key != axis)
        for quantity, (words, unit) in DRAWN.items():
            said = {"×": "; lax.scan's time over each method's, paired within rounds; hatched: slower than lax.scan", "s": ""}.get(unit, "")
            said += "; medians, bands from quartile to quartile" if unit == "×" or quantity in TIMES else ""
            drawing = partial(_draw_growth, results, axis, quantity, unit)
            wanted.append((f"{quantity} {axis}", drawing, label, words, title, f"{words[0].upper()}{words[1:]} against {label}{said}."))
    if "L" in results["sweeps"] and curve(results, "L", "depth", "lax")[0]:
        words = "Depth of the backward pass, as parscan.plan tells it: L for lax and sequential, about L for walk; tree and chunked add 2 a doubling."
        wanted.append(("depth", partial(_draw_depth, results), "log₂ of the steps L", "operations one after another", f"{cell}: depth", words))
    words = "Whole gradients of all sweeps. Bytes are what every kernel reads and writes, wherever from: a point above the memory's slope works from a cache."
    wanted.append(("roofline", partial(_draw_roofline, results), "FLOPs a byte", "achieved FLOP/s", f"{cell}: roofline of whole gradients", words))
    found = []
    for name, drawing, x, y, title, words in wanted:
        path = out / f"{re.sub('[ -]', '_', name)}.png"
        _frame(path, drawing, x, y, title)
        found.append((path, words))
    return found


# --- files -----------------------------------------------------------------------------------------------------------------


def records(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A line a problem and program."""
    found = []
    for row, point in results["points"].items():
        cell, b, n, length = parse(row, 0)
        for name, rounds in point.get("seconds", {}).items():
            program, method = name.split()
            times = dict(zip(("quartile1_s", "median_s", "quartile3_s"), np.quantile(rounds, (0.25, 0.5, 0.75)), strict=True))
            line = {"cell": cell, "B": b, "n": n, "L": length, "program": program, "method": method, "chosen": point["chosen"].get(method, ""), **times}
            line["speed_up"] = float(np.median(np.array(point["seconds"][f"{program} lax"]) / rounds))
            line |= {"temporary_bytes": point["temporary"][name], "first_call_s": point["first"][name], "flops": point["flops"][name]}
            found.append(line | {"bytes_accessed": point["bytes"][name], "depth": point["depth"].get(method, "")})
    return found


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5dae0; --soft: #f5f7f9 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --paper: #14181d; --line: #39424c; --soft: #1d232a } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem; margin: 0 auto; padding: 1rem }
h1, h2 { line-height: 1.2 } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap } th { background: var(--soft) }
th.number, td.number { text-align: right } td.below, td.above { font-weight: 700 }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem }
figure { margin: 0 } figure img { width: 100%; background: #fff; border-radius: 6px } figcaption, .small { font-size: .85rem }
"""


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>parscan: how costs grow</title><style>$style</style></head><body>
<h1>How the costs of a gradient grow</h1>
<p class="small">$where</p>
<p>One of the steps L, the width n and the batch B grows; the others stay. <b>lax</b> is JAX's own gradient of <code>lax.scan</code>;
<b>sequential</b> a loop for the states alone, then one batched pull-back to the weights; <b>walk</b>, <b>chunked</b> and <b>tree</b> form the steps' Jacobians
in parallel, and apply them one after another, fold them in chunks, or multiply them as a tree; <b>auto</b> is what parscan chooses. A cost that grows as a
power of the size is a straight line in the figures, and the exponent its slope.</p>
<h2>Exponents</h2>
<p>Slopes of log cost against log size over the upper half of each sweep, four sizes if there are, with 95 % intervals of Student's t. The theory is for
large sizes. <b>below</b>: costs that do not grow, such as starting kernels, still weigh. <b>above</b>: something else grows, such as misses of a cache.
<b>open</b>: the interval is too wide to tell. Depth of tree and chunked: what a doubling of L adds. Memory and FLOPs are of the whole gradient; memory is
what XLA plans for temporaries. The first call is tracing and compiling, measured once. auto is fitted over the sizes at which
its method is that of the largest.</p>
$exponents
<h2>Figures</h2>
<div class="figures">$figures</div>
$left
<h2>Numbers</h2>
<p>Medians of interleaved rounds. × lax: above 1 is faster than lax.scan. MFLOP: of the compiled program, loops counted as often as they turn.</p>
$numbers
</body></html>
"""


def _html_table(rows: list[list[str]]) -> str:
    numeric = [all(re.fullmatch(r"[-\d.e+]+", cell) for cell in column) for column in zip(*rows[1:], strict=True)]

    def line(row: list[str], tag: str) -> str:
        kinds = ["number" if number else cell if cell in ("below", "above") else "" for cell, number in zip(row, numeric, strict=True)]
        return "".join(f'<{tag} class="{kind}">{html.escape(cell)}</{tag}>' for cell, kind in zip(row, kinds, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>\n" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{line(rows[0], "th")}</tr></thead><tbody>\n{body}</tbody></table></div>' if rows[1:] else "<p>None yet.</p>"


def _numbers(results: dict[str, Any]) -> list[list[str]]:
    rows = [["B", "n", "L", "program", "method", "median ms", "quartiles ms", "× lax", "temporary MB", "first call s", "MFLOP", "depth"]]
    for r in records(results):
        low, middle, high = (f"{1e3 * r[key]:.3g}" for key in ("quartile1_s", "median_s", "quartile3_s"))
        row = [r["B"], r["n"], r["L"], r["program"], r["method"], middle, f"{low} … {high}", f"{r['speed_up']:.2f}"]
        rows.append([*map(str, row), f"{r['temporary_bytes'] / 1e6:.3g}", f"{r['first_call_s']:.2f}", f"{r['flops'] / 1e6:.4g}", f"{r['depth']}"])
    return rows


def page(where: str, results: dict[str, Any], drawn: list[tuple[Path, str]]) -> str:
    """The report, as one page that needs nothing else."""
    pictures = ""
    for path, words in drawn:
        data = base64.b64encode(path.read_bytes()).decode()
        pictures += f'<figure><img alt="{html.escape(words)}" src="data:image/png;base64,{data}"><figcaption>{html.escape(words)}</figcaption></figure>\n'
    left = [f"{row}, {method}: skipped, {why}" for row, point in results["points"].items() for method, why in point["skipped"].items()]
    left += [f"{row}: not measured" for row in dict.fromkeys(itertools.chain(*results["sweeps"].values())) if row not in results["points"]]
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in left)
    parts = {
        "where": html.escape(where),
        "exponents": _html_table(cells(results)),
        "figures": pictures,
        "left": f"<h2>Left out</h2><ul>{lines}</ul>" if left else "",
        "numbers": _html_table(_numbers(results)),
    }
    return string.Template(PAGE).substitute(parts, style=STYLE)


def report(out: Path, where: str, results: dict[str, Any]) -> Path:
    """Writes figures, scaling.csv and scaling.html; the page's path."""
    lines = records(results)
    with (out / "scaling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    path = out / "scaling.html"
    path.write_text(page(where, results, figures(out, results)), encoding="utf-8")
    return path
