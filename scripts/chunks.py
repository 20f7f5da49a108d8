"""Long runs in chunks, some at a time, each in a process of its own and recorded in a file as it is finished."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm


def apart(run_chunk: Callable, *arguments: int) -> dict[str, Any]:
    """In a new process, with which all goes that it has compiled."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run_chunk, *arguments).result()


def settings() -> None:
    """Double precision, and machine code that is quick to make; for JAX, when it is imported."""
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    os.environ["JAX_ENABLE_X64"] = "1"


def finished(run_chunk: Callable[[int, int, int], dict[str, Any]], examples: int, size: int, seed: int, path: Path, workers: int) -> tuple[list[dict], float]:
    """Results of `run_chunk(seed, chunk, count)` for all chunks, and the seconds they took; of those that are finished, if it is stopped."""
    settings()
    state = json.loads(path.read_text()) if path.exists() else {"seed": seed, "seconds": 0.0, "chunks": {}}
    if state["seed"] != seed:
        raise click.UsageError(f"{path} holds a run with seed {state['seed']}; got --seed {seed}.")
    sizes = {str(chunk): min(size, examples - chunk * size) for chunk in range(-(-examples // size))}
    missing = [chunk for chunk, count in sizes.items() if state["chunks"].get(chunk, {}).get("examples") != count]
    before, begin = state.get("seconds", 0.0), time.monotonic()
    pool = ThreadPoolExecutor(workers)
    try:
        running = {pool.submit(apart, run_chunk, seed, int(chunk), sizes[chunk]): chunk for chunk in missing}
        for done in tqdm(as_completed(running), unit="chunk", initial=len(sizes) - len(missing), total=len(sizes)):
            state["chunks"][running[done]] = {"examples": sizes[running[done]], **done.result()}
            state["seconds"] = before + time.monotonic() - begin
            written = path.with_suffix(".tmp")
            written.write_text(json.dumps(state))
            written.replace(path)
    except KeyboardInterrupt:
        click.echo("Stopped; start again with the same options to go on.")
    finally:
        pool.shutdown(cancel_futures=True)
    return [state["chunks"][chunk] for chunk in sizes if chunk in state["chunks"]], state["seconds"]


def options(examples: int, state: str) -> Callable:
    """The command line of such a run."""
    some = [
        click.option("--examples", default=examples, show_default=True, help="How many."),
        click.option("--seed", default=0, show_default=True, help="Of all that is random."),
        click.option("--state", "path", type=click.Path(path_type=Path), default=Path(state), show_default=True, help="Finished chunks."),
        click.option("--workers", default=os.cpu_count(), show_default="one a processor", help="How many processes."),
    ]

    def decorated(command):
        for option in reversed(some):
            command = option(command)
        return command

    return decorated
