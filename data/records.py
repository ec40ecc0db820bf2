"""Token documents in ArrayRecord files: a document a record, little-endian int32 ids, a `tokenizer.json`.

Invariant: documents come in the order of the files and of the records in them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

READ_AT_ONCE = 8192
"""Records: a read costs time in the number of records in the file, however few of them it reads."""


class TokenRecords(Sequence[np.ndarray]):
    """The documents of ArrayRecord files, read when asked for: item i is document i, int32 [length].

    Attributes:
        tokenizer_path: the `tokenizer.json` that made the ids.
    """

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        """Opens the files below a folder.

        Raises ValueError if one is damaged or empty, or no `tokenizer.json` is beside the first or in the folder.
        """
        from grain.sources import ArrayRecordDataSource

        self._files = files
        self.tokenizer_path = files[0].parent / "tokenizer.json"
        if not self.tokenizer_path.is_file():
            self.tokenizer_path = folder / "tokenizer.json"
        if not self.tokenizer_path.is_file():
            raise ValueError(f"token records {files[0]} need a tokenizer; put it into {self.tokenizer_path}")
        try:
            self._source: Any = ArrayRecordDataSource([str(file) for file in files])
        except RuntimeError as error:  # the reader's only kind of error
            reason = " ".join(str(error).split())
            rule = f"token records in {files[0].parent} must be ArrayRecord files ({reason})"
            raise ValueError(f"{rule}; write them again") from None
        if not len(self._source):
            raise ValueError(f"token records {files[0]} must hold a document and hold none; write them again")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.read([range(len(self))[index]])[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        for numbers in self._stretches():
            yield from self.read(numbers)

    def read(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """The documents with these numbers, in one read a file: READ_AT_ONCE says why."""
        records = self._source.__getitems__(numbers) if numbers else []  # it takes no empty list
        return [np.frombuffer(record, "<i4") for record in records]

    def __repr__(self) -> str:
        return f"TokenRecords({len(self)} documents in {len(self._files)} files)"

    def lengths(self, vocab_size: int) -> np.ndarray:
        """Reads everything once: the number of ids in each document, int64 [documents].

        Raises ValueError if a record is not a row of ids below `vocab_size`.
        """
        lengths = np.zeros(len(self), np.int64)
        for numbers in self._stretches():
            for number, record in zip(numbers, self._source.__getitems__(numbers), strict=True):
                lengths[number] = _count(number, record, vocab_size)
        return lengths

    def _stretches(self) -> Iterator[range]:
        """All numbers, READ_AT_ONCE at a time."""
        for first in range(0, len(self), READ_AT_ONCE):
            yield range(first, min(first + READ_AT_ONCE, len(self)))


def _count(number: int, record: bytes, vocab_size: int) -> int:
    if not record or len(record) % 4:
        raise ValueError(f"record {number} must be int32 ids and has {len(record)} bytes; write it again")
    ids = np.frombuffer(record, "<i4")
    if ids.min() < 0 or ids.max() >= vocab_size:
        rule = f"record {number} must hold ids from 0 to {vocab_size - 1}, got {ids.min()} to {ids.max()}"
        raise ValueError(f"{rule}; put the tokenizer.json that made them beside the records")
    return len(ids)
