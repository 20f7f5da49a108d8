#!/usr/bin/env python
"""Random scans: does `parscan.scan` give what `lax.scan` gives, whatever is done to it?

Scans are drawn by Hypothesis: a carry and inputs of any pytree (floats of three precisions, counters, flags, keys, nothing), a step of up to three
operations out of some eighty, 0 to 20 steps, either direction, a method; and a transformation, or one of another, out of grad, jvp, vmap, jit and
checkpoint. Values, derivatives, dtypes, weak types, structure and errors are compared; floats to 1e-9 of a leaf's norm in float64 (1e-4 in float32,
0.05 in bfloat16) plus 100 times the precision of everything's norm. Where `lax.scan` itself changes by more than a tenth of a difference as its arguments
are changed by four times the precision, the difference is called ill-conditioned.

Scans come in chunks, each with a seed of its own, recorded in a file as they are finished: stop at any time, and start again with the same
options to go on. `--shrink` runs one chunk again and raises the smallest scan that shows what is wrong with it.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click
from chunks import finished, options, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
CHUNK = 90


def run_chunk(seed: int, chunk: int, count: int) -> dict[str, Any]:
    """What `count` scans show."""
    from fuzzing import tally_of_scans

    found = tally_of_scans(count, f"{seed}:{chunk}")
    return {"counts": found.counts, "distinct": len(found.distinct), "violations": [f"chunk {chunk}: {violation}" for violation in found.violations]}


def summary(chunks: list[dict[str, Any]], seconds: float) -> str:
    """The whole run in words."""
    counts, violations = Counter(), [violation for chunk in chunks for violation in chunk["violations"]]
    for chunk in chunks:
        counts.update(chunk["counts"])
    scans = counts.pop("scans", 0)
    lines = [f"{name}: {count}" for name, count in sorted(counts.items())]
    lines.append(f"{scans} scans, {sum(chunk['distinct'] for chunk in chunks)} of them distinct, in {seconds / 60:.1f} minutes")
    lines.append(f"{len(violations)} disagreements" + "".join(f"\n{violation}" for violation in violations))
    return "\n".join(lines)


@click.command(help=__doc__)
@options(5000, "fuzz_scans.json")
@click.option("--shrink", type=int, help="A chunk to run again.")
def main(shrink: int | None, **run: Any) -> None:
    if shrink is not None:
        settings()
        from fuzzing import shrink_scans

        shrink_scans(CHUNK, f"{run['seed']}:{shrink}")
        sys.exit()
    chunks, seconds = finished(run_chunk, size=CHUNK, **run)
    click.echo(summary(chunks, seconds))
    sys.exit(any(chunk["violations"] for chunk in chunks))


if __name__ == "__main__":
    main()
