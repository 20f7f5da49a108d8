"""All reading of jaxprs: their parameters change between JAX releases, so nobody else looks inside one."""

from parscan.jaxprs.contraction import contracted
from parscan.jaxprs.cost import flops, masks_nothing
from parscan.jaxprs.dependence import Dependence, dependence
from parscan.jaxprs.factors import Cut, Separable, cuts, separable
from parscan.jaxprs.obstacles import is_batchable, obstacle
from parscan.jaxprs.program import Flat, Program, jit_unless_staged, slice_spec, trace
from parscan.jaxprs.staging import staged

__all__ = [
    "Cut",
    "Dependence",
    "Flat",
    "Program",
    "Separable",
    "contracted",
    "cuts",
    "dependence",
    "flops",
    "is_batchable",
    "jit_unless_staged",
    "masks_nothing",
    "obstacle",
    "separable",
    "slice_spec",
    "staged",
    "trace",
]
