"""The samples of one side of a corpus: how they are numbered, drawn for training, and turned into arrays.

A batch is a dict of int32 arrays: `inputs` [B, T], `targets` [B, T] with -1 where there is nothing to
predict, `sample_ids` [B] with -1 for a row of padding, and for packed documents `segments` [B, T]: 1, 2, ...
for the documents of a row, 0 for padding.

Invariant: which samples global batch k holds depends on the seed and k alone, and a row of a batch on its
sample id alone.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from data.packing import PackingIndex
from data.records import TokenRecords

Batch = dict[str, np.ndarray]


class Samples(Protocol):
    """Samples with ids."""

    seq_len: int

    def draw(self, batch_size: int, seed: int, k: int) -> np.ndarray:
        """The sample ids of global training batch k, int64 [batch_size]."""
        ...

    def all_ids(self, most: int | None = None) -> np.ndarray:
        """Ids of samples that together hold each target exactly once, int64 [N], or `most` of them, evenly spread."""
        ...

    def gather(self, sample_ids: np.ndarray) -> Batch:
        """The rows with these ids; an id of -1 gives a row of padding."""
        ...


class Windows:
    """Windows of one text, drawn at random; a sample id is the position of a window's first token."""

    def __init__(self, tokens: np.ndarray, seq_len: int, what: str) -> None:
        """Raises ValueError where `tokens`, int32 [N], has no whole window; `what` names the text in it."""
        if len(tokens) <= seq_len:
            rule = f"{what} has {len(tokens)} tokens but seq_len={seq_len} needs at least {seq_len + 1}"
            raise ValueError(f"{rule}; use a shorter --seq-len or a longer text")
        self.tokens, self.seq_len = tokens, seq_len
        self.num_targets = len(tokens) - 1

    def draw(self, batch_size: int, seed: int, k: int) -> np.ndarray:
        return np.random.default_rng([seed, k]).integers(len(self.tokens) - self.seq_len, size=batch_size)

    def all_ids(self, most: int | None = None) -> np.ndarray:
        return spread(-(-self.num_targets // self.seq_len), most) * self.seq_len

    def gather(self, sample_ids: np.ndarray) -> Batch:
        positions = sample_ids[:, None] + np.arange(self.seq_len)
        present = (positions < self.num_targets) & (sample_ids >= 0)[:, None]
        positions = np.where(present, positions, 0)
        return {
            "inputs": np.where(present, self.tokens[positions], 0).astype(np.int32),
            "targets": np.where(present, self.tokens[positions + 1], -1).astype(np.int32),
            "sample_ids": sample_ids.astype(np.int32),
        }


class PackedDocuments:
    """Documents packed into rows; a sample id is the row's number. Each epoch has its own order of the rows.

    The target of a document's last token is the end-of-text id: it is learned and never fed, since what
    follows in the row is another segment. Without such an id the last token has no target.
    """

    def __init__(self, documents: Sequence[np.ndarray], index: PackingIndex, seq_len: int, eos_id: int | None) -> None:
        self.documents, self.index, self.seq_len = documents, index, seq_len
        self.last_target = -1 if eos_id is None else eos_id
        without_target = len(np.unique(index.document)) if eos_id is None else 0
        self.num_targets = int(index.length.sum(dtype=np.int64)) - without_target

    def draw(self, batch_size: int, seed: int, k: int) -> np.ndarray:
        num_rows = self.index.num_rows
        epochs, places = np.divmod(np.arange(k * batch_size, (k + 1) * batch_size), num_rows)
        parts = [_shuffled(num_rows, seed, epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
        return np.concatenate(parts)

    def all_ids(self, most: int | None = None) -> np.ndarray:
        return spread(self.index.num_rows, most)

    def gather(self, sample_ids: np.ndarray) -> Batch:
        shape = (len(sample_ids), self.seq_len)
        batch = {
            "inputs": np.zeros(shape, np.int32),
            "targets": np.full(shape, -1, np.int32),
            "sample_ids": sample_ids.astype(np.int32),
            "segments": np.zeros(shape, np.int32),
        }
        rows = [self.index.pieces(sample_id) if sample_id >= 0 else [] for sample_id in sample_ids.tolist()]
        documents = self._read(sorted({number for pieces in rows for number, _, _ in pieces}))
        for row, pieces in enumerate(rows):
            at = 0
            for segment, (number, start, length) in enumerate(pieces, start=1):
                tokens = documents[number][start : start + length + 1]  # with the target beyond the piece
                place = (row, slice(at, at + length))
                batch["inputs"][place] = tokens[:length]
                batch["targets"][place] = np.append(tokens[1:], self.last_target)[:length]
                batch["segments"][place] = segment
                at += length
        return batch

    def _read(self, numbers: list[int]) -> dict[int, np.ndarray]:
        """All documents of a batch by their numbers, from records in one read."""
        if isinstance(self.documents, TokenRecords):
            return dict(zip(numbers, self.documents.read(numbers), strict=True))
        return {number: self.documents[number] for number in numbers}


def spread(count: int, most: int | None) -> np.ndarray:
    """All of range(count), or `most` of it at even distances, int64."""
    return np.arange(count) if most is None or most >= count else np.arange(most) * count // most


@lru_cache(maxsize=4)
def _shuffled(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)
