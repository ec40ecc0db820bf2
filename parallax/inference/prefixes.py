"""Caches of earlier texts, prompts and their answers, whose beginning a new prompt may share: the turns before.

Invariant: an entry is never changed, holds its text from the first token on (a ring of a longer text would not), and
all of them together have room for no more than `most` tokens.
"""

import numpy as np

from parallax.layers.cache import KVCache


class Prefixes:
    """The texts that were read or shared last, with their caches of one row."""

    def __init__(self, most: int):
        self._most = most
        self._entries: dict[bytes, KVCache] = {}  # by ids, the oldest use first

    def find(self, prompt: np.ndarray) -> tuple[int, KVCache | None]:
        """How many tokens of a prompt the entry that shares most of them holds, and its cache; 0 and None without one.

        Never all of them: what follows the last is not in a cache.
        """
        prompt = np.asarray(prompt, np.int32)
        found, best = 0, None
        for key in self._entries:
            other = np.frombuffer(key, np.int32)
            length = min(len(other), len(prompt))
            differing = np.flatnonzero(other[:length] != prompt[:length])
            shared = min(int(differing[0]) if len(differing) else length, len(prompt) - 1)
            if shared > found:
                found, best = shared, key
        if best is None:
            return 0, None
        self._entries[best] = self._entries.pop(best)
        return found, self._entries[best]

    def keep(self, text: np.ndarray, cache: KVCache) -> None:
        """Takes a text with its cache in place of those that it goes on from; the oldest beyond the room go.

        A cache with more room than all may have is not taken.
        """
        if cache.capacity > self._most:
            return
        key = np.asarray(text, np.int32).tobytes()
        self._entries = {other: kept for other, kept in self._entries.items() if not key.startswith(other)}
        self._entries[key] = cache
        while sum(kept.capacity for kept in self._entries.values()) > self._most:
            del self._entries[next(iter(self._entries))]

    def clear(self) -> None:
        self._entries.clear()
