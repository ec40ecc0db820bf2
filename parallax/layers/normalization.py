"""Root-mean-square normalisation.

Invariant: statistics are taken in float32 whatever the compute dtype.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from parallax.axes import param, read


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x²) + ε) · g over the last dims (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)."""

    def __init__(self, dims: int | tuple[int, ...], axes: str | tuple[str, ...], *, eps: float, rngs: nnx.Rngs):
        self.eps = eps
        shape, names = (dims,) if isinstance(dims, int) else dims, (axes,) if isinstance(axes, str) else axes
        ones = jax.nn.initializers.ones
        self.scale = param(ones, rngs.params(), shape, names, inputs=(), decays=False, role="input")

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., dims] to [..., dims], in the dtype of x."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale = read(self.scale, wide.dtype)
        over = tuple(range(-scale.ndim, 0))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=over, keepdims=True) + self.eps)
        scale = jnp.expand_dims(scale, tuple(range(x.ndim - scale.ndim)))
        return (normed * scale).astype(x.dtype)
