"""Keys and values of the tokens so far.

Invariant: a layer has a slot for each token that it may still see, and no more. Where it sees all, a token at position
p is in slot p, so a query at position p sees exactly the slots up to p, and whatever padding left in later slots is
overwritten before anything sees it. Where it has a window, its R slots are a ring: position p is in slot p mod R, and
which one a slot holds follows from the newest position of its row. How layers are laid out is known here alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from parallax.axes import constrain
from parallax.config import TransformerConfig
from parallax.pattern import stacks

Arrays = jax.Array | dict[str, jax.Array] | tuple[jax.Array, ...]
UNSEEN = jnp.iinfo(jnp.int32).max // 2
"""A position that no query reaches."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("keys", "values"), meta_fields=("capacity", "ahead", "limits")
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Preallocated keys and values of all layers in the compute dtype; an argument and a result.

    One array [N, B, G, S, K], or one for each stack of layers by its name, or listed, N of [B, G, S, K]. The tokens of
    a head are adjacent, as attention reads them: in another order each step would copy them all.
    """

    keys: Arrays
    values: Arrays
    capacity: int
    """How many tokens a row has room for."""
    ahead: int
    """How many of a row's tokens may be written and taken back."""
    limits: tuple[int, ...]
    """The most slots S of each array of the keys, as jax.tree lists them; 0 for as many as there are tokens."""

    @classmethod
    def create(
        cls, config: TransformerConfig, batch_size: int, capacity: int, ahead: int = 0, *, listed: bool = False
    ) -> "KVCache":
        """An empty cache for sequences of up to `capacity` tokens, of which `ahead` may be taken back."""

        def arranged(make: Callable[[TransformerConfig, tuple[int, ...]], Any]) -> Any:
            if listed:
                return tuple(make(layer, ()) for layer in config.layers)
            made = {stack.name: make(stack.config, (len(stack.numbers),)) for stack in stacks(config)}
            return made if len(made) > 1 else made[""]

        def limit(layer: TransformerConfig, dims: tuple[int, ...]) -> int:
            return layer.sliding_window + ahead if layer.sliding_window else 0

        def empty(layer: TransformerConfig, dims: tuple[int, ...]) -> jax.Array:
            slots = _slots(limit(layer, dims), capacity)
            return jnp.zeros((*dims, batch_size, layer.num_kv_heads, slots, layer.head_dim), layer.dtype)

        limits = tuple(jax.tree.leaves(arranged(limit)))
        return cls(keys=arranged(empty), values=arranged(empty), capacity=capacity, ahead=ahead, limits=limits)

    def layer(self, number: int | jax.Array, stack: str = "") -> "LayerCache":
        """What one block reads and writes, by its number in a stack or, an int, in the list."""

        def own(arrays: Arrays) -> jax.Array:
            if isinstance(arrays, tuple):
                return arrays[number]
            return arrays[stack] if isinstance(arrays, dict) else arrays

        at = None if isinstance(self.keys, tuple) else number
        return LayerCache(own(self.keys), own(self.values), at, self.capacity, self.ahead)

    def with_layer(self, number: int | jax.Array, layer: "LayerCache", stack: str = "") -> "KVCache":
        """The cache after a block wrote to what `layer` gave it."""

        def put(arrays: Arrays, own: jax.Array) -> Arrays:
            if isinstance(arrays, tuple):
                return tuple(own if n == number else x for n, x in enumerate(arrays))
            return arrays | {stack: own} if isinstance(arrays, dict) else own

        return dataclasses.replace(self, keys=put(self.keys, layer.keys), values=put(self.values, layer.values))

    def resize(self, capacity: int) -> "KVCache":
        """The same with room for `capacity` tokens a row: fewer slots from the first on, or more that are empty.

        No row may hold more tokens than that. A ring changes its size only where it holds no token beyond its first
        turn, or then holds none.
        """

        def resized(arrays: Arrays) -> Arrays:
            leaves, tree = jax.tree.flatten(arrays)
            return jax.tree.unflatten(tree, map(with_slots, leaves, self.limits))

        def with_slots(x: jax.Array, limit: int) -> jax.Array:
            by = _slots(limit, capacity) - x.shape[-2]
            return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, by * (dim == x.ndim - 2), 0) for dim in range(x.ndim)])

        return dataclasses.replace(self, keys=resized(self.keys), values=resized(self.values), capacity=capacity)

    def keeps_all(self, capacity: int) -> bool:
        """Whether every layer has a slot of its own for each of so many tokens: none is a ring."""
        return not any(0 < limit < capacity for limit in self.limits)

    def row(self, row: jax.Array) -> "KVCache":
        """A cache of one row with what one of these holds."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, x.ndim - 4), self)

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


def _slots(limit: int, capacity: int) -> int:
    return min(limit or capacity, capacity)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("keys", "values", "layer"), meta_fields=("capacity", "ahead")
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's view of the whole cache, writing in place, so that a scan over layers copies nothing.

    Where `layer` is None the arrays are the layer's own. With fewer slots than `capacity` they are a ring.
    """

    keys: jax.Array
    values: jax.Array
    layer: int | jax.Array | None = None
    capacity: int = 0
    ahead: int = 0

    @property
    def listed(self) -> bool:
        return self.layer is None

    @property
    def slots(self) -> int:
        return self.keys.shape[-2]

    def extend(
        self, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array, lengths_B: jax.Array | None = None
    ) -> tuple["LayerCache", jax.Array, jax.Array, jax.Array]:
        """Takes T tokens a row: the cache with them, and the keys and values that they may see, with positions.

        Args:
          positions_BT: [B, T] or [1, T], one after another; a token beyond the capacity is dropped.
          lengths_B: given with the first tokens of rows, of which those behind so many are padding. A ring keeps none
            of it, since it would take the slots of what the next token sees.

        Returns:
          the cache; keys and values [B, S, G, K]; their positions, [B, S] or [1, S].
        """
        if self.slots >= self.capacity:
            written = self._write(k_BTGK, v_BTGK, positions_BT)
            return written, *written.read(), jnp.arange(self.slots, dtype=positions_BT.dtype)[None, :]
        B, T = k_BTGK.shape[:2]
        positions_BT = jnp.broadcast_to(positions_BT, (B, T))
        kept_BT = positions_BT < self.capacity
        if lengths_B is not None:
            kept_BT = kept_BT & (positions_BT < lengths_B[:, None])
        newest_B = jnp.max(jnp.where(kept_BT, positions_BT, -1), axis=1)
        kept_BT = kept_BT & (positions_BT > newest_B[:, None] - self.slots)
        written = self._write(k_BTGK, v_BTGK, jnp.where(kept_BT, positions_BT % self.slots, self.slots))
        if lengths_B is not None:  # there are no earlier tokens
            return written, k_BTGK, v_BTGK, positions_BT
        if self.ahead + 1 >= T:  # what they took the slots of, none of them sees
            return written, *written.read(), self._held(newest_B)
        k_BRGK, v_BRGK = self.read()
        held_BR = self._held(positions_BT[:, 0] - 1)
        pairs = (k_BRGK, k_BTGK), (v_BRGK, v_BTGK), (held_BR, positions_BT)
        k_BSGK, v_BSGK, seen_BS = (jnp.concatenate(pair, axis=1) for pair in pairs)
        return written, k_BSGK, v_BSGK, seen_BS

    def _held(self, newest_B: jax.Array) -> jax.Array:
        """Which positions are in the slots of a ring, [B, R], where the last that was written is the newest."""
        newest_B1 = newest_B[:, None]
        held_BR = newest_B1 - (newest_B1 - jnp.arange(self.slots, dtype=newest_B.dtype)[None]) % self.slots
        return jnp.where(held_BR < 0, UNSEEN, held_BR)

    def _write(self, k_BTGK: jax.Array, v_BTGK: jax.Array, slots_BT: jax.Array) -> "LayerCache":
        """Puts T tokens a row into slots, [B, T] or [1, T]; what is for a slot beyond the last is dropped."""
        B, T, G, _ = k_BTGK.shape
        rows_B1, slots_BT = jnp.arange(B)[:, None], jnp.broadcast_to(slots_BT, (B, T))
        at = (self.layer, rows_B1, slice(None), slots_BT)
        if self.listed:
            # With heads as a slice XLA copies a lone row's cache four times a token on CPUs, which take NANO 1.5 times
            # as long. Over a mesh a slice is better: named, heads are gathered from all devices.
            at = (rows_B1[..., None], jnp.arange(G), slots_BT[..., None])
        return dataclasses.replace(self, keys=self.keys.at[at].set(k_BTGK), values=self.values.at[at].set(v_BTGK))

    def read(self) -> tuple[jax.Array, jax.Array]:
        """This layer's keys and values, [B, S, G, K], slot after slot."""
        own = (self.keys, self.values)
        keys, values = own if self.listed else (x[self.layer] for x in own)
        return jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
