"""Dropout with its key as an argument.

Invariant: no module holds random state, so a model is a pure function of parameters, tokens and keys. A row has a key
of its own, and each of its heads and queries has one that follows from it, so that what is dropped does not depend on
how rows, heads and tokens are dealt to devices and microbatches.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zeroes values with probability `rate` and scales the rest by 1/(1-rate) (Srivastava et al. 2014).

    `keys` are one for each index of the first dims of x. Without any, or at rate 0, x returns unchanged: that is
    evaluation.
    """
    if keys is None or rate == 0:
        return x
    kept = _each(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[keys.ndim :]), keys)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


def fold_in(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """Other keys for the same dims."""
    return _each(lambda key: jax.random.fold_in(key, number), keys)


def split(keys: jax.Array, *sizes: int) -> jax.Array:
    """More keys: [*keys.shape, *sizes]."""
    return _each(lambda key: jax.random.split(key, sizes), keys)


def _each(function: Callable, keys: jax.Array) -> jax.Array:
    """`function` of each key, whose results are arrays."""
    for _ in range(keys.ndim):
        function = jax.vmap(function)
    return function(keys)
