"""What a notebook shows of a plan: an HTML table, and beside it a small picture of the blocks, drawn as SVG without any library.

No colour is set but those of the blocks, which stand out from white and from black alike; text and frame take the colour of the page's text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from parscan.drawing import entries, title
from parscan.structure import Structure

SIDE = 220  # of the picture, in pixels
CELLS = 64  # along it: entries that share one are one
MOST_OUTLINED = 64  # blocks of a group up to which each is drawn; of more, a line along the diagonal
LEFT = "text-align:left;vertical-align:top;padding:2px 8px 2px 0"
RIGHT = "text-align:right;padding:2px 0 2px 16px"
COLOURS = ("#2f81b7", "#d0604a", "#5f8f63", "#a5638b", "#a67c00", "#7a7fa8")  # of groups, in turn; 3 : 1 at least on white and on black


def page(rows: Iterable[tuple[str, str]], tables: Iterable[tuple[Sequence[str], Iterable[Sequence[str]]]], picture: str) -> str:
    """An HTML fragment.

    Args:
        rows: label and text of each line of words.
        tables: of numbers: headings and lines, whose first entries are labels.
        picture: SVG, or nothing.
    """
    words = "".join(f"<tr>{_cell('th', label, LEFT)}{_cell('td', text, LEFT)}</tr>" for label, text in rows)
    numbers = "".join(_line("th", headings) + "".join(_line("td", line) for line in lines) for headings, lines in tables)
    both = "".join(f'<table style="border-collapse:collapse">{some}</table>' for some in (words, numbers))
    drawn = f"<div>{picture}</div>" if picture else ""
    return f'<div style="display:flex;flex-wrap:wrap;gap:24px;align-items:flex-start"><div style="max-width:640px">{both}</div>{drawn}</div>'


def _line(cell: str, line: Sequence[str]) -> str:
    return f"<tr>{_cell('th', line[0], LEFT)}{''.join(_cell(cell, one, RIGHT) for one in line[1:])}</tr>"


def _cell(tag: str, text: str, style: str) -> str:
    return f'<{tag} style="{style}">{escape(text.strip())}</{tag}>'


def picture(structure: Structure, pattern: Any) -> str:
    """The blocks of a Jacobian, rows from top to bottom, a colour for each group, and where it may be non-zero; SVG.

    Args:
        structure: of the Jacobian, with coordinates on both sides.
        pattern: as for `drawing.spy`, or None to draw the blocks alone.
    """
    rows, columns = structure.after.size, structure.before.size
    unit = SIDE / max(rows, columns)
    width, height = columns * unit, rows * unit
    drawn = [*_blocks(structure, unit, 0.25 if pattern is not None else 0.7), *(_entries(structure, pattern, width, height) if pattern is not None else ())]
    frame = f'<rect x=".5" y=".5" width="{width:.4g}" height="{height:.4g}" fill="none" stroke="currentColor" stroke-opacity=".5"/>'
    size = f'width="{width + 1:.4g}" height="{height + 1:.4g}" viewBox="0 0 {width + 1:.4g} {height + 1:.4g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}><title>{escape(title(structure))}</title>{"".join(drawn)}{frame}</svg>'


def _blocks(structure: Structure, unit: float, opacity: float) -> Iterable[str]:
    row = column = 0
    colours = itertools.cycle(COLOURS)
    for before, after in zip(structure.before.groups, structure.after.groups, strict=True):
        colour = next(colours)
        blocks = max(before.blocks, after.blocks)
        x, y, width, height = (0.5 + column * unit, 0.5 + row * unit, before.side * unit, after.side * unit)
        if blocks <= MOST_OUTLINED:
            path = "".join(f"M{x + i * width:.4g} {y + i * height:.4g}h{width:.4g}v{height:.4g}h{-width:.4g}z" for i in range(blocks))
            yield f'<path d="{path}" fill="{colour}" fill-opacity="{opacity}" stroke="{colour}" stroke-width=".75"/>'
        else:
            yield f'<path d="M{x:.4g} {y:.4g}L{x + before.size * unit:.4g} {y + after.size * unit:.4g}" stroke="{colour}" stroke-width="2"/>'
        row, column = row + after.size, column + before.size


def _entries(structure: Structure, pattern: Any, width: float, height: float) -> Iterable[str]:
    """One path a colour, made of runs of cells; what is outside of all blocks, where a claim is wrong, in the colour of text."""
    image = entries(structure, pattern, CELLS, len(COLOURS))
    x, y = width / image.shape[1], height / image.shape[0]
    for value in np.unique(image[image > 0]):
        runs = []
        for row, cells in enumerate(image == value):
            edges = np.flatnonzero(np.diff(cells, prepend=False, append=False))
            runs += [f"M{0.5 + lo * x:.4g} {0.5 + row * y:.4g}h{(hi - lo) * x:.4g}v{y:.4g}h{(lo - hi) * x:.4g}z" for lo, hi in edges.reshape(-1, 2)]
        yield f'<path d="{"".join(runs)}" fill="{"currentColor" if value == 1 else COLOURS[value - 2]}"/>'
