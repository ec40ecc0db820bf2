"""Tokenizers by name and by file.

Invariant: `tokenizer_from_json` takes back what any tokenizer's `to_json` gave, and refuses all else.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from parallax.storage import write_atomically
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.bpe import BPETokenizer, check_size, train_bpe
from parallax.tokenizers.hugging_face import HuggingFaceTokenizer
from parallax.tokenizers.plain import ByteTokenizer, CharTokenizer

DEFAULT_BPE_SIZE = 1024


def train_tokenizer(spec: str, documents: Sequence[str]) -> Tokenizer:
    """Makes the tokenizer that `spec` names: `char`, `byte`, `bpe` (1024 ids) or `bpe:N` (at most N ids).

    Raises ValueError if the spec is unknown, N is too small, or there is no text.
    """
    if not any(documents):
        raise ValueError("a tokenizer is trained on text and there is none; give a text file")
    if spec == "char":
        return CharTokenizer("".join(sorted(set().union(*documents))), has_eos=len(documents) > 1)
    if spec == "byte":
        return ByteTokenizer()
    return train_bpe(bpe_size(spec), documents)


def bpe_size(spec: str) -> int:
    """How many ids `bpe` or `bpe:N` names; raises ValueError if it is neither, or N is too small."""
    kind, _, size = spec.partition(":")
    if spec != "bpe" and not (kind == "bpe" and size.isdecimal()):
        raise ValueError(f"tokenizer={spec!r} must be char, byte, bpe or bpe:N; try bpe:{DEFAULT_BPE_SIZE}")
    check_size(int(size or DEFAULT_BPE_SIZE))
    return int(size or DEFAULT_BPE_SIZE)


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes `tokenizer.json`, whole or not at all."""
    write_atomically(Path(path), (json.dumps(tokenizer.to_json(), indent=1) + "\n").encode())


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads what `save_tokenizer` wrote, from a local path or a gs:// address.

    Raises ValueError if there is no such file, or it holds no tokenizer.
    """
    try:
        return tokenizer_from_json(json.loads(epath.Path(path).read_text("utf-8")))
    except OSError as error:
        raise ValueError(
            f"tokenizer file {path} must be readable ({error.strerror or error}); check the path"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer file {path} must be one that training wrote: {error}") from None


def tokenizer_from_json(definition: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose `to_json` gave `definition`; raises ValueError where none did."""
    match definition:
        case {"kind": "char", "alphabet": str(alphabet), "has_eos": bool(has_eos)} if alphabet:
            return CharTokenizer(alphabet, has_eos)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "bpe", "definition": dict(inner)}:
            return BPETokenizer(inner)
        case {"kind": "hugging_face", "definition": dict(inner), "vocab_size": int(size), "end_ids": list(ends)}:
            return HuggingFaceTokenizer(inner, size, ends, definition.get("bos_id"))
    raise ValueError("its kind must be char, byte, bpe or hugging_face, with that kind's fields; save it again")
