"""Kinds of Jacobian: how a linear map is stored, applied, multiplied, recognised and formed. One kind, one file."""

from parscan.jacobians.banded import Banded
from parscan.jacobians.base import Evidence, Form, Index, Jacobian, Pattern, balanced_columns, kind
from parscan.jacobians.blocks import BlockDiagonal, DirectSum, alike, closed, grows, split
from parscan.jacobians.dense import Dense
from parscan.jacobians.diagonal import Diagonal, Identity
from parscan.jacobians.kronecker import Kronecker
from parscan.jacobians.lowrank import LowRank
from parscan.jacobians.permutation import Permutation
from parscan.jacobians.products import TABLE, matched, product
from parscan.jacobians.registry import KINDS, recognised, register
from parscan.jacobians.sparse import Sparse

__all__ = [
    "KINDS",
    "TABLE",
    "Banded",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "DirectSum",
    "Evidence",
    "Form",
    "Identity",
    "Index",
    "Jacobian",
    "Kronecker",
    "LowRank",
    "Pattern",
    "Permutation",
    "Sparse",
    "alike",
    "balanced_columns",
    "closed",
    "grows",
    "kind",
    "matched",
    "product",
    "recognised",
    "register",
    "split",
]
