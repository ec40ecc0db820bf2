"""Rows are dealt evenly or refused, and are where the global batch has them."""

import re

import numpy as np
import pytest

from parallelism.rows import canonical_shards, check_canonical, check_dealing


def test_canonical_shards_depend_on_the_batch_alone():
    for batch_size in range(1, 300):
        shards = canonical_shards(batch_size)
        assert batch_size % shards == 0
        assert shards <= 16
        assert all(batch_size % more for more in range(shards + 1, 17))


def test_rows_are_dealt_evenly_or_refused_with_a_remedy():
    for batch_size in range(1, 70):
        for devices, accumulate in ((1, 1), (1, 3), (8, 1), (8, 4), (6, 2)):
            parts = devices * accumulate
            if batch_size % parts == 0:
                check_dealing(batch_size, devices, accumulate, "devices")
                continue
            with pytest.raises(
                ValueError, match=f"batch_size={batch_size} must be divisible by devices={devices}"
            ) as caught:
                check_dealing(batch_size, devices, accumulate, "devices")
            assert (f"accumulate={accumulate}" in str(caught.value)) == (accumulate > 1)
            remedy = int(re.search(r"try --batch-size (\d+)$", str(caught.value))[1])
            assert abs(remedy - batch_size) <= parts / 2 or remedy == parts, "the nearest that fits"
            check_dealing(remedy, devices, accumulate, "devices")


def test_shards_are_dealt_evenly_or_refused_with_a_remedy():
    for batch_size in range(1, 70):
        for devices in (1, 2, 3, 4, 8, 16, 32):
            if canonical_shards(batch_size) % devices == 0:
                check_canonical(batch_size, devices, "devices")
                continue
            with pytest.raises(ValueError, match=f"batch_size={batch_size} .* devices={devices}") as caught:
                check_canonical(batch_size, devices, "devices")
            remedy = re.search(r"try --batch-size (\d+)$", str(caught.value))
            if remedy:
                check_canonical(int(remedy[1]), devices, "devices")
            else:
                assert 16 % devices, "no batch can be cut for so many devices"


@pytest.mark.parametrize(
    ("mesh", "blocks", "pieces"),
    [
        *(("data=8", 8, 1), ("fsdp=8", 8, 1), ("data=2,fsdp=4", 8, 1), ("tensor=2,data=4", 4, 1)),
        *(("sequence=2,data=4", 4, 2), ("sequence=2,tensor=2,fsdp=2", 2, 2), ("sequence=2,tensor=2,data=2", 2, 2)),
    ],
)
def test_each_device_holds_its_block_of_rows_and_its_piece_of_them(make_tiny, mesh, blocks, pieces):
    tiny = make_tiny(num_kv_heads=2)
    strategy, batch = (tiny.strategy("mesh", mesh), tiny.batch(0) | {"sample_ids": np.arange(16, dtype=np.int32)})
    np.testing.assert_array_equal(strategy.rows(16), np.arange(16))
    placed = strategy.put_batch(batch)
    for name, x in placed.items():
        np.testing.assert_array_equal(x, batch[name])
        assert len(x.addressable_shards) == 8
        cut = blocks * pieces if x.ndim == 2 else blocks
        for shard in x.addressable_shards:
            assert shard.data.size * cut == x.size
            np.testing.assert_array_equal(shard.data, batch[name][shard.index])
