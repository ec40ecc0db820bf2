"""Permutations of a range that are computed, place by place, and never written down.

Invariant: a permutation is a function of its key and the size of its range, and `unshuffled` undoes `shuffled`.
"""

from collections.abc import Callable, Sequence

import numpy as np

ROUNDS = 8


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
