"""Arrays that are made a piece at a time, where they are to be."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from parallax.filling import SMALL, fill


@pytest.mark.parametrize("rows", [10, 2 * (SMALL // 4096 + 1)])
@pytest.mark.parametrize("spec", [PartitionSpec("a"), PartitionSpec(None, "a"), PartitionSpec()])
def test_shards_hold_their_pieces_and_zeros_small_or_large(rows, spec):
    """Small ones are put together on the host, others where they are: half of 1024 float32 in each row, or all."""
    whole = np.random.default_rng(0).standard_normal((rows, 1024)).astype(np.float32)
    whole[-3:] = 0

    def pieces(shard):
        for start in range(shard[0].start, min(shard[0].stop, rows - 3), 101):
            stop = min(start + 101, shard[0].stop, rows - 3)
            yield (start - shard[0].start, 0), whole[start:stop, shard[1]]

    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, spec)
    filled = fill(jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=sharding), pieces)
    assert filled.sharding == sharding
    np.testing.assert_array_equal(filled, whole)
    assert all(np.array_equal(shard.data, whole[shard.index]) for shard in filled.addressable_shards)
