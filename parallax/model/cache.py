"""Keys and values of the tokens so far.

Invariant: a token at position p lies in slot p, so a query at position p sees exactly the slots up to p, and whatever
padding left in later slots is overwritten before anything sees it.
"""

import chex
import jax
import jax.numpy as jnp

from parallax.config import TransformerConfig


@chex.dataclass(frozen=True)
class KVCache:
    """Preallocated keys and values of all layers, [N, B, S, G, K] in the compute dtype; an argument and a result."""

    keys: jax.Array
    values: jax.Array

    @classmethod
    def create(cls, config: TransformerConfig, batch_size: int, max_len: int) -> "KVCache":
        """An empty cache for sequences of up to `max_len` tokens."""
        shape = (config.num_layers, batch_size, max_len, config.num_kv_heads, config.head_dim)
        return cls(keys=jnp.zeros(shape, config.dtype), values=jnp.zeros(shape, config.dtype))


@chex.dataclass(frozen=True)
class LayerCache:
    """One layer's view of the whole cache: writing in place, so that a scan over layers copies nothing."""

    cache: KVCache
    layer: jax.Array

    def write(self, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array) -> "LayerCache":
        """Puts T tokens a row into the slots of their positions, [B, T]."""
        rows = jnp.arange(k_BTGK.shape[0])[:, None]
        at = (self.layer, rows, jnp.broadcast_to(positions_BT, k_BTGK.shape[:2]))
        cache = KVCache(keys=self.cache.keys.at[at].set(k_BTGK), values=self.cache.values.at[at].set(v_BTGK))
        return LayerCache(cache=cache, layer=self.layer)

    def read(self) -> tuple[jax.Array, jax.Array]:
        """This layer's keys and values, [B, S, G, K]."""
        return self.cache.keys[self.layer], self.cache.values[self.layer]
