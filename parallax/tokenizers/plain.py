"""Tokenizers that need no library: an id for each character, or for each byte.

Invariant: the ids follow from the alphabet alone.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from parallax.tokenizers.base import Tokenizer, check_id, to_utf8


@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """An id for each character of a sorted alphabet.

    An end-of-text id exists only where a corpus has several documents. A single text never ends inside a
    window: the id would be a row of the embedding that no step trains, and sampling could still draw it.
    """

    alphabet: str
    has_eos: bool = False

    @property
    def name(self) -> str:
        return "char"

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet) + self.has_eos

    @property
    def eos_id(self) -> int | None:
        return len(self.alphabet) if self.has_eos else None

    @cached_property
    def _ids(self) -> np.ndarray:
        """By code point, up to the first beyond the alphabet; -1 where there is none."""
        codes = _code_points(self.alphabet)
        ids = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)
        ids[codes] = np.arange(len(codes))
        return ids

    def encode(self, text: str) -> np.ndarray:
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        unknown = np.flatnonzero(ids < 0)
        if unknown.size:
            position = int(unknown[0])
            found = f"character {text[position]!r} at position {position}"
            rule = f"{found} is not among the {len(self.alphabet)} that this tokenizer was made from"
            raise ValueError(f"{rule}; leave it out, or train with --tokenizer byte")
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        check_id(token_id, self.vocab_size)
        return b"" if token_id == self.eos_id else self.alphabet[token_id].encode("utf-8")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "alphabet": self.alphabet, "has_eos": self.has_eos}


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are their own ids, 256 is the end of text."""

    @property
    def name(self) -> str:
        return "byte"

    @property
    def vocab_size(self) -> int:
        return 257

    @property
    def eos_id(self) -> int | None:
        return 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(to_utf8(text), np.uint8).astype(np.int32)

    def token_bytes(self, token_id: int) -> bytes:
        check_id(token_id, self.vocab_size)
        return b"" if token_id == self.eos_id else bytes([token_id])

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte"}


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
