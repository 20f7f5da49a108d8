"""Files of results: one a machine, written after every row, gone on with after an interrupt, refused where they are another machine's."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax


def machine() -> str:
    """This machine and its versions, in words."""
    device = jax.devices()[0]
    cores = f"{os.cpu_count()} cores, " if device.platform == "cpu" else ""
    return f"{device.device_kind}, {cores}{platform.machine()}, jax {jax.__version__}, Python {platform.python_version()}, float32"


def usual() -> Path:
    """Where this machine's results go if nothing is said."""
    device = jax.devices()[0]
    return Path("out/bench") / (re.sub(r"[^a-z0-9.]+", "-", f"{device.device_kind} jax {jax.__version__}".lower()) + ".json")


def kept(path: Path, where: str, part: str = "results", option: str = "--json") -> Any:
    """What a file holds under the name `part`.

    Raises:
        click.BadParameter: it is no file of results, or one of another machine.
    """
    try:
        content = json.loads(path.read_text())
        found, some = content["where"], content[part]
    except (ValueError, KeyError, TypeError):
        raise click.BadParameter(f"{path} is no file of results: give another", param_hint=option) from None
    if found != where:
        raise click.BadParameter(f"{path} holds results of {found!r}, this is {where!r}: give another file", param_hint=option)
    return some


def keep(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """Written beside and moved, so that an interrupt leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=indent))
    beside.replace(path)


def too_large(error: BaseException) -> bool:
    """Whether an error says that there is no more memory."""
    return isinstance(error, MemoryError) or bool(re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)))


def measured(row: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a row, or the reason why there are none, in one line."""
    try:
        return {"row": row} | measure()
    except click.ClickException as error:  # gradients disagree, or its arrays are larger than allowed
        reason = error.message.removeprefix(f"{row}: ")
    except Exception as error:
        if not too_large(error):
            raise
        reason = "too large: no memory"
    return {"row": row, "skipped": " ".join(reason.split())}


def markdown(head: list[str], rows: list[list[Any]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))
