"""Which rows of a global batch each process holds, and how they become one global array.

Invariant: the batch is cut into equal blocks of neighbouring rows, block i to the i-th device that rows are dealt to,
whichever process owns it; so the global array is the same for any number of processes.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

Batch = dict[str, np.ndarray]


class RowBlocks:
    """The blocks of rows, of which this process holds those that its devices need.

    Args:
      sharding: how an array of one number a block is sharded over the devices.
      count: how many blocks there are.
    """

    def __init__(self, sharding: Sharding, count: int):
        pieces = sharding.addressable_devices_indices_map((count,)).values()
        self._held = sorted({index[0].indices(count)[0] for index in pieces if index is not None})
        self._count = count

    def rows(self, batch_size: int) -> np.ndarray:
        """The rows of a global batch that this process holds, in order."""
        size = batch_size // self._count
        return (np.array(self._held)[:, None] * size + np.arange(size)).ravel()

    def place(self, batch: Batch, sharding_of: Callable[[tuple[int, ...]], Sharding]) -> dict[str, jax.Array]:
        """Arrays of this process's rows, as its part of global arrays, sharded as `sharding_of` their shape says."""
        return {name: self._place(x, sharding_of) for name, x in batch.items()}

    def _place(self, x: np.ndarray, sharding_of: Callable[[tuple[int, ...]], Sharding]) -> jax.Array:
        size = x.shape[0] // len(self._held)
        shape = (size * self._count, *x.shape[1:])

        def piece(index: Any) -> np.ndarray:
            first, stop, _ = index[0].indices(shape[0])
            start = self._held.index(first // size) * size + first % size
            return x[(slice(start, start + stop - first), *index[1:])]

        return jax.make_array_from_callback(shape, sharding_of(shape), piece)


def check_dealing(batch_size: int, devices: int, accumulate: int, what: str) -> None:
    """Raises ValueError unless each of `devices` gets the same number of rows in each microbatch."""
    if batch_size % (devices * accumulate):
        parts = f"{what}={devices}" + (f" × accumulate={accumulate}" if accumulate > 1 else "")
        near = devices * accumulate * max(1, round(batch_size / (devices * accumulate)))
        raise ValueError(f"batch_size={batch_size} must be divisible by {parts}; try --batch-size {near}")


def canonical_shards(batch_size: int) -> int:
    """How many shards exact reduction cuts a batch into: its largest divisor up to 16, whatever the devices."""
    return next(count for count in range(16, 0, -1) if batch_size % count == 0)


def check_canonical(batch_size: int, devices: int, what: str) -> None:
    """Raises ValueError unless each of `devices` gets the same number of canonical shards."""
    shards = canonical_shards(batch_size)
    if shards % devices:
        size = next((size for size in range(batch_size + 1, 2 * batch_size + 17) if size % 16 == 0), 16)
        remedy = f"try --batch-size {size}" if 16 % devices == 0 else "use 1, 2, 4, 8 or 16 devices"
        raise ValueError(
            f"reduction=exact cuts batch_size={batch_size} into {shards} equal shards at most, of which "
            f"{what}={devices} cannot each get as many; {remedy}"
        )
