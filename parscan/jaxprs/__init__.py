"""All reading of jaxprs: their parameters change between JAX releases, so nobody else looks inside one."""

from parscan.jaxprs.contraction import contracted
from parscan.jaxprs.cost import flops, flops_on, masks_nothing, moves_only
from parscan.jaxprs.dependence import Dependence, dependence
from parscan.jaxprs.elements import components, pattern, variation
from parscan.jaxprs.obstacles import is_batchable, obstacle
from parscan.jaxprs.program import Flat, Program, equations, jit_unless_staged, slice_spec, trace
from parscan.jaxprs.staging import staged

__all__ = [
    "Dependence",
    "Flat",
    "Program",
    "components",
    "contracted",
    "dependence",
    "equations",
    "flops",
    "flops_on",
    "is_batchable",
    "jit_unless_staged",
    "masks_nothing",
    "moves_only",
    "obstacle",
    "pattern",
    "slice_spec",
    "staged",
    "trace",
    "variation",
]
