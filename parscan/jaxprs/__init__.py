"""All reading of jaxprs: their parameters change between JAX releases, so nobody else looks inside one."""

from parscan.jaxprs.contraction import contracted
from parscan.jaxprs.cost import flops, masks_nothing
from parscan.jaxprs.dependence import Dependence, dependence
from parscan.jaxprs.elements import components, pattern
from parscan.jaxprs.obstacles import is_batchable, obstacle
from parscan.jaxprs.program import Flat, Program, jit_unless_staged, slice_spec, trace
from parscan.jaxprs.staging import staged

__all__ = [
    "Dependence",
    "Flat",
    "Program",
    "components",
    "contracted",
    "dependence",
    "flops",
    "is_batchable",
    "jit_unless_staged",
    "masks_nothing",
    "obstacle",
    "pattern",
    "slice_spec",
    "staged",
    "trace",
]
