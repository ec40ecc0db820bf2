"""Root-mean-square normalisation.

Invariant: statistics are taken in float32 whatever the compute dtype.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from parallax.axes import param, read


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x²) + ε) · g over the last dims (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4).

    g begins at 1, or at the multiplier that µP has for what comes out.
    """

    def __init__(
        self,
        dims: int | tuple[int, ...],
        axes: str | tuple[str, ...],
        *,
        eps: float,
        rngs: nnx.Rngs,
        multiplier: float = 1.0,
    ):
        self.eps = eps
        shape, names = (dims,) if isinstance(dims, int) else dims, (axes,) if isinstance(axes, str) else axes
        scale = functools.partial(param, inputs=(), decays=False, role="input", multiplier=multiplier)
        self.scale = scale(jax.nn.initializers.ones, rngs.params(), shape, names)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., dims] to [..., dims], in the dtype of x."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale = read(self.scale, wide.dtype)
        over = tuple(range(-scale.ndim, 0))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=over, keepdims=True) + self.eps)
        scale = jnp.expand_dims(scale, tuple(range(x.ndim - scale.ndim)))
        return (normed * scale).astype(x.dtype)
