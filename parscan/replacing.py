"""`replacing_lax_scan`: loops in code that one did not write are scanned in parallel, too."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jax import lax

from parscan.claims import parse_structure
from parscan.methods import Method, parse_method
from parscan.scanning import scan

_chosen: ContextVar[Callable | None] = ContextVar("parscan_replacing_lax_scan", default=None)  # of this thread, or task
_lock = threading.Lock()
_users = 0
_original: Callable = lax.scan
_before: Callable = lax.scan  # what stood in its place before the first user came


@functools.wraps(lax.scan)
def _dispatch(*args: Any, **kwargs: Any) -> Any:
    """What stands in `jax.lax.scan`'s place meanwhile: right for those who have not asked for it, too, and for parscan's own loops."""
    ours = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "parscan"
    return (_original if ours else _chosen.get() or _original)(*args, **kwargs)


@contextmanager
def replacing_lax_scan(*, method: Method | str = "auto", structure: Any = "auto", debug: bool = False) -> Iterator[None]:
    """Within it, or in a function that it decorates, `jax.lax.scan` is `parscan.scan`: for frameworks that let no scan be passed.

    In this thread alone, and where `scan` is looked up in `jax.lax` when it is called, as Flax, Equinox and Optax do; a name bound by
    `from jax.lax import scan` stays what it is, and so do `lax.map`, `fori_loop` and the like. It acts while a function is traced: what `jax.jit` has compiled
    before or inside stays as it was compiled. So decorate the function that is to be traced, inside `jax.jit`.

    Args:
        method: as for `scan`, for every loop that is met; an explicit parallel method raises where one of them cannot be parallel.
        structure, debug: as for `scan`, for every loop that is met.

    Raises:
        ValueError: on entering, `method` or `structure` is a name that is not known.
        TypeError: on entering, they are neither a name nor a method, or a claim.

    Example:
        >>> loss = lambda h: jax.lax.scan(f, h, xs)[1].sum()  # somebody else's
        >>> parallel = parscan.replacing_lax_scan(method="tree")(loss)
        >>> jax.jit(jax.grad(parallel))(init).shape
        (4,)
    """
    parse_method(method)  # raises now, not at the first loop
    parse_structure(structure)
    token = _chosen.set(functools.partial(scan, method=method, structure=structure, debug=debug))
    try:
        _install()
        try:
            yield
        finally:
            _remove()
    finally:
        _chosen.reset(token)


def _install() -> None:
    global _users, _before
    with _lock:
        if not _users:
            _before = _original if lax.scan is _dispatch else lax.scan
            lax.scan = _dispatch
        _users += 1


def _remove() -> None:
    """The last one puts back what was there, unless another has put something of its own there since."""
    global _users
    with _lock:
        _users -= 1
        if not _users and lax.scan is _dispatch:
            lax.scan = _before
