"""What the suites' rows look like: as tables on a terminal and on docs/performance.md, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_auto
import bench_memory
from results import markdown

Rows = Sequence[dict[str, Any]]
PARTS = {"auto": ("forward", "backward", "gradient", "step"), "sequential": ("backward", "gradient"), "associative": ("backward", "gradient")}
LOOP = "`jax.grad(lax.scan)`"
SPREAD = "the median of interleaved rounds, and the quartiles around it"
TIMES = (
    f"× is the time of {LOOP}, by the `unroll` of 1, 2, 4 and 8 whose whole gradient is fastest, over the time of the column: above 1 is faster, below 1 a "
    f"loss; {SPREAD}."
)
COLUMNS = (
    "*backward* is the pull-back that `jax.vjp` returns, alone, given what the forward pass has kept; *gradient* the loss and its whole gradient; *step* that "
    "and an update by gradient descent. *sequential* is a sequential adjoint followed by one batched pull-back, *associative* `lax.associative_scan` over "
    "materialised Jacobians, *auto* what parscan chooses. *memory ×* is XLA's temporary bytes of the gradient that `auto` chose over the loop's: above 1 is "
    "more. Where `auto` chose `Lax()`, it runs the loop with `unroll=1`."
)
MEANINGS = {
    **dict.fromkeys(("bppsa", "deer", "elementwise", "deep"), TIMES),
    "structure": f"× is the time with full blocks over the time with the kind that is found: above 1 is faster; {SPREAD}.",
    "auto": f"*gain* is the time of {LOOP} over that of `auto`, above 1 is faster; *behind* the time of `auto` over that of the best baseline, above 1 is "
    "slower. A problem is lost if *behind* is above 1.10, its lower quartile too.",
    "compile": f"× is the time to trace and compile over that of {LOOP}: above 1 is slower. Medians of three, one alone in a quick run.",
    "memory": f"× is a ratio to {LOOP}, whose own figures stand in its row: above 1 is more. *guard* is with it to without it.",
}


def figure(value: float) -> str:
    """Three digits, without an exponent where that can be read."""
    return f"{value:.3g}" if 1e-2 <= abs(value) < 1e3 or value == 0 else f"{value:.0f}" if abs(value) >= 1e3 else f"{value:.1e}"


def ratio(values: Sequence[float]) -> str:
    """A median and its quartiles."""
    middle, low, high = values
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def sizes(row: str) -> tuple[str, int, int, int]:
    """Cell, B, n, T."""
    cell, *numbers = row.split(":")
    b, n, length = map(int, numbers)
    return cell, b, n, length


def contests(rows: Rows) -> str:
    """Recurrences and deep networks: the loop's times, and everyone's ratios."""
    present = {contender for row in rows for contender in row["ms"]["gradient"]}
    parts = {c: some for c, some in PARTS.items() if c in present} | {c: PARTS["auto"] for c in sorted(present - {"lax", *PARTS})}
    head = ["cell, B × n", "T", "auto chose", "unroll", *(f"lax {q} ms" for q in PARTS["auto"])]
    head += [*(f"{c} {q} ×" for c, some in parts.items() for q in some), "memory ×"]
    lines = []
    for row in rows:
        cell, b, n, length = sizes(row["row"])
        unroll = f"{row['unroll']}" if row["ratio"] else f"{row['unroll']}: {row['growth']:.1f} × the time for twice the steps, grows faster than its work"
        line = [f"{cell} {b} × {n}", length, f"`{row['auto']}`", unroll, *(figure(row["ms"][q]["lax"][0]) for q in PARTS["auto"])]
        for contender, some in parts.items():
            line += [ratio(found) if (found := row["ratio"].get(q, {}).get(contender)) else "–" for q in some]
        memory = row["temporary bytes"]
        lines.append([*line, f"{memory['auto'] / memory['lax']:.2f}" if memory["lax"] else "–"])
    return markdown(head, lines)


def structures(rows: Rows) -> str:
    head = ["layer", "n", *(f"{method} {what}" for method in ("walk", "tree") for what in ("works with", "ms", "×"))]
    lines = []
    for row in rows:
        cells = [(row[m]["kind"], figure(row[m]["ms"]["special"]), ratio(row[m]["ratio"])) for m in ("walk", "tree")]
        lines.append([*row["row"].rsplit(":", 1), *(cell for some in cells for cell in some)])
    return markdown(head, lines)


def bullets(rows: Rows) -> str:
    """What a list of drawn problems says."""
    said = "\n".join(line if line.startswith("  ") else f"- {line}" for line in bench_auto.summary(list(rows)).splitlines())
    return said.replace("\n  ", "\n  - ")


def in_short(rows: Rows) -> list[str]:
    """Of a list of drawn problems: how many, gains in the geometric mean, of all and of those of some size, how many are lost, and the worst of them."""
    found = [bench_auto.judged(row) for row in rows]
    gains = [[one["gain"] for one in found], [one["gain"] for one in found if 8 < one["coordinates"] <= 256]]
    lost = [one["behind"] for one in found if one["lost"]]
    return [str(len(found)), *map(bench_auto.geometric, gains), str(len(lost)), f"{max(lost):.2f}" if lost else "none"]


def by_seed(rows: Rows) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.get("seed", 0), []).append(row)
    return found


FEW_PROBLEMS = 20  # up to which each has a line


def autos(rows: Rows) -> str:
    parts = [f"Seed {seed}:\n\n{bullets(some)}" for seed, some in by_seed(rows).items()]
    if len(rows) > FEW_PROBLEMS:
        return "\n\n".join(parts)
    head = ["cell, B × n", "T", "auto chose", "gain ×", "behind ×", "best baseline", "lost"]
    lines = []
    for row in rows:
        one, (cell, b, n, length) = bench_auto.judged(row), sizes(row["row"])
        title = [f"{cell} {b} × {n}", length, f"`{row['auto']}`"]
        lines.append([*title, f"{one['gain']:.2f}", f"{one['behind']:.2f}", one["base"], "yes" if one["lost"] else "no"])
    return "\n\n".join([*parts, markdown(head, lines)])


def compiles(rows: Rows) -> str:
    names = list(rows[0]["s"])
    lines = []
    for row in rows:
        cell, b, n, length = sizes(row["row"])
        title = [f"{cell} {b} × {n}", length, f"`{row['auto']}`"]
        lines.append([*title, *(f"{row['s'][name][0]:.2f}" for name in names), *(f"{row['ratio'][name]:.2f}" for name in names[1:])])
    return markdown(["cell, B × n", "T", "auto chose", *(f"{name} s" for name in names), *(f"{name} ×" for name in names[1:])], lines)


def memories(rows: Rows) -> str:
    return bench_memory.table([row | {"row": row["row"].rsplit(":", 1)[0]} for row in rows])


TABLES: dict[str, Callable[[Rows], str]] = {
    **dict.fromkeys(("bppsa", "deer", "elementwise", "deep"), contests),
    "structure": structures,
    "auto": autos,
    "compile": compiles,
    "memory": memories,
}


def table(suite: str, rows: Rows) -> str:
    """A suite's table; below it a line on each row that was skipped, and on each contender that is missing."""
    there = [row for row in rows if "skipped" not in row]
    skipped = [f"- skipped {row['row']}: {row['skipped']}" for row in rows if "skipped" in row]
    notes: dict[str, list[str]] = {}
    for row in there:
        for note in row.get("notes", ()):
            notes.setdefault(note, []).append(row["row"])
    missing = [f"- {note}: {', '.join(some) if len(some) < len(there) else 'all rows'}" for note, some in notes.items()]
    return "\n\n".join([*([TABLES[suite](there)] if there else []), *(["\n".join(skipped + missing)] if skipped + missing else [])])


