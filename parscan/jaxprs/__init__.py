"""All reading of jaxprs: their parameters change between JAX releases, so nobody else looks inside one."""

from parscan.jaxprs.contraction import contracted
from parscan.jaxprs.cost import flops, masks_nothing
from parscan.jaxprs.dependence import Dependence, Mixing, dependence, influenced_by, mixings
from parscan.jaxprs.obstacles import is_batchable, obstacle
from parscan.jaxprs.program import Flat, Program, jit_unless_staged, slice_spec, trace
from parscan.jaxprs.staging import staged
from parscan.jaxprs.variation import variation

__all__ = [
    "Dependence",
    "Flat",
    "Mixing",
    "Program",
    "contracted",
    "dependence",
    "flops",
    "influenced_by",
    "is_batchable",
    "jit_unless_staged",
    "masks_nothing",
    "mixings",
    "obstacle",
    "slice_spec",
    "staged",
    "trace",
    "variation",
]
