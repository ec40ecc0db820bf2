"""Dropout with its key as an argument.

Invariant: no module holds random state, so a model is a pure function of parameters, tokens and key.
"""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes values with probability `rate` and scales the rest by 1/(1-rate) (Srivastava et al. 2014).

    Without a key, or at rate 0, x returns unchanged: that is evaluation.
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))
