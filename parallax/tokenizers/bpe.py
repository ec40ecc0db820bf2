"""Byte-level byte pairs, trained with `tokenizers`.

Invariant: every text has a spelling, since all 256 bytes are in the vocabulary, and the same documents always
give the same vocabulary.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from parallax.tokenizers.base import Tokenizer, check_id
from parallax.tokenizers.native import encode, interruptible

SMALLEST_SIZE = 257  # all bytes and the end of text

LARGEST_SIZE = 2**24  # the library takes memory for all of them, and aborts the process where there is none

LONGEST_WORD = 1024
"""Bytes: a longer word is cut into such pieces for training, whose time grows with the square of a word's length."""


class BPETokenizer(Tokenizer):
    """Merged byte pairs (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909), then the end-of-text id.

    The library does not know the end-of-text id: no text, a prompt least of all, can spell it.
    """

    def __init__(self, definition: dict[str, Any]) -> None:
        """Takes the JSON form of a byte-level BPE tokenizer of the library; raises ValueError for another."""
        import tokenizers

        byte_of = byte_of_character()
        try:
            self._model = tokenizers.Tokenizer.from_str(json.dumps(definition))
            ids = sorted(self._model.get_vocab().items(), key=lambda item: item[1])
            self._bytes = [bytes(byte_of[character] for character in spelling) for spelling, _ in ids] + [b""]
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"its BPE definition is damaged ({error}); save it again") from None
        self._definition = definition

    @property
    def name(self) -> str:
        return f"bpe:{self.vocab_size}"

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def eos_id(self) -> int | None:
        return self.vocab_size - 1

    def encode(self, text: str) -> np.ndarray:
        return encode(self._model, text)

    def token_bytes(self, token_id: int) -> bytes:
        check_id(token_id, self.vocab_size)
        return self._bytes[token_id]

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bpe", "definition": self._definition}


def train_bpe(size: int, documents: Sequence[str]) -> BPETokenizer:
    """Learns merges until there are `size` ids in all, or no pair is left to merge.

    Merges are learned inside words, of which a text without spaces or punctuation is one; in training a word ends after
    LONGEST_WORD bytes. Raises ValueError if `size` is too small for all bytes and the end of text.
    """
    check_size(size)
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    splitter: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)  # its stub lacks the base class
    pieces: Any = pre_tokenizers.Sequence([splitter, pre_tokenizers.FixedLength(LONGEST_WORD)])
    model.pre_tokenizer = pieces
    alphabet = sorted(byte_of_character())
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    interruptible(lambda: model.train_from_iterator(documents, trainer))
    model.pre_tokenizer = splitter
    return BPETokenizer(json.loads(model.to_str()))


def check_size(size: int) -> None:
    """Raises ValueError if so few ids do not hold all bytes and the end of text, or there are too many to train."""
    if size < SMALLEST_SIZE:
        rule = f"bpe:{size} must be at least {SMALLEST_SIZE} to hold all bytes and the end of text"
        raise ValueError(f"{rule}; try bpe:1024")
    if size > LARGEST_SIZE:
        raise ValueError(f"bpe:{size} must be at most {LARGEST_SIZE}; try bpe:32000")


def byte_of_character() -> dict[str, int]:
    """The byte behind each character in which the library spells bytes (GPT-2's table).

    Bytes that print as Latin-1 stand for themselves, the others are U+0100 and up in order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
