"""Where in the user's files an equation comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

_LIBRARIES = tuple(os.path.dirname(os.path.abspath(module.__file__ or "")) + os.sep for module in (jax, __import__("jaxlib"), __import__("parscan")))


def where(eqn: Any, callers: Mapping[int, Any] = MappingProxyType({})) -> str:
    """`name at file.py:31`, or `name in line 31 of a cell`: an equation as the user would look for it.

    callers: from the id of an equation inside another's program to that other one: an equation of JAX's own, inside `jnp.convolve` say, is where that
    is called.
    """
    at = eqn
    while at is not None:
        traceback = at.source_info.traceback
        for frame in traceback.frames if traceback is not None else ():
            if not frame.file_name.startswith(_LIBRARIES) and not frame.file_name.startswith("<"):
                folder, name = os.path.split(frame.file_name)
                if os.path.basename(folder).startswith("ipykernel_"):  # where a notebook's kernel says that its cells are, by a number
                    return f"`{eqn.primitive.name}` in line {frame.line_num} of a cell"
                return f"`{eqn.primitive.name}` at {name}:{frame.line_num}"
        at = callers.get(id(at))
    return f"`{eqn.primitive.name}`"
