"""Pictures of Jacobians, with matplotlib, which is imported when one is drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from parscan.layout import Layout, blocks_in_words
from parscan.structure import Structure

MOST_DRAWN = 2**13  # coordinates up to which entries are drawn; of larger states, the blocks alone
PIXELS = 512  # along the picture: entries that share one are one
MOST_OUTLINED = 512  # blocks of a group up to which each gets an outline
MOST_LABELS = 16  # along an axis
COLOURS = ("#2a6f97", "#c8553d", "#588157", "#8e5572", "#b08900", "#3d405b")  # of groups, in turn


def spy(structure: Structure, pattern: Any, names: tuple[Sequence[str], Sequence[str]], ax: Any = None) -> Any:
    """Draws where a Jacobian may be non-zero, and its blocks, a colour for each group.

    Args:
        structure: of the Jacobian.
        pattern: SciPy array (p, n), the leaves of both states raveled one after another; None if it is not known.
        names: of the leaves of the state that enters the step, and of the one that leaves it.
        ax: matplotlib Axes, or None for new ones.

    Returns:
        the Axes.

    Raises:
        ImportError: there is no matplotlib.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("`spy` draws with matplotlib, which is not installed: pip install matplotlib") from error
    before, after = structure.before, structure.after
    if ax is None:
        _, ax = pyplot.subplots(figsize=(6.4, 6.4), layout="constrained")
    drawn = pattern is not None and max(before.size, after.size) <= MOST_DRAWN
    _draw_blocks(ax, structure, opacity=0.15 if drawn else 0.7)
    if drawn:
        _draw_entries(ax, structure, pattern)
    ax.set(xlim=(-0.5, before.size - 0.5), ylim=(after.size - 0.5, -0.5), aspect="equal")
    ax.set_xticks(*_labels(before, names[0]), rotation=90, fontsize="small")
    ax.set_yticks(*_labels(after, names[1]), fontsize="small")
    ax.set(xlabel="the state that enters", ylabel="the state that leaves", title=title(structure))
    ax.tick_params(length=2)
    return ax


def title(structure: Structure) -> str:
    """The kind and the blocks in words."""
    return f"{structure.kind}: {blocks_in_words(structure.before.groups, structure.after.groups)}"


def _draw_blocks(ax: Any, structure: Structure, opacity: float) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    row = column = 0
    colours = itertools.cycle(COLOURS)
    for before, after in zip(structure.before.groups, structure.after.groups, strict=True):
        blocks, colour = max(before.blocks, after.blocks), next(colours)
        if blocks <= MOST_OUTLINED:
            places = ((column + i * before.side - 0.5, row + i * after.side - 0.5) for i in range(blocks))
            patches = [Rectangle(place, before.side, after.side) for place in places]
            ax.add_collection(PatchCollection(patches, facecolor=to_rgba(colour, opacity), edgecolor=colour, linewidth=1, zorder=1))
        else:  # too narrow to be told apart
            ax.plot([column - 0.5, column + before.size - 0.5], [row - 0.5, row + after.size - 0.5], color=colour, linewidth=2, zorder=1)
        row, column = row + after.size, column + before.size


def _draw_entries(ax: Any, structure: Structure, pattern: Any) -> None:
    """Entries in the colour of their group; black outside of all blocks, where a claim is wrong."""
    from matplotlib.colors import ListedColormap

    image, colours = entries(structure, pattern, PIXELS, len(COLOURS)), ListedColormap(["#00000000", "#000000", *COLOURS])
    extent = (-0.5, structure.before.size - 0.5, structure.after.size - 0.5, -0.5)
    ax.imshow(image, cmap=colours, vmin=0, vmax=1 + len(COLOURS), interpolation="nearest", extent=extent, zorder=2)


def entries(structure: Structure, pattern: Any, most: int, colours: int) -> np.ndarray:
    """Where a Jacobian may be non-zero, as an image of at most `most` pixels along each side.

    Returns:
        0 for nothing, 1 for what is in no block, 2 and more for the groups, `colours` of them in turn.
    """
    shape, (rows, columns) = (structure.after.size, structure.before.size), _places(structure, pattern)
    height, width = (min(size, most) for size in shape)
    image = np.zeros((height, width), np.uint8)
    (row_group, row_block), (column_group, column_block) = _blocks(structure.after), _blocks(structure.before)
    inside = (row_group[rows] == column_group[columns]) & (row_block[rows] == column_block[columns])
    image[rows * height // shape[0], columns * width // shape[1]] = np.where(inside, 2 + row_group[rows] % colours, 1)
    return image


def _blocks(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """For every entry of a vector its group, and its block there."""
    groups = [np.full(group.size, i) for i, group in enumerate(layout.groups)]
    blocks = [np.arange(group.size) // max(group.side, 1) for group in layout.groups]
    return np.concatenate(groups), np.concatenate(blocks)


def _places(structure: Structure, pattern: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries of a pattern stand in the order of the layouts; what is in no layout has no derivative, and is left out."""
    found = []
    for layout, entries in zip((structure.after, structure.before), pattern.nonzero(), strict=True):
        order = layout.order()
        places = np.full(sum(map(math.prod, layout.shapes)), -1)
        places[order] = np.arange(len(order))
        found.append(places[entries])
    rows, columns = found
    inside = (rows >= 0) & (columns >= 0)
    return rows[inside], columns[inside]


def _labels(layout: Layout, names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Places along an axis and the coordinates there: all of them, or where blocks begin, or some."""
    starts = [0]
    for group in layout.groups:
        starts += [starts[-1] + (i + 1) * group.side for i in range(group.blocks)]
    starts = starts[:-1] if layout.size and len(starts) > 4 and layout.size > MOST_LABELS else list(range(layout.size))
    places, order = starts[:: -(-len(starts) // MOST_LABELS) or 1], layout.order()
    bounds = list(itertools.accumulate((math.prod(shape) for shape in layout.shapes), initial=0))
    found = []
    for coordinate in order[places]:
        leaf = next(i for i, past in enumerate(bounds[1:]) if coordinate < past)
        index = np.unravel_index(coordinate - bounds[leaf], layout.shapes[leaf])
        found.append(names[leaf] + (f"[{', '.join(map(str, index))}]" if layout.shapes[leaf] else ""))
    return places, found
