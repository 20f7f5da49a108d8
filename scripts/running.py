"""Runs suites: row by row, each written down at once, an interrupted run gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import jax
import results
from suites import SUITES, Settings
from suites import limit as usual_limit
from tables import COLUMNS, MEANINGS, table
from tqdm import tqdm


def opened(path: Path, where: str) -> dict[str, list[dict[str, Any]]]:
    """The suites of a file, which need not be there."""
    return results.kept(path, where, "suites") if path.exists() else {}


def done(rows: Sequence[dict[str, Any]], seed: int, quick: bool) -> set[str]:
    """Rows that need not be measured again; what was skipped is tried once more, and what a quick run measured is measured in full."""
    return {row["row"] for row in rows if row["seed"] == seed and "skipped" not in row and quick >= row["quick"]}


def run_suites(names: Sequence[str], quick: bool, rounds: int, limit: float | None, seed: int, path: Path | None) -> None:
    """Measures what is missing, and shows all there is of these suites."""
    path, where = path or results.usual(), results.machine()
    content = {"where": where, "platform": jax.default_backend(), "suites": opened(path, where)}
    settings = Settings(rounds, limit or usual_limit(), seed, quick)
    wanted = {name: (SUITES[name].quick if quick else SUITES[name].rows)(seed) for name in names}
    left = [(name, row) for name, rows in wanted.items() for row in rows if row not in done(content["suites"].get(name, []), seed, quick)]
    click.echo(where)
    try:
        for name, row in (bar := tqdm(left, unit="row", leave=False)):
            bar.set_description(f"{name} {row}")
            found = results.measured(row, lambda name=name, row=row: SUITES[name].measure(row, settings)) | {"seed": seed, "quick": quick}
            if "skipped" in found:
                bar.write(f"skipped {name} {row}: {found['skipped']}")
            before = content["suites"].get(name, [])
            content["suites"][name] = [one for one in before if (one["row"], one["seed"]) != (row, seed)] + [found]
            results.keep(path, content)
    except KeyboardInterrupt:
        click.echo(f"interrupted after {bar.n} of {len(left)} rows; the same command goes on", err=True)
    for name in names:
        if content["suites"].get(name):
            click.echo(f"\n{name}: {SUITES[name].about} {MEANINGS[name]}\n\n{table(name, content['suites'][name])}")
    if path.exists():
        click.echo(f"\nColumns of times: {COLUMNS}\n\nresults: {path}")
