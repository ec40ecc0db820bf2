"""Stores and records for tests: small sources, and their preparation in this process."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.preparing.preparation import Preparation, Settings
from data.preparing.sources import find_sources
from data.stores.store import TokenStore
from parallax.tokenizers.plain import ByteTokenizer

WORDS = ["king", "queen", "crown", "sword", "night", "über", "the", "<|endoftext|>"]


def texts(count: int, seed: int = 0) -> list[str]:
    """Random documents, each of another first word."""
    rng = random.Random(seed)
    return [" ".join([str(i), *rng.choices(WORDS, k=rng.randrange(1, 30))]) for i in range(count)]


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(documents)))
    return path


def write_token_records(path: Path, documents: Iterable[Sequence[int] | np.ndarray]) -> None:
    """Documents of ids as an ArrayRecord file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for document in documents:
        writer.write(np.asarray(document, "<i4").tobytes())
    writer.close()


def prepared(
    folder: Path, *sources: Path, tokenizer=None, workers=1, skip=False, format=None, **settings
) -> TokenStore:
    """A store of byte tokens, unless another tokenizer is given."""
    tokenizer = tokenizer or ByteTokenizer()
    found = find_sources([str(source) for source in sources], format)
    preparation = Preparation(folder, found, Settings(**settings), tokenizer.name)
    return preparation.run(tokenizer, workers=workers, skip_unreadable=skip)


def decoded(store: TokenStore, tokenizer=None) -> list[tuple[str, int, str]]:
    """(file name, line, text) of all documents, those held out behind the others."""
    tokenizer = tokenizer or ByteTokenizer()
    sides = (store.train, store.held_out)
    return [(Path(d.path).name, d.line, tokenizer.decode(ids)) for side in sides for d, ids in side.documents()]
