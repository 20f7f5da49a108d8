"""Draws the pictures of docs/gallery.md, from what the page's own code computes.

The page is run block by block, as its test does, and each picture is drawn right after the block that stands above it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLUE, ORANGE, INK, FAINT = "#0072B2", "#D55E00", "#222222", "#8A8A8A"  # Okabe and Ito
FENCE = re.compile(r"^```python\n(.*?)^```$|^!\[[^\]]*\]\((gallery_\w+)\.png\)$", re.MULTILINE | re.DOTALL)


def layers(ax: Axes, made: dict[str, Any]) -> None:
    norms = np.asarray(made["norms"])
    ax.plot(norms, color=BLUE)
    ax.set(xlabel="layer", ylabel="‖gradient‖", xlim=(0, len(norms) - 1), ylim=(0, None))


def pid(ax: Axes, made: dict[str, Any]) -> None:
    time = 0.05 * np.arange(200)
    ax.axhline(1, color=FAINT, linewidth=1, linestyle=":")
    ax.text(time[-1], 1.03, "target", color=FAINT, ha="right")
    for gains, name, colour, style in ((made["first"], "before", ORANGE, "--"), (made["gains"], "after", BLUE, "-")):
        told = ", ".join(f"{float(gain):.2f}" for gain in gains)
        ax.plot(time, made["response"](gains, jax.lax.scan), style, color=colour, label=f"{name}: gains {told}")
    ax.set(xlabel="time", ylabel="position", xlim=(0, time[-1]))
    ax.legend(frameon=False, loc="lower right")


def kalman(ax: Axes, made: dict[str, Any]) -> None:
    ax.plot(made["seen"], ".", color=FAINT, label="seen")
    ax.plot(np.cumsum(made["drift"]), "--", color=ORANGE, label="true")
    ax.plot(made["filtered"](made["noise"], made["parscan"].linear_scan)[:, 0], color=BLUE, label="filtered")
    ax.set(xlabel="step", ylabel="position", xlim=(0, 79))
    ax.legend(frameon=False)


def posterior(ax: Axes, made: dict[str, Any]) -> None:
    image = ax.imshow(np.asarray(made["posterior"]).T, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xlabel="step", ylabel="state", yticks=range(5))
    ax.figure.colorbar(image, ax=ax, label="probability")


PICTURES: dict[str, Callable[[Axes, dict[str, Any]], None]] = {f"gallery_{draw.__name__}": draw for draw in (layers, pid, kalman, posterior)}


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=DOCS, help="where to write; docs if not given")
def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {"__name__": "__main__"}
    for code, name in FENCE.findall((DOCS / "gallery.md").read_text()):
        if not name:
            exec(code, made)
            continue
        fig = Figure(figsize=(7, 2.6), layout="constrained", facecolor="white")
        ax = fig.subplots()
        ax.spines[["top", "right"]].set_visible(False)
        PICTURES[name](ax, made)
        fig.savefig(out / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