def picture(suites: dict[str, Rows], title: str, path: Path | None) -> bool:
    """Draws the gain of the whole gradient, and of the backward pass alone, over T and B × n, suite by suite; whether there is anything to draw."""
    some = {suite: [row for row in rows if row.get("ratio")] for suite, rows in suites.items() if TABLES[suite] is contests}
    some = {suite: rows for suite, rows in some.items() if rows}
    if not some or path is None:
        return bool(some)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tall = [len({states(row) for row in rows}) for rows in some.values()]
    drawing = plt.figure(figsize=(9, 1.2 + sum(0.27 * count + 0.75 for count in tall)), layout="constrained")
    axes = drawing.subplots(len(some), 2, squeeze=False, height_ratios=[count + 0.5 for count in tall])
    most = max(1.0, *(abs(math.log2(row["ratio"][q]["auto"][0])) for rows in some.values() for row in rows for q in ("gradient", "backward")))
    for (suite, rows), pair in zip(some.items(), axes, strict=True):
        for axis, quantity, name in zip(pair, ("gradient", "backward"), ("whole gradient", "backward pass alone"), strict=True):
            drawn = _gains(axis, rows, quantity, most)
            axis.set_title(f"{suite}: {name}", fontsize=9)
        pair[0].set_ylabel("cell, B × n", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("T, steps or layers", fontsize=8)
    bar = drawing.colorbar(drawn, ax=axes, shrink=min(1, 4 / drawing.get_figheight()))
    bar.set_label("time of lax.scan / time of auto\n(below 1: a loss)", fontsize=8)
    ticks = range(-math.floor(most), math.floor(most) + 1, max(1, math.floor(most) // 3))
    bar.set_ticks(list(ticks), labels=[figure(2.0**tick) for tick in ticks], fontsize=8)
    drawing.suptitle(title, fontsize=9)
    drawing.savefig(path, dpi=150)
    plt.close(drawing)
    return True


COLOURS = {"lax 1": ("#0072B2", "o"), "sequential": ("#D55E00", "s"), "walk": ("#009E73", "^")}  # Okabe and Ito's


def predicted(suites: dict[str, Rows], title: str, path: Path | None) -> bool:
    """Draws the times that a plan tells beside those that were measured, of drawn problems, with the band of a factor of 2; whether there are any."""
    pairs = bench_auto.predictions(list(suites.get("auto", ())))
    if not pairs or path is None:
        return bool(pairs)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axis = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    times = [time for some in pairs.values() for pair in some for time in pair]
    ends = [1e3 * min(times) / 2, 1e3 * max(times) * 2]
    axis.fill_between(ends, [end / 2 for end in ends], [end * 2 for end in ends], color="0.9", label="within a factor of 2")
    axis.plot(ends, ends, color="0.5", lw=1)
    for method, some in pairs.items():
        colour, marker = COLOURS.get(method, ("black", "x"))
        label = f"{ {'lax 1': 'lax.scan'}.get(method, method) }: {bench_auto.near(some):.0%}"
        measured, told = [1e3 * one for _, one in some], [1e3 * one for one, _ in some]
        axis.scatter(measured, told, s=14, color=colour, marker=marker, alpha=0.7, linewidths=0, label=label)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured, ms", ylabel="told by the plan, ms", aspect="equal")
    axis.set_title(title, fontsize=8)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    drawing.savefig(path, dpi=150)
    plt.close(drawing)
    return True


def states(row: dict[str, Any]) -> tuple[str, int, int]:
    """Cell, B, n."""
    return sizes(row["row"])[:3]


def _gains(axis: Any, rows: Rows, quantity: str, most: float) -> Any:
    """A square for each row, coloured by the logarithm of its gain, which is written into it."""
    steps = sorted({sizes(row["row"])[3] for row in rows})
    kinds = sorted({states(row) for row in rows})
    gains = [[math.nan] * len(steps) for _ in kinds]
    for row in rows:
        y, x, gain = kinds.index(states(row)), steps.index(sizes(row["row"])[3]), row["ratio"][quantity]["auto"][0]
        gains[y][x] = math.log2(gain)
        axis.text(x, y, f"{gain:.2g}", ha="center", va="center", fontsize=7, color="white" if abs(gains[y][x]) > 0.65 * most else "black")
    drawn = axis.imshow(gains, cmap="PuOr", vmin=-most, vmax=most, aspect="auto", origin="lower")
    axis.set_xticks(range(len(steps)), labels=steps, fontsize=7)
    axis.set_yticks(range(len(kinds)), labels=[f"{cell} {b} × {n}" for cell, b, n in kinds], fontsize=7)
    return drawn
