"""All reading of jaxprs: their parameters change between JAX releases, so nobody else looks inside one."""

from parscan.jaxprs.cost import flops
from parscan.jaxprs.dependence import MIXED, Dependence, dependence
from parscan.jaxprs.obstacles import has_effects, obstacle
from parscan.jaxprs.program import Flat, Program, being_staged, slice_spec, trace
from parscan.jaxprs.staging import staged

__all__ = ["MIXED", "Dependence", "Flat", "Program", "being_staged", "dependence", "flops", "has_effects", "obstacle", "slice_spec", "staged", "trace"]
