"""All reading of jaxprs: their parameters change between JAX releases, so nobody else looks inside one."""

from parscan.jaxprs.cost import flops
from parscan.jaxprs.dependence import MIXED, Dependence, dependence
from parscan.jaxprs.obstacles import has_effects, obstacle
from parscan.jaxprs.program import Program, slice_spec, trace
from parscan.jaxprs.staging import staged

__all__ = ["MIXED", "Dependence", "Program", "dependence", "flops", "has_effects", "obstacle", "slice_spec", "staged", "trace"]
