"""An array made where it is to be, a piece at a time.

Invariant: beside the array itself no more is held than the pieces that its maker holds, and a small shard.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

Bounds = tuple[slice, ...]
"""A block: for each dim the first index and the one after the last."""

Pieces = Callable[[Bounds], Iterator[tuple[Sequence[int], np.ndarray]]]
"""Pieces of a shard with these bounds, each with where it begins; all else is zero."""

SMALL = 2**20
"""Bytes of a shard that is put together on the host: a write for each device is a program for each to compile."""

_write = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)


def fill(leaf: jax.ShapeDtypeStruct, pieces: Pieces) -> jax.Array:
    """The array of that shape, dtype and sharding; by default on the first device. Replicas are made at once."""
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    devices_of: dict[tuple, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index or (), leaf.shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in devices_of.items():
        shard = tuple(slice(*pair) for pair in bounds)
        shards += _fill_shard(shard, leaf.dtype, devices, pieces)
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _fill_shard(shard: Bounds, dtype: Any, devices: list[Any], pieces: Pieces) -> list[jax.Array]:
    """One array on each of the devices."""
    shape = tuple(s.stop - s.start for s in shard)
    if math.prod(shape) * np.dtype(dtype).itemsize <= SMALL:
        whole = np.zeros(shape, dtype)
        for at, piece in pieces(shard):
            whole[tuple(slice(start, start + size) for start, size in zip(at, piece.shape, strict=True))] = piece
        return [jax.device_put(whole, device) for device in devices]
    arrays: list[jax.Array] = []
    for at, piece in pieces(shard):
        piece = piece.astype(dtype, copy=False)
        if piece.shape == shape:
            return [jax.device_put(piece, device) for device in devices]
        arrays = arrays or _zeros(shape, dtype, devices)
        start = tuple(np.int32(index) for index in at)
        for number, device in enumerate(devices):
            placed = jax.device_put(piece, device)
            arrays[number] = _write(arrays[number], placed, start).block_until_ready()
    return arrays or _zeros(shape, dtype, devices)


def _zeros(shape: tuple[int, ...], dtype: Any, devices: list[Any]) -> list[jax.Array]:
    return [jnp.zeros(shape, dtype, device=SingleDeviceSharding(device)) for device in devices]
