"""Where in the user's files an equation comes from."""

from __future__ import annotations

import os
from typing import Any

import jax

_LIBRARIES = tuple(os.path.dirname(os.path.abspath(module.__file__ or "")) + os.sep for module in (jax, __import__("jaxlib"), __import__("parscan")))


def where(eqn: Any) -> str:
    """`name at file.py:31`: an equation as the user would look for it."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not frame.file_name.startswith(_LIBRARIES) and not frame.file_name.startswith("<"):
            return f"`{eqn.primitive.name}` at {os.path.basename(frame.file_name)}:{frame.line_num}"
    return f"`{eqn.primitive.name}`"
