"""One process-wide set-up for every test: eight simulated CPU devices, strict shapes.

Invariant: nothing here depends on which tests run, so any test can be run alone.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = ""  # a device count inherited from the shell would win over the one below

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
