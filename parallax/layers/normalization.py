"""Root-mean-square normalisation.

Invariant: statistics are taken in float32 whatever the compute dtype.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from parallax.axes import param, read


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x²) + ε) · g over the last dim (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)."""

    def __init__(self, dim: int, axis: str, *, eps: float, rngs: nnx.Rngs):
        self.eps = eps
        ones = jax.nn.initializers.ones
        self.scale = param(ones, rngs.params(), (dim,), (axis,), inputs=(), decays=False, role="input")

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., dim] to [..., dim], in the dtype of x."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(read(self.scale, wide.dtype), tuple(range(x.ndim - 1)))
        return (normed * scale).astype(x.dtype)
