"""Double precision is on for the whole suite: float32 cases ask for float32.

Most of the suite's time is XLA's code generation. XLA's own passes, which decide what is fused and folded, stay as they are; machine code is
not optimised any further, and where the release has an older way of emitting fusions, which takes half the time to compile, it is taken, and so
is one module of machine code for each program, where cutting it up for several threads takes a sixth longer.
The scripts are run as any user runs them, fully optimised. `XLA_FLAGS`, where it is set, takes the place of all this.

Programs are millions of small Python objects, none of which is garbage until a test is over: the collector looks for some less often.
"""

import gc
import importlib.metadata
import os

os.environ.setdefault(  # jaxlib 0.12 does not know the others, and an unknown one ends the process
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1" * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import jax

jax.config.update("jax_enable_x64", True)
gc.set_threshold(200_000, 20, 100)
