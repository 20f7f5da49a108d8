"""The kinds that a block may be found to be of."""

from __future__ import annotations

from parscan.jacobians.base import Evidence, Form, Jacobian
from parscan.jacobians.dense import Dense
from parscan.jacobians.diagonal import Diagonal, Identity
from parscan.jacobians.permutation import Permutation

KINDS: list[type[Jacobian]] = [Identity, Permutation, Diagonal, Dense]


def register(kind: type[Jacobian]) -> type[Jacobian]:
    """Adds a kind of the user's to those that are recognised, and returns it: a class decorator. To be called before anything is planned."""
    if kind not in KINDS:
        KINDS.append(kind)
    return kind


def recognised(evidence: Evidence) -> Form:
    """The form that takes the fewest bytes, the first of several."""
    forms = [form for kind in KINDS if (form := kind.recognised(evidence)) is not None]
    return min(forms, key=lambda form: form.abstract().nbytes)
