"""Double precision is on for the whole suite: float32 cases ask for float32.

Most of the suite's time is LLVM's. XLA's own passes, which decide what is fused and folded, stay as they are; machine code is not
optimised any further, unless `XLA_FLAGS` is set.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

jax.config.update("jax_enable_x64", True)
