"""Kinds of Jacobian: how a linear map is stored, applied, multiplied, recognised and formed. One kind, one file."""

from parscan.jacobians.banded import Banded
from parscan.jacobians.base import Evidence, Form, Index, Jacobian, Pattern
from parscan.jacobians.blocks import BlockDiagonal, DirectSum
from parscan.jacobians.dense import Dense
from parscan.jacobians.diagonal import Diagonal, Identity
from parscan.jacobians.kronecker import Kronecker
from parscan.jacobians.lowrank import LowRank
from parscan.jacobians.permutation import Permutation
from parscan.jacobians.products import TABLE, matched, product
from parscan.jacobians.sparse import Sparse

__all__ = [
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
    "matched",
    "product",
]
