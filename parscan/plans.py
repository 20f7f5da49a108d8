"""`plan`: what would be done, and why, without running anything."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from parscan.chains import Layers
from parscan.claims import parse_structure
from parscan.methods import Method, Sequential, parse_method
from parscan.network import is_sequence, read_sequence
from parscan.planning import plan_chain
from parscan.report import Plan
from parscan.scanning import traced_scan


def plan(
    f: Callable | Layers,
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    *,
    method: Method | str = "auto",
    structure: Any = "auto",
) -> Plan:
    """What `scan` would do with these arguments, or `parallel_backward` with a sequence of layers, why, and at what cost, without running anything.

    Args:
        f: as for `scan`, or a sequence of L layers.
        init: as for `scan`, or a sequence of the layers' parameters; arrays may be `jax.ShapeDtypeStruct` here and below.
        xs: as for `scan`, or the list of activations h_0 … h_L, of which only h_0 is needed.
        length, reverse: as for `scan`; not for a sequence of layers.
        method, structure: as for `scan`.

    Returns:
        a `Plan`, with the kind of the Jacobians, their blocks and which equation makes them so, the method with its sizes and the reason; depth,
        arithmetic and memory beside those of the sequential pass; what a gradient is told to take by every method; for layers the runs and
        stretches, too. `print` shows it as a table, `spy()` draws the Jacobian.

    Raises:
        ValueError: as `scan` does, or `parallel_backward`, for these arguments.
        TypeError: likewise.

    Example:
        >>> def f(h, x):
        ...     return jax.nn.sigmoid(x) * (h @ jnp.ones((8, 8))), None
        >>> print(parscan.plan(f, jnp.zeros((4, 8)), jnp.ones((1000, 4, 8))))
        method      ...(...), length 1000
        reason      4 blocks of 8 on a CPU: ...
        structure   BlockDiagonal, 4 blocks of 8
        why         `dot_general`... mixes the last axis of `h`
        depth       ... operations one after another; 1000 steps
                        FLOPs      bytes
        forming     ...
        up-sweep          0         0 B
        down-sweep  ...
        total       ...
        sequential      544 k     128 kB
        gradient by      told      holds
        Lax         ...
        Sequential  ...
        Walk        ...
        Associative ...
        Tree        ...
        Chunked     ...
        >>> block = lambda w, h: h + jnp.tanh(h @ w)
        >>> parscan.plan([block] * 9 + [lambda _, h: h.sum()], [jnp.ones((3, 3))] * 9 + [None], [jnp.ones(3)]).runs
        (9, 1)
    """
    parsed, claim = parse_method(method), parse_structure(structure)
    if is_sequence(f):
        return _of_layers(f, init, xs, parsed, claim)
    f_: Any = f
    traced = traced_scan(f_, init, xs, length, reverse, parsed, claim)
    if traced is None:
        jax.eval_shape(lambda init, xs: lax.scan(f_, init, xs, length, reverse), init, xs)
        raise ValueError("`lax.scan` accepts these arguments, but parscan cannot read them; it leaves them to `lax.scan`.")
    return traced.plan.named([traced.state] * 2, _parameter(f, 0))


def _of_layers(layers: Any, params: Any, activations: Any, method: Any, claim: Any) -> Plan:
    if not isinstance(activations, Sequence) or len(activations) not in (1, len(layers) + 1):
        raise ValueError(f"For a sequence of {len(layers)} layers the third argument must be the list h_0 … h_L of activations, or [h_0].")
    network = read_sequence(layers, params, activations)
    found = plan_chain(network.steps, method, claim, fallback=Sequential())[0]
    trees = [network.tree, *(link.tree for link in network.links)]
    return found.named([jax.tree.unflatten(tree, range(tree.num_leaves)) for tree in trees], _parameter(layers[0], 1) if layers else "h")


def _parameter(f: Any, place: int) -> str:
    """What a function calls its parameter at this place; `h` if it has no name for it."""
    try:
        found = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):  # a builtin
        return "h"
    named = len(found) > place and found[place].kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return found[place].name if named else "h"
