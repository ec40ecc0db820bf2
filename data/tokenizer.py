"""Text to ids and back: characters, bytes, byte pairs, or what an imported model brings.

Invariant: each id stands for fixed bytes, and decoding joins them. So decode(encode(text)) == text, and a
stream of ids can be shown as it comes, even where a character is split over several ids.
"""

import codecs
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from etils import epath

from data.atomic import write_atomically

DEFAULT_BPE_SIZE = 1024


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer; those below inherit `decode`."""

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


def train_tokenizer(spec: str, documents: Sequence[str]) -> Tokenizer:
    """Makes the tokenizer that `spec` names: `char`, `byte`, `bpe` (1024 ids) or `bpe:N` (at most N ids).

    Raises:
        ValueError: the spec is unknown, N is too small, or there is no text.
    """
    if not any(documents):
        raise ValueError("a tokenizer is trained on text and there is none; give a text file")
    kind, _, size = spec.partition(":")
    if spec == "char":
        return CharTokenizer("".join(sorted(set().union(*documents))), has_eos=len(documents) > 1)
    if spec == "byte":
        return ByteTokenizer()
    if spec == "bpe" or (kind == "bpe" and size.isdecimal()):
        from data.bpe import train_bpe

        return train_bpe(int(size or DEFAULT_BPE_SIZE), documents)
    raise ValueError(f"tokenizer={spec!r} must be char, byte, bpe or bpe:N; try bpe:{DEFAULT_BPE_SIZE}")


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes `tokenizer.json`, whole or not at all."""
    write_atomically(Path(path), (json.dumps(tokenizer.to_json(), indent=1) + "\n").encode())


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads what `save_tokenizer` wrote, from a local path or a gs:// address.

    Raises:
        ValueError: there is no such file, or it holds no tokenizer.
    """
    try:
        return tokenizer_from_json(json.loads(epath.Path(path).read_text("utf-8")))
    except OSError as error:
        raise ValueError(
            f"tokenizer file {path} must be readable ({error.strerror or error}); check the path"
        ) from None
    except ValueError as error:
        raise ValueError(f"tokenizer file {path} must be one that training wrote: {error}") from None


def tokenizer_from_json(definition: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose `to_json` gave `definition`; raises ValueError where none did."""
    match definition:
        case {"kind": "char", "alphabet": str(alphabet), "has_eos": bool(has_eos)} if alphabet:
            return CharTokenizer(alphabet, has_eos)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "bpe", "definition": dict(inner)}:
            from data.bpe import BPETokenizer

            return BPETokenizer(inner)
        case {
            "kind": "hugging_face",
            "definition": dict(inner),
            "vocab_size": int(size),
            "end_ids": list(ends),
        }:
            from data.hugging_face import HuggingFaceTokenizer

            return HuggingFaceTokenizer(inner, size, ends)
    raise ValueError(
        "its kind must be char, byte, bpe or hugging_face, with that kind's fields; save it again"
    )


def to_utf8(text: str) -> bytes:
    """UTF-8, or ValueError for half a surrogate pair, which a command line can carry."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!r} at position {error.start}"
        raise ValueError(f"text must be valid Unicode and has {found}; leave it out") from None


def check_id(token_id: int, vocab_size: int) -> None:
    """Raises ValueError for an id outside the vocabulary, which an index would take from the other end."""
    if not 0 <= token_id < vocab_size:
        raise ValueError(
            f"token id {token_id} must be from 0 to {vocab_size - 1}; use the model's own tokenizer"
        )


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
