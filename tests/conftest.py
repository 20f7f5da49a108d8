"""Double precision is on for the whole suite: float32 cases ask for float32."""

import jax

jax.config.update("jax_enable_x64", True)
