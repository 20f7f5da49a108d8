"""Draws README's picture: the tree for eight layers beside the chain, from the calls that `parscan.prefix.tree` really makes."""

from __future__ import annotations

from pathlib import Path

import click
from tree_picture import picture


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("docs/tree.png"), show_default=True, help="where to write the picture")
def main(out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    picture().savefig(out, dpi=200)


if __name__ == "__main__":
    main()
