"""One layer of the Transformer.

Invariant: the residual stream is only added to.
"""

import jax
from flax import nnx

from parallax.axes import constrain
from parallax.config import TransformerConfig
from parallax.layers.attention import Attention
from parallax.layers.cache import LayerCache
from parallax.layers.dropout import dropout
from parallax.layers.feedforward import SwiGLU
from parallax.layers.normalization import RMSNorm


class TransformerBlock(nnx.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)): pre-norm (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout_rate
        self.attention_norm = RMSNorm(config.embed_dim, "embed", eps=config.norm_eps, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, "embed", eps=config.norm_eps, rngs=rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: LayerCache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """[B, T, D] to [B, T, D], and the cache with these tokens in it."""
        keys = (None, None, None) if dropout_key is None else jax.random.split(dropout_key, 3)
        attended, cache = self.attention(self.attention_norm(x_BTD), positions_BT, segments_BT, cache, keys[0])
        x_BTD = x_BTD + dropout(attended, self.dropout_rate, keys[1])
        x_BTD = x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD)), self.dropout_rate, keys[2])
        return constrain(x_BTD, "batch", "length", "act_embed"), cache
