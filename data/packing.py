"""Documents laid into rows of fixed length, by an index that is computed once.

Invariant: each token of each document is in exactly one row, and the index depends on the lengths alone.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class PackingIndex:
    """Pieces of documents, in the order of the rows that hold them.

    Attributes:
        document: the document of each piece, int32 [pieces].
        start: where in the document the piece begins, int64 [pieces].
        length: tokens in the piece, 1 to seq_len, int32 [pieces].
        row_start: the first piece of each row, and the number of pieces at the end, int64 [rows + 1].
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    row_start: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.row_start) - 1

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """(document, start, length) of each piece in the row."""
        at = slice(self.row_start[row], self.row_start[row + 1])
        columns = (self.document[at], self.start[at], self.length[at])
        return list(zip(*(column.tolist() for column in columns), strict=True))


def pack(documents: np.ndarray, lengths: np.ndarray, seq_len: int) -> PackingIndex:
    """Cuts documents into pieces of at most `seq_len` tokens and packs the pieces by best-fit decreasing.

    Only the tail of a document is shorter than a row (Ding et al. 2024, https://arxiv.org/abs/2404.10830).

    Args:
        documents: document numbers, int [D].
        lengths: their tokens, int [D], each at least 1.
        seq_len: tokens in a row.
    """
    counts = -(-lengths // seq_len)
    owner = np.repeat(np.arange(len(lengths)), counts)
    start = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    length = np.minimum(seq_len, lengths[owner] - start)
    order = np.argsort(-length, kind="stable")
    row_of = _best_fit(length[order], seq_len)
    order = order[np.argsort(row_of, kind="stable")]
    return PackingIndex(
        document=documents[owner[order]].astype(np.int32),
        start=start[order],
        length=length[order].astype(np.int32),
        row_start=np.concatenate([[0], np.cumsum(np.bincount(row_of))]),
    )


def fill(index: PackingIndex, seq_len: int, num_rows: int) -> PackingIndex:
    """The same tokens in `num_rows` rows, which must have room for them.

    The fullest rows stay as they are, and the pieces of the others are cut to fit what they leave free. So the number
    of rows follows from that of the tokens, at the price of a few more cuts.
    """
    if index.num_rows <= num_rows:
        return index
    used = np.add.reduceat(index.length, index.row_start[:-1])
    order = np.argsort(-used, kind="stable").tolist()
    rows = [index.pieces(row) for row in order[:num_rows]]
    left = [piece for row in order[num_rows:] for piece in index.pieces(row)]
    place, free = num_rows - 1, seq_len - int(used[order[num_rows - 1]])
    for document, start, length in left:
        while length:
            while not free:
                place -= 1
                free = seq_len - int(used[order[place]])
            taken = min(length, free)
            rows[place].append((document, start, taken))
            start, length, free = start + taken, length - taken, free - taken
    documents, starts, lengths = zip(*(piece for row in rows for piece in row), strict=True)
    return PackingIndex(
        document=np.array(documents, np.int32),
        start=np.array(starts, np.int64),
        length=np.array(lengths, np.int32),
        row_start=np.cumsum([0, *(len(row) for row in rows)]),
    )


def _best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The row of each piece, for lengths in decreasing order: the fullest open row that still has room.

    Free space is a small integer: open rows are listed by the amount of it, and a set of bits, one for each
    amount that occurs, gives the least sufficient one without a search.
    """
    row_of = np.arange(len(lengths))
    num_rows = int(np.count_nonzero(lengths == seq_len))  # whole rows come first, each its own
    open_rows: list[list[int]] = [[] for _ in range(seq_len)]
    amounts = 0
    for piece, length in enumerate(lengths[num_rows:].tolist(), start=num_rows):
        enough = amounts >> length
        if enough:
            free = length + (enough & -enough).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                amounts ^= 1 << free
        else:
            free, row, num_rows = seq_len, num_rows, num_rows + 1
        row_of[piece] = row
        rest = free - length
        if rest:
            open_rows[rest].append(row)
            amounts |= 1 << rest
    return row_of
