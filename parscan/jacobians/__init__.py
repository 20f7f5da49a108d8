"""Kinds of Jacobian: how a linear map is stored, applied, multiplied, recognised and formed. One kind, one file."""

from parscan.jacobians.base import Evidence, Form, Index, Jacobian, Pattern, balanced_columns, kind
from parscan.jacobians.blocks import BlockDiagonal, DirectSum, alike, closed, matched, product, split
from parscan.jacobians.dense import Dense
from parscan.jacobians.diagonal import Diagonal, Identity
from parscan.jacobians.permutation import Permutation
from parscan.jacobians.products import TABLE
from parscan.jacobians.registry import KINDS, recognised, register

__all__ = [
    "KINDS",
    "TABLE",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "DirectSum",
    "Evidence",
    "Form",
    "Identity",
    "Index",
    "Jacobian",
    "Pattern",
    "Permutation",
    "alike",
    "balanced_columns",
    "closed",
    "kind",
    "matched",
    "product",
    "recognised",
    "register",
    "split",
]
