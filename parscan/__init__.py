"""parscan: the backward pass of a long chain, in parallel.

A chain of maps `h_i = f(θ_i, h_{i-1})`, i = 1 … L (time steps of a recurrence, layers of a network). With the Jacobians
`J_i = ∂f/∂h_{i-1}` at the stored states and a cotangent `c_i` injected at each of them,

    g_L = c_L,    g_{i-1} = J_iᵀ g_i + c_{i-1},    ∂loss/∂θ_i = (∂f/∂θ_i)ᵀ g_i.

The J_i are independent of one another, and affine maps compose associatively: the g_i come out of a parallel prefix in depth
O(log L) instead of L. Notation used throughout: L steps; n coordinates of the state, in B blocks of width m that never mix;
*tangents* travel with the chain, *cotangents* against it; a value *enters* and *leaves* each map.

Public names: `scan`, `chain`, `forward`, `parallel_backward`, `linear_scan`, `plan`, `calibrate`, `calibration`, `replacing_lax_scan`; the methods
`Lax`, `Sequential`, `Walk`, `Associative`, `Tree`, `Chunked`, each a `Method`; the claims `Blocks` and `Band`; the Jacobian kinds `Identity`,
`Permutation`, `Diagonal`, `Banded`, `Sparse` with its `Pattern`, `LowRank`, `Kronecker`, `Dense`, `BlockDiagonal`, `DirectSum`; the results
`Gradients`, `Plan`, `Measured` with its `Machine`; `testing`, with `check_structure`.

The logger `parscan` says at DEBUG, whenever something is traced, which method was chosen, and why; at INFO if it was left to JAX since something in the
function cannot be parallel; at WARNING if a method that was asked for is not the one that is taken, or a calibration cannot be read. What the guard
decides is decided on the device, inside a compiled program, and no log can say it.
"""

import logging

from parscan import testing
from parscan.backward import Gradients, parallel_backward
from parscan.calibrating import Measured, calibrate, calibration
from parscan.chains import chain, forward
from parscan.claims import Band, Blocks
from parscan.jacobians import Banded, BlockDiagonal, Dense, Diagonal, DirectSum, Identity, Kronecker, LowRank, Pattern, Permutation, Sparse
from parscan.linear import linear_scan
from parscan.machines import Machine
from parscan.methods import Associative, Chunked, Lax, Method, Sequential, Tree, Walk
from parscan.plans import plan
from parscan.replacing import replacing_lax_scan
from parscan.report import Plan
from parscan.scanning import scan

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # nothing is printed unless the user asks for it

__all__ = [
    "Associative",
    "Band",
    "Banded",
    "BlockDiagonal",
    "Blocks",
    "Chunked",
    "Dense",
    "Diagonal",
    "DirectSum",
    "Gradients",
    "Identity",
    "Kronecker",
    "Lax",
    "LowRank",
    "Machine",
    "Measured",
    "Method",
    "Pattern",
    "Permutation",
    "Plan",
    "Sequential",
    "Sparse",
    "Tree",
    "Walk",
    "calibrate",
    "calibration",
    "chain",
    "forward",
    "linear_scan",
    "parallel_backward",
    "plan",
    "replacing_lax_scan",
    "scan",
    "testing",
]


def __dir__() -> list[str]:
    """What completion offers: not the modules that make it up."""
    return [*__all__, "__version__"]
