"""Keys and values of the tokens so far.

Invariant: a token at position p is in slot p, so a query at position p sees exactly the slots up to p, and whatever
padding left in later slots is overwritten before anything sees it. How layers are laid out is known here alone.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from parallax.axes import constrain
from parallax.config import TransformerConfig


@chex.dataclass(frozen=True)
class KVCache:
    """Preallocated keys and values of all layers in the compute dtype; an argument and a result.

    One array [N, B, G, S, K], or listed, N of [B, G, S, K]. The tokens of a head are adjacent, as attention reads
    them: in another order each step would copy them all.
    """

    keys: jax.Array | tuple[jax.Array, ...]
    values: jax.Array | tuple[jax.Array, ...]

    @classmethod
    def create(cls, config: TransformerConfig, batch_size: int, capacity: int, *, listed: bool = False) -> "KVCache":
        """An empty cache for sequences of up to `capacity` tokens."""
        shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
        if listed:
            keys, values = (tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)) for _ in range(2))
        else:
            keys, values = (jnp.zeros((config.num_layers, *shape), config.dtype) for _ in range(2))
        return cls(keys=keys, values=values)

    @property
    def capacity(self) -> int:
        """S: how many tokens a row has room for."""
        return self.keys[0].shape[-2]

    def layer(self, number: int | jax.Array) -> "LayerCache":
        """What one block reads and writes; of listed arrays the number is an int."""
        keys, values = self.keys, self.values
        if isinstance(keys, tuple) or isinstance(values, tuple):
            return LayerCache(keys=keys[number], values=values[number])
        return LayerCache(keys=keys, values=values, layer=number)

    def with_layer(self, number: int | jax.Array, layer: "LayerCache") -> "KVCache":
        """The cache after the block `number` wrote to what `layer` gave it."""
        if not isinstance(self.keys, tuple):
            return KVCache(keys=layer.keys, values=layer.values)
        keys, values = list(self.keys), list(self.values)
        keys[number], values[number] = layer.keys, layer.values
        return KVCache(keys=tuple(keys), values=tuple(values))

    def resize(self, capacity: int) -> "KVCache":
        """The same with room for `capacity` tokens a row: fewer slots from the first on, or more that are empty."""
        by = capacity - self.capacity

        def resized(x: jax.Array) -> jax.Array:
            return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, by * (dim == x.ndim - 2), 0) for dim in range(x.ndim)])

        return jax.tree.map(resized, self)

    def with_row(self, row: jax.Array, other: "KVCache") -> "KVCache":
        """The same with a row from a cache of one row, which has as much room."""

        def put(x: jax.Array, part: jax.Array) -> jax.Array:
            at = [row if dim == x.ndim - 4 else 0 for dim in range(x.ndim)]
            return jax.lax.dynamic_update_slice(x, part, at)

        return jax.tree.map(put, self, other)

    def constrained(self) -> "KVCache":
        """The same with rows and heads over the devices, where a placement is bound."""
        names = (None, "batch", "act_kv_heads", None, None)
        return jax.tree.map(lambda x: constrain(x, *names[-x.ndim :]), self)


@chex.dataclass(frozen=True)
class LayerCache:
    """One layer's view of the whole cache, writing in place, so that a scan over layers copies nothing.

    Where `layer` is None the arrays are the layer's own.
    """

    keys: jax.Array
    values: jax.Array
    layer: int | jax.Array | None = None

    @property
    def listed(self) -> bool:
        return self.layer is None

    def write(self, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array) -> "LayerCache":
        """Puts T tokens a row into the slots of their positions, [B, T]; a position beyond the room is dropped."""
        B, T, G, _ = k_BTGK.shape
        rows_B1, slots_BT = jnp.arange(B)[:, None], jnp.broadcast_to(positions_BT, (B, T))
        at = (self.layer, rows_B1, slice(None), slots_BT)
        if self.listed:
            # With heads as a slice XLA copies a lone row's cache four times a token on CPUs, which take NANO 1.5 times
            # as long. Over a mesh a slice is better: named, heads are gathered from all devices.
            at = (rows_B1[..., None], jnp.arange(G), slots_BT[..., None])
        return dataclasses.replace(self, keys=self.keys.at[at].set(k_BTGK), values=self.values.at[at].set(v_BTGK))

    def read(self) -> tuple[jax.Array, jax.Array]:
        """This layer's keys and values, [B, S, G, K]."""
        own = (self.keys, self.values)
        keys, values = own if self.listed else (x[self.layer] for x in own)
        return jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
