#!/usr/bin/env python
"""Random programs: is what is proved of a step's structure right, and is it tight?

Programs are drawn by Hypothesis, half of them from at least thirty primitives, half from elementwise operations, broadcast, transpose, reduce and
dot alone. Of each, `jax.jacobian` in float64 at random points must not have one non-zero outside the proved pattern, nor outside the blocks that
are found index by index, nor outside those of the layout that is used. In the second half, block sizes are compared with those that the Jacobians
show.

Programs come in chunks, each with a seed of its own, recorded in a file as they are finished: stop at any time, and start again with the same
options to go on.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click
from chunks import finished, options

CHUNK = 200
TIGHT = 0.95
KINDS = (("index by index", "tight"), ("layout", "tight layout"), ("one block", "dense"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def run_chunk(seed: int, chunk: int, count: int) -> dict[str, Any]:
    """What `count` programs show; odd chunks are of few primitives."""
    from fuzzing import tally

    found = tally(narrow=bool(chunk % 2), count=count, seed=f"{seed}:{chunk}")
    return {"narrow": found.narrow, "counts": found.counts, "primitives": found.primitives, "violations": found.violations}


def summary(chunks: list[dict[str, Any]]) -> tuple[str, bool]:
    """The whole run in words, and whether it is as it should be."""
    lines, fine, primitives, violations = [], True, Counter(), []
    for narrow, name in ((False, "all primitives"), (True, "elementwise, broadcast, transpose, reduce, dot")):
        counts: Counter[str] = Counter()
        for chunk in chunks:
            if chunk["narrow"] == narrow:
                counts.update(chunk["counts"])
        programs = max(1, counts["programs"])
        shares = (f"{kind} {counts[key] / programs:.1%}" for kind, key in KINDS)
        lines.append(f"{name}: {counts['programs']} programs, {counts['distinct']} of them distinct; block sizes as shown: {', '.join(shares)}")
        fine = fine and (not narrow or counts["tight"] >= TIGHT * counts["programs"])
    for chunk in chunks:
        primitives.update(chunk["primitives"])
        violations += chunk["violations"]
    lines.append(f"{len(primitives)} primitives (programs with each): " + ", ".join(f"{name} {count}" for name, count in primitives.most_common()))
    lines.append(f"{len(violations)} violations" + "".join(f"\n  {violation}" for violation in violations))
    return "\n".join(lines), fine and not violations


@click.command(help=__doc__)
@options(20000, "fuzz_structure.json")
def main(**run: Any) -> None:
    chunks, _ = finished(run_chunk, size=CHUNK, **run)
    text, fine = summary(chunks)
    click.echo(text)
    sys.exit(not fine)


if __name__ == "__main__":
    main()
