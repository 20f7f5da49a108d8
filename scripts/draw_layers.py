"""Draws the house plan of the package: every module on the floor that `pyproject.toml` gives it, and its imports, read from the files.

Imports only go down. Of those that follow from others (a imports b, b imports c, and a imports c) the direct one is not drawn.
"""

from __future__ import annotations

import ast
import itertools
import math
import sys
import tomllib
from dataclasses import dataclass
from html import escape
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "parscan"
WIDTH, HEIGHT, GAP, FLOOR, MARGIN = 86, 26, 14, 56, 16  # of a module's box, between two, from floor to floor, around all
BEND, SWEEPS = 14, 30
Node = str | tuple[str, int]  # a module, or a lane
INK, FILL, LINE = "#24292f", "#ddeaf6", "#8a94a0"


def floors() -> list[list[str]]:
    """From the top, the modules of each, as the import linter is told them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (one["layers"] for one in contracts if one["containers"] == [PACKAGE])
    return [layer.split(" | ") for layer in layers]


def imports(module: str) -> set[str]:
    """The other modules and packages, right under parscan, that this one imports."""
    home = ROOT / PACKAGE / module
    files = sorted(home.rglob("*.py")) if home.is_dir() else [home.with_suffix(".py")]
    found = set()
    for node in itertools.chain.from_iterable(ast.walk(ast.parse(file.read_text())) for file in files):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith(f"{PACKAGE}.")}
    return {name for name in found - {module} if (ROOT / PACKAGE / name).is_dir() or (ROOT / PACKAGE / f"{name}.py").is_file()}


def purpose(module: str) -> str:
    """The first line of a module's docstring."""
    home = ROOT / PACKAGE / module
    file = home / "__init__.py" if home.is_dir() else home.with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]


def reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without what follows from other edges."""
    below: dict[str, set[str]] = {}

    def reach(name: str) -> set[str]:
        if name not in below:
            below[name] = set().union(*(({other} | reach(other)) for other in edges[name]))
        return below[name]

    return {name: {other for other in some if not any(other in reach(through) for through in some)} for name, some in edges.items()}


@dataclass
class House:
    """The plan, ready to be drawn.

    Attributes:
        floors: from the top; in each the modules, and lanes: places that lines to lower floors pass by, named by the module that they lead to and the floor.
        lines: from every module or lane to what is right below it.
        at: of each the horizontal place of its middle.
    """

    floors: list[list[Node]]
    lines: dict[Node, set[Node]]
    at: dict[Node, float]

    @classmethod
    def of(cls, plan: list[list[str]], edges: dict[str, set[str]]) -> House:
        depth = {name: i for i, floor in enumerate(plan) for name in floor}
        found: list[list[Node]] = [list(floor) for floor in plan]
        house: dict[Node, set[Node]] = {name: set() for name in depth}
        for name, others in edges.items():
            for other in sorted(others):
                here: Node = name
                for i in range(depth[name] + 1, depth[other] + 1):
                    below: Node = other if i == depth[other] else (other, i)
                    if below not in house:
                        found[i].append(below)
                        house[below] = set()
                    house[here].add(below)
                    here = below
        return cls(found, house, _places(found, house))


def _places(floors: list[list[Node]], lines: dict[Node, set[Node]]) -> dict[Node, float]:
    """Each beside what is right above and below it, swept up and down; no two closer than they are wide."""
    at = {node: float(i * (WIDTH + GAP)) for floor in floors for i, node in enumerate(floor)}
    beside: dict[Node, list[Node]] = {node: sorted(below, key=str) for node, below in lines.items()}
    for node, below in lines.items():
        for other in below:
            beside[other].append(node)
    for floor in [*floors, *reversed(floors)] * SWEEPS:
        wish = {node: round(math.fsum(at[other] for other in beside[node]) / len(beside[node]), 6) if beside[node] else at[node] for node in floor}
        floor.sort(key=lambda node: (wish[node], str(node)))
        at.update(zip(floor, _apart([wish[node] for node in floor], [_width(node) for node in floor]), strict=True))
    left = min(at[node] - _width(node) / 2 for node in at)
    return {node: x - left + MARGIN for node, x in at.items()}


def _apart(wishes: list[float], widths: list[float]) -> list[float]:
    """The places nearest to those wished for at which neighbours do not overlap: least squares, by pooling those who would."""
    offsets = list(itertools.accumulate((a / 2 + GAP + b / 2 for a, b in itertools.pairwise(widths)), initial=0.0))
    pools: list[tuple[float, int]] = []
    for wish, offset in zip(wishes, offsets, strict=True):
        mean, count = wish - offset, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        pools.append((mean, count))
    return [mean + offset for mean, offset in zip(itertools.chain.from_iterable([mean] * count for mean, count in pools), offsets, strict=True)]


def _width(node: Node) -> float:
    return WIDTH if isinstance(node, str) else 0


def drawing() -> str:
    """SVG; the same for the same files."""
    plan = floors()
    house = House.of(plan, reduced({name: imports(name) for floor in plan for name in floor}))
    top = {node: MARGIN + i * FLOOR for i, floor in enumerate(house.floors) for node in floor}
    width, height = max(x + _width(node) / 2 for node, x in house.at.items()) + MARGIN, 2 * MARGIN + (len(plan) - 1) * FLOOR + HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" font-family="sans-serif" font-size="12">',
        f"<title>{PACKAGE}: what stands on what</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for node, below in house.lines.items():
        x, y = house.at[node], top[node] + HEIGHT
        through = "" if isinstance(node, str) else f"M{x:.0f} {top[node]}V{y}"
        curves = "".join(f"M{x:.0f} {y}C{x:.0f} {y + BEND} {u:.0f} {v - BEND} {u:.0f} {v}" for u, v in sorted((house.at[one], top[one]) for one in below))
        if through or curves:
            lines.append(f'<path d="{through}{curves}" fill="none" stroke="{LINE}"/>')
    for name in itertools.chain.from_iterable(plan):
        x, y = house.at[name], top[name]
        box = f'<rect x="{x - WIDTH / 2:.0f}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4" fill="{FILL}" stroke="{INK}"/>'
        bold = ' font-weight="bold"' if (ROOT / PACKAGE / name).is_dir() else ""
        text = f'<text x="{x:.0f}" y="{y + 17}" text-anchor="middle" fill="{INK}"{bold}>{escape(name)}</text>'
        lines.append(f"<g><title>{escape(purpose(name))}</title>{box}{text}</g>")
    return "\n".join([*lines, "</svg>", ""])


@click.command(help=__doc__)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=ROOT / "docs" / "layers.svg", help="where to write; docs/layers.svg if not given"
)
@click.option("--check", is_flag=True, help="write nothing, but fail if what is there is not what would be written")
def main(out: Path, check: bool) -> None:
    found = drawing()
    if not check:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(found)
    elif not out.exists() or out.read_text() != found:
        sys.exit(f"{out} is not what the imports are: python scripts/draw_layers.py")


if __name__ == "__main__":
    main()
