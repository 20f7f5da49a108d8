#!/usr/bin/env python
"""Makes docs/performance.md, its pictures, and README's account of `auto`, of the files of results in docs/results: no figure of these is typed by hand.

\b
  performance.py                     writes the page
  performance.py --check             fails if the page is not what the files say
  performance.py --keep FILE         first puts a file of `bench.py`'s suites, rounded, among the results

Any part of the suites, and any number of machines, makes a page; what no file has is said to be unmeasured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from bench import SUITE_NAMES
from results import keep
from suites import SUITES
from tables import COLUMNS, MEANINGS, by_seed, in_short, markdown, picture, predicted, table

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = "performance.md"
ACCELERATORS = {"gpu": "GPU", "tpu": "TPU"}
INTRODUCTION = """# Performance

Made by `scripts/performance.py` of the files in [docs/results](results): change those, not this page. Losses stand in the tables as gains do.
The suites are run by

```bash
python scripts/bench.py --suite all  # or one by name, or --quick; goes on where it was interrupted
python scripts/performance.py --keep out/bench/….json --machine "what to call it"
```

Every row is measured in one run, all contenders on the same inputs, their gradients compared first, interleaved. A loop whose time more than trebles
with twice the steps is no baseline, and no ratio is given. Which method is chosen for your own problem, and what it costs, is told without running anything:

```python
import jax.numpy as jnp
import parscan

step = lambda h, x: (jnp.tanh(0.5 * h + x), None)
print(parscan.plan(step, jnp.zeros((16, 20)), jnp.ones((3000, 16, 20))))
```
"""


def rounded(value: Any) -> Any:
    """The same, floating-point numbers to four digits."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def contents(docs: Path) -> dict[str, dict[str, Any]]:
    """From a file's name to what it holds."""
    try:
        found = {path.stem: json.loads(path.read_text()) for path in sorted((docs / "results").glob("*.json"))}
        for name, content in found.items():
            if not {"where", "machine", "platform", "suites"} <= set(content):
                raise ValueError(name)
    except (ValueError, TypeError) as error:
        raise click.ClickException(f"no file of kept results: {error}") from None
    return found


def section(name: str, content: dict[str, Any], drawn: bool, told: bool) -> list[str]:
    """A machine's part of the page."""
    where = f"{content['machine']}: {content['where']}"
    parts = [f"## {content['machine']}, jax {_jax(content)}"]
    if drawn:
        parts.append(f"![The gain of auto over lax.scan, by steps and coordinates](results/{name}.png)")
    for suite in SUITE_NAMES:
        if rows := content["suites"].get(suite):
            quick = " From a quick run, a few small rows." if all(row.get("quick") for row in rows) else ""
            parts += [f"### {suite}", f"{SUITES[suite].about} {MEANINGS[suite]}", f"{where}.{quick}", table(suite, rows)]
            if suite == "auto" and told:
                parts.append(f"![Times that plans tell beside the times measured](results/{name}-told.png)")
    missing = [suite for suite in SUITE_NAMES if not content["suites"].get(suite)]
    return [*parts, *([f"Unmeasured here: {', '.join(missing)}."] if missing else [])]


def page(docs: Path, draw: bool) -> str:
    """The whole page; its pictures are drawn if wanted, and are named where they have something to show."""
    found = contents(docs)
    parts = [INTRODUCTION.strip(), f"Columns of times: {COLUMNS}"]
    absent = [title for platform, title in ACCELERATORS.items() if all(one["platform"] != platform for one in found.values())]
    if absent:
        parts.append(f"On a {' and on a '.join(absent)} these suites are unmeasured.")
    for name, content in found.items():
        drawn = picture(content["suites"], f"{content['machine']}: {content['where']}", docs / "results" / f"{name}.png" if draw else None)
        told = predicted(content["suites"], f"{content['machine']}, jax {_jax(content)}", docs / "results" / f"{name}-told.png" if draw else None)
        parts += section(name, content, drawn, told)
    return "\n\n".join(parts) + "\n"


def _jax(content: dict[str, Any]) -> str:
    return content["where"].split("jax ")[1].split(",")[0]


BEGIN, END = "<!-- made by scripts/performance.py -->", "<!-- end -->"


def readme(text: str, docs: Path) -> str:
    """README with what `auto` is worth, by every file that tells, between its two marks."""
    lines = []
    for content in contents(docs).values():
        rows = content["suites"].get("auto", ())
        for seed, some in by_seed([row for row in rows if not row.get("quick")]).items():
            lines.append([content["machine"], _jax(content), str(seed), *in_short(some)])
    head = ["machine", "JAX", "seed", "problems", "gain ×", "gain ×, 8 < B·n ≤ 256", "lost", "the worst of these, × the best baseline's time"]
    before, _, rest = text.partition(BEGIN)
    return "\n\n".join([before + BEGIN, markdown(head, lines), END + rest.partition(END)[2]])


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--check", is_flag=True, help="Write nothing; fail if the page is not current.")
@click.option("--keep", "source", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file of bench.py's suites to put among the results.")
@click.option("--machine", help="What the page calls the machine of that file; its device if not given.")
@click.option("--docs", default=DOCS, type=click.Path(exists=True, file_okay=False, path_type=Path), help="The folder of the page.  [default: docs]")
def main(check: bool, source: Path | None, machine: str | None, docs: Path) -> None:
    target, front = docs / PAGE, docs.parent / "README.md"
    if check:
        if not target.exists() or target.read_text() != page(docs, draw=False):
            raise click.ClickException(f"{target.name} is not what the results say: run scripts/performance.py")
        if front.exists() and front.read_text() != readme(front.read_text(), docs):
            raise click.ClickException(f"{front.name} is not what the results say: run scripts/performance.py")
        click.echo(f"{target.name} is current")
        return
    if source is not None:
        try:
            content = json.loads(source.read_text())
            content = {"where": content["where"], "machine": machine or content["where"].split(",")[0], **rounded(content)}
            keep(docs / "results" / source.name, content, indent=0)
        except (ValueError, KeyError, TypeError):
            raise click.BadParameter(f"{source} is no file of results", param_hint="--keep") from None
    target.write_text(page(docs, draw=True))
    if front.exists():
        front.write_text(readme(front.read_text(), docs))
    click.echo(f"wrote {target.name}")


if __name__ == "__main__":
    main()
