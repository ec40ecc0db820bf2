"""The order in which a run sees the rows of a store: each once an epoch, every epoch in an order of its own.

Invariant: an order is a function of the number of rows and the seed. It is computed place by place and never written
down, so that any place of any epoch takes the same time.
"""

from collections.abc import Callable, Sequence

import numpy as np

ROUNDS = 8


class Shuffled:
    """Every order of the rows may come."""

    def __init__(self, size: int) -> None:
        self.size = size

    def rows(self, numbers: np.ndarray, seed: int) -> np.ndarray:
        """The rows that a run sees as its samples of these numbers, counted from 0 over all epochs, int64."""
        epochs, places = np.divmod(numbers, self.size)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._rows_at(places[here], seed, epoch)
        return rows

    def numbers_of(self, row: int, seed: int, count: int) -> list[int]:
        """At which of the first `count` numbers a row comes."""
        epochs = range(-(-count // self.size))
        numbers = [epoch * self.size + self._place_of(row, seed, epoch) for epoch in epochs]
        return [number for number in numbers if number < count]

    def _rows_at(self, places: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        return shuffled(places, self.size, seed, epoch)

    def _place_of(self, row: int, seed: int, epoch: int) -> int:
        return int(unshuffled(np.array([row]), self.size, seed, epoch)[0])


class ShuffledByBlocks(Shuffled):
    """Blocks of rows are shuffled, and the rows of each `group` of them: at most 2 · group are in use at a time."""

    def __init__(self, size: int, block: int, group: int) -> None:
        """`block` counts rows, of which the last block may have fewer, and `group` counts blocks."""
        super().__init__(size)
        self._block, self._full, self._stride = block, size // block, block * group
        # The last group has what is left of the whole blocks, and then the one that is not.
        self._groups = max(1, self._full // group)

    def _rows_at(self, places: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        rows, groups = np.empty_like(places), self._group_of(places)
        for group in np.unique(groups).tolist():
            here = groups == group
            within = shuffled(places[here] - group * self._stride, self._rows_in(group), seed, epoch, group + 1)
            turns, slots = np.divmod(group * self._stride + within, self._block)
            whole = turns < self._full
            turns[whole] = shuffled(turns[whole], self._full, seed, epoch)
            rows[here] = turns * self._block + slots
        return rows

    def _place_of(self, row: int, seed: int, epoch: int) -> int:
        block, slot = divmod(row, self._block)
        if block < self._full:
            block = int(unshuffled(np.array([block]), self._full, seed, epoch)[0])
        place = block * self._block + slot
        group = int(self._group_of(np.array([place]))[0])
        first, key = group * self._stride, (seed, epoch, group + 1)
        return first + int(unshuffled(np.array([place - first]), self._rows_in(group), *key)[0])

    def _group_of(self, places: np.ndarray) -> np.ndarray:
        return np.minimum(places // self._stride, self._groups - 1)

    def _rows_in(self, group: int) -> int:
        return self.size - group * self._stride if group == self._groups - 1 else self._stride


def shuffled(places: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Where places of [0, size) go in the permutation of a key, which is never written down, int64.

    A Feistel network permutes the next power of four, and is followed until it is back in the range (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains"). Grain's index_shuffle ends at 2^32.
    """
    return _walked(_feistel, places, size, key)


def unshuffled(values: np.ndarray, size: int, *key: int) -> np.ndarray:
    """The places that `shuffled` takes to these values, int64."""
    return _walked(_inverse_feistel, values, size, key)


def _walked(permute: Callable, values: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    half = max(1, -(-(size - 1).bit_length() // 2))
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    found = permute(values.astype(np.uint64), half, keys)
    while len(outside := np.flatnonzero(found >= size)):
        found[outside] = permute(found[outside], half, keys)
    return found.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """Permutes numbers of 2·half bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return left << bits | right


def _inverse_feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys[::-1]:
        left, right = right ^ (_mixed(left ^ key) & mask), left
    return left << bits | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al. 2014): each bit of the result depends on all bits."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
