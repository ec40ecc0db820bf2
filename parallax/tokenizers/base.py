"""What a tokenizer is: text to ids and back.

Invariant: each id stands for fixed bytes, and decoding joins them. So decode(encode(text)) == text, and a
stream of ids can be shown as it comes, even where a character is split over several ids.
"""

import codecs
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer; implementations inherit `decode`."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_id(self) -> int | None:
        """The end-of-text id, which stands for no bytes, or None where texts never end."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """All ids that end a text, `eos_id` first: a model that chats may also end a turn."""
        return () if self.eos_id is None else (self.eos_id,)

    def encode(self, text: str) -> np.ndarray:
        """A text from its beginning to ids, int32 [T]; raises ValueError for text that it cannot spell."""
        ...

    def encode_part(self, text: str) -> np.ndarray:
        """`encode` of what stands inside a text: without ids that begin one."""
        return self.encode(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that an id stands for, perhaps a part of a character; raises ValueError."""
        ...

    def to_json(self) -> dict[str, Any]:
        """All that `tokenizer_from_json` needs."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are no character become U+FFFD."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", "replace")


class StreamDecoder:
    """Shows ids as they come: what `push` and `flush` return, joined, is `decode` of ids that begin no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.token_bytes(int(token_id)))

    def flush(self) -> str:
        """Ends the stream: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def to_utf8(text: str) -> bytes:
    """UTF-8, or ValueError for half a surrogate pair, which a command line can carry."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!r} at position {error.start}"
        raise ValueError(f"text must be valid Unicode and has {found}; leave it out") from None


def encode_checked(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """`encode`, of which every id is checked, since a model cannot; raises ValueError as that and `check_id`."""
    ids = np.asarray(tokenizer.encode(text), np.int32)
    for token_id in (ids.min(initial=0), ids.max(initial=0)):
        check_id(int(token_id), tokenizer.vocab_size)
    return ids


def check_id(token_id: int, vocab_size: int) -> None:
    """Raises ValueError for an id outside the vocabulary, which an index would take from the other end."""
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"token id {token_id} must be from 0 to {vocab_size - 1}; use the model's own tokenizer")
