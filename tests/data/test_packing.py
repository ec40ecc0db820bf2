"""The packing index: every token once, rows well filled, the same each time."""

import numpy as np
import pytest

from data.packing import pack


def covered(index, lengths):
    """How often each token of each document is in a row."""
    counts = [np.zeros(length, int) for length in lengths]
    for row in range(index.num_rows):
        for document, start, length in index.pieces(row):
            counts[document][start : start + length] += 1
    return np.concatenate(counts)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
@pytest.mark.parametrize("seed", range(3))
def test_every_token_lies_in_exactly_one_row(seed, seq_len):
    lengths = np.random.default_rng(seed).integers(1, 200, 50)
    index = pack(np.arange(50), lengths, seq_len)
    assert (covered(index, lengths) == 1).all()
    for row in range(index.num_rows):
        assert 1 <= sum(length for _, _, length in index.pieces(row)) <= seq_len


def test_only_tails_are_shorter_than_a_row():
    lengths = np.random.default_rng(4).integers(1, 500, 100)
    index = pack(np.arange(100), lengths, 64)
    short = index.length < 64
    np.testing.assert_array_equal((index.start + index.length)[short], lengths[index.document[short]])


def test_rows_are_well_filled():
    lengths = np.random.default_rng(5).integers(1, 100, 2000)
    index = pack(np.arange(2000), lengths, 128)
    lower_bound = -(-lengths.sum() // 128)
    assert index.num_rows <= 1.05 * lower_bound  # best fit reaches 1.00 here, one document a row 2.5


def test_a_gap_is_filled_by_the_piece_that_fits_best():
    index = pack(np.arange(10, 14), np.array([6, 5, 4, 2]), 8)
    rows = [{document for document, _, _ in index.pieces(row)} for row in range(index.num_rows)]
    assert rows == [{10, 13}, {11}, {12}]
