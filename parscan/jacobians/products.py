"""Products of two Jacobians: which kind they give, in one table."""

from __future__ import annotations

from typing import Any

import jax

from parscan.jacobians.banded import Banded
from parscan.jacobians.dense import Dense
from parscan.jacobians.diagonal import Diagonal, Identity
from parscan.jacobians.lowrank import LowRank
from parscan.jacobians.permutation import Permutation
from parscan.jacobians.sparse import Sparse

# What `second · first` is kept as: the cheapest kind that both can be written as, and whose products are of that kind again.
# Both are written as that kind, then multiplied by its own `after`. `Dense` is not written out: the other map is applied to its columns, or rows.
# Two of a kind that is not listed multiply by their own `after`; with any other kind they give a Dense. So do two that fill in as they grow, and
# two Kronecker products with a scale in between.
TABLE = """
second / first  Identity     Permutation  Diagonal     Banded       Sparse       LowRank      Kronecker
Identity        Identity     Permutation  Diagonal     Banded       Sparse       LowRank      Kronecker
Permutation     Permutation  Permutation  Permutation  Sparse       Sparse       Dense        Dense
Diagonal        Diagonal     Permutation  Diagonal     Banded       Sparse       LowRank      Dense
Banded          Banded       Sparse       Banded       Banded       Sparse       Dense        Dense
Sparse          Sparse       Sparse       Sparse       Sparse       Sparse       Dense        Dense
LowRank         LowRank      Dense        LowRank      Dense        Dense        LowRank      Dense
Kronecker       Kronecker    Dense        Dense        Dense        Dense        Dense        Kronecker
"""
_ROWS = [line.split() for line in TABLE.strip().splitlines()]
_NAMES = _ROWS[0][3:]
_RESULT = {(row[0], first): result for row in _ROWS[1:] for first, result in zip(_NAMES, row[1:], strict=True)}


def matched(second: Any, first: Any) -> tuple[Any, Any]:
    """Both maps as `product` needs them: written as the kind that their product is kept as, unless that is a Dense."""
    if type(second) is type(first):
        return second.paired(first)
    if isinstance(second, Identity) or isinstance(first, Identity):
        return second, first
    result = _RESULT.get((type(second).__name__, type(first).__name__), "Dense")
    if result != "Dense":
        return _written_as(result, second), _written_as(result, first)
    return second, first if first.shifts_freely else Dense(first.to_dense())


def product(second: Any, first: Any) -> Any:
    """second · first, `first` being applied first."""
    second, first = matched(second, first)
    if type(second) is type(first):
        return second.after(first)
    if isinstance(second, Identity) or isinstance(first, Identity):
        return first if isinstance(second, Identity) else second
    if isinstance(second, Dense):  # its rows through the transpose of the other
        return Dense(jax.vmap(first.transpose().apply, in_axes=-2, out_axes=-2)(second.matrix))
    return Dense(jax.vmap(second.apply, in_axes=-1, out_axes=-1)(first.to_dense()))


def _written_as(name: str, one: Any) -> Any:
    return one if type(one).__name__ == name else _KINDS[name].of(one)


_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Diagonal, Permutation, Banded, Sparse, LowRank)}
