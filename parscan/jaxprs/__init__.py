"""All reading of jaxprs: their parameters change between JAX releases, so nobody else looks inside one."""

from parscan.jaxprs.ahead import cut_ahead
from parscan.jaxprs.contraction import contracted
from parscan.jaxprs.cost import (
    Work,
    bytes_of_variables,
    flops,
    flops_on,
    has_products,
    made_by_products,
    masks_nothing,
    moves_only,
    repeated,
    residuals,
    work,
    work_on,
)
from parscan.jaxprs.dependence import Dependence, Mixing, dependence, influenced_by, mixings
from parscan.jaxprs.elements import components, pattern
from parscan.jaxprs.factors import Cut, Separable, cuts, separable
from parscan.jaxprs.obstacles import is_batchable, obstacle
from parscan.jaxprs.precision import roundoff
from parscan.jaxprs.program import Flat, Program, equations, in_floats, is_staged, jit_unless_staged, slice_spec, trace
from parscan.jaxprs.staging import staged
from parscan.jaxprs.variation import variation

__all__ = [
    "Cut",
    "Dependence",
    "Flat",
    "Mixing",
    "Program",
    "Separable",
    "Work",
    "bytes_of_variables",
    "components",
    "contracted",
    "cut_ahead",
    "cuts",
    "dependence",
    "equations",
    "flops",
    "flops_on",
    "has_products",
    "in_floats",
    "influenced_by",
    "is_batchable",
    "is_staged",
    "jit_unless_staged",
    "made_by_products",
    "masks_nothing",
    "mixings",
    "moves_only",
    "obstacle",
    "pattern",
    "repeated",
    "residuals",
    "roundoff",
    "separable",
    "slice_spec",
    "staged",
    "trace",
    "variation",
    "work",
    "work_on",
]
