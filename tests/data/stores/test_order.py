"""Orders of rows: each row once an epoch, found again from either side, and few blocks at a time."""

import numpy as np
import pytest

from data.stores.order import Shuffled, ShuffledByBlocks, shuffled, unshuffled


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_a_permutation_of_any_size(size):
    found = shuffled(np.arange(size), size, 0, 0)
    assert sorted(found.tolist()) == list(range(size))
    if size > 16:
        assert (found != shuffled(np.arange(size), size, 0, 1)).any()
        assert abs(np.corrcoef(np.arange(size), found)[0, 1]) < 0.5
        assert (np.diff(found) == 1).mean() < 0.3


@pytest.mark.parametrize("size", [1, 2, 5, 64, 1001])
def test_a_permutation_goes_both_ways(size):
    places = np.arange(size)
    np.testing.assert_array_equal(unshuffled(shuffled(places, size, 4, 2), size, 4, 2), places)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 23, 24, 47, 48, 50, 143])
@pytest.mark.parametrize("kind", ["whole", "blocks"])
def test_each_epoch_has_each_row_once_and_knows_when(kind, size):
    order = Shuffled(size) if kind == "whole" else ShuffledByBlocks(size, block=4, group=3)
    rows = order.rows(np.arange(3 * size), 7)
    for epoch in rows.reshape(3, size):
        assert sorted(epoch.tolist()) == list(range(size))
    for row in {0, size // 2, size - 1}:
        assert order.numbers_of(row, 7, 3 * size - 1) == np.flatnonzero(rows[: 3 * size - 1] == row).tolist()
    np.testing.assert_array_equal(order.rows(np.arange(size, size + 2), 7), rows[size : size + 2])


def test_rows_of_few_blocks_come_together_and_mixed():
    order = ShuffledByBlocks(8 * 40 + 3, block=8, group=5)
    rows = order.rows(np.arange(order.size), 0)
    blocks = [set((rows[at : at + 40] // 8).tolist()) for at in range(0, 280, 40)]
    assert [len(found) for found in blocks] == [5] * 7
    assert len(set().union(*blocks)) == 35
    assert all(max(found) - min(found) > 5 for found in blocks)
    assert (np.diff(rows) == 1).mean() < 0.1
