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
    """Preallocated keys and values of all layers in the compute dtype; an argument and a result.

    One array [N, B, G, S, K], or N of [B, G, S, K] after `unstack`. The tokens of a head lie together, as its products
    read them: in another order each step would copy them all.
    """

    keys: jax.Array | tuple[jax.Array, ...]
    values: jax.Array | tuple[jax.Array, ...]

    @classmethod
    def create(
        cls, config: TransformerConfig, batch_size: int, max_len: int, *, unstacked: bool = False
    ) -> "KVCache":
        """An empty cache for sequences of up to `max_len` tokens."""
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_len, config.head_dim)
        cache = cls(keys=jnp.zeros(shape, config.dtype), values=jnp.zeros(shape, config.dtype))
        return cache.unstack() if unstacked else cache

    @property
    def capacity(self) -> int:
        """S: how many tokens a row has room for."""
        return self.keys[0].shape[-2]

    def unstack(self) -> "KVCache":
        """The same with an array a layer."""
        return KVCache(keys=tuple(self.keys), values=tuple(self.values))

    def grow(self, capacity: int) -> "KVCache":
        """The same with room for `capacity` tokens, no fewer than now."""
        more = [(0, 0), (0, capacity - self.capacity), (0, 0)]
        return jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 3) + more), self)


@chex.dataclass(frozen=True)
class LayerCache:
    """One layer's view of the whole cache, writing in place, so that a scan over layers copies nothing.

    Where `layer` is None the arrays are the layer's own.
    """

    keys: jax.Array
    values: jax.Array
    layer: jax.Array | None = None

    def write(self, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array) -> "LayerCache":
        """Puts T tokens a row into the slots of their positions, [B, T]."""
        B, T, G, _ = k_BTGK.shape
        rows_B1, slots_BT = jnp.arange(B)[:, None], jnp.broadcast_to(positions_BT, (B, T))
        at = (self.layer, rows_B1, slice(None), slots_BT)
        if self.layer is None:
            # With heads as a slice XLA copies a lone row's cache four times a token on CPUs, which take NANO 1.5 times
            # as long. Over a mesh a slice is better: named, heads are gathered from all devices.
            at = (rows_B1[..., None], jnp.arange(G), slots_BT[..., None])
        keys, values = self.keys.at[at].set(k_BTGK), self.values.at[at].set(v_BTGK)
        return LayerCache(keys=keys, values=values, layer=self.layer)

    def read(self) -> tuple[jax.Array, jax.Array]:
        """This layer's keys and values, [B, S, G, K]."""
        own = (self.keys, self.values)
        keys, values = own if self.layer is None else (x[self.layer] for x in own)
        return jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
