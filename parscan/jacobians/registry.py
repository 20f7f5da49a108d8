"""The kinds that a block may be found to be of."""

from __future__ import annotations

from parscan.jacobians.banded import Banded
from parscan.jacobians.base import Evidence, Form, Jacobian
from parscan.jacobians.dense import Dense
from parscan.jacobians.diagonal import Diagonal, Identity
from parscan.jacobians.kronecker import Kronecker
from parscan.jacobians.lowrank import LowRank
from parscan.jacobians.permutation import Permutation
from parscan.jacobians.sparse import Sparse

KINDS: list[type[Jacobian]] = [Identity, Diagonal, Permutation, Banded, Sparse, LowRank, Kronecker, Dense]


def register(kind: type[Jacobian]) -> type[Jacobian]:
    """Class decorator: adds a kind of the user's to those that are recognised.

    Args:
        kind: the class, made by `kind`.

    Returns:
        the same class.

    Example:
        >>> parscan.jacobians.register(parscan.Dense) is parscan.Dense  # which is there already
        True
    """
    if kind not in KINDS:
        KINDS.append(kind)
    return kind


def recognised(evidence: Evidence) -> Form:
    """The form that takes the fewest bytes, of those that pay beside a full matrix; the first of several."""
    dense = Dense.recognised(evidence)
    most = dense.abstract().nbytes
    forms = [form for kind in KINDS if (form := kind.recognised(evidence)) is not None and form.abstract().nbytes <= kind.pays_below * most]
    return min([*forms, dense], key=lambda form: form.abstract().nbytes)
