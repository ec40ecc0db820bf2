"""Token ids to vectors, and vectors to logits.

Invariant: logits are float32, whatever the compute dtype.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from parallax.axes import constrain, param
from parallax.config import TransformerConfig


class Embedding(nnx.Module):
    """A table of V vectors, read by `embed` and, as the output layer, by `unembed`.

    The initial deviation 1/(4√D) makes the first logits small (variance 1/16), so the first loss is near ln V.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        self.softcap = config.logit_softcap
        init = jax.nn.initializers.normal(0.25 * config.embed_dim**-0.5)
        self.table = param(init, rngs.params(), (config.vocab_size, config.embed_dim), ("vocab", "embed"))

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """[B, T] ids to [B, T, D]."""
        x_BTD = jnp.take(self.table[...].astype(self.dtype), tokens_BT, axis=0)
        return constrain(x_BTD, "batch", "length", "act_embed")

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to float32 logits [B, T, V], squashed to ±c by c·tanh(logit/c) when there is a soft cap.

        The cap is Gemma 2's (arXiv:2408.00118, section 2).
        """
        table_VD = self.table[...].astype(x_BTD.dtype)
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, table_VD, preferred_element_type=wide)
        logits_BTV = constrain(logits_BTV, "batch", "length", "act_vocab")
        return self.softcap * jnp.tanh(logits_BTV / self.softcap) if self.softcap else logits_BTV
