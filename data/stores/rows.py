"""The samples of a token store: rows of one side, each once an epoch, filled as `--packing` says.

Invariant: which rows global batch k holds is a function of the store, the seed and k alone, and takes the same time
for a store of any size: nothing is listed or shuffled ahead, and of documents no more than a few blocks are packed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.packing import fill, pack
from data.samples import Batch, spread
from data.stores.order import Shuffled, ShuffledByBlocks
from data.stores.store import TokenSide

BLOCK_TOKENS, BLOCK_ROWS = 1 << 20, 64
"""Documents are packed by blocks of about so many tokens, and of so many rows at least."""
GROUP = 8
"""Blocks whose rows are shuffled together."""


class Span(NamedTuple):
    """Consecutive tokens of a row: where they begin in the side, their number, and whether the last has a target."""

    start: int
    length: int
    goes_on: bool

    @property
    def stop(self) -> int:
        """The position behind the last token that it shows, as input or target."""
        return self.start + self.length + self.goes_on


class StoreRows(ABC):
    """Rows of one side of a store; a sample id is a row's number.

    Attributes:
        tokens: the side.
        seq_len: tokens of a row, at the most.
        order: in which a run sees the rows.
        has_segments: whether a row holds several documents, which do not see each other.
    """

    tokens: TokenSide
    seq_len: int
    order: Shuffled
    has_segments: bool = False

    @abstractmethod
    def spans(self, rows: Sequence[int]) -> list[Sequence[Span]]:
        """What each of these rows holds."""

    @abstractmethod
    def rows_of(self, start: int, stop: int) -> Iterable[int]:
        """The rows that show a token from start to stop - 1, as input or target."""

    def epochs(self, count: int) -> float:
        """What `count` rows are in epochs."""
        return count / self.order.size

    def count_cut(self) -> int:
        """How many documents, or pairs, have an end that no row shows."""
        return 0

    def _that_show(self, rows: Sequence[int], start: int, stop: int) -> Iterator[int]:
        """Those of some rows that show a token from start to stop - 1."""
        for row, spans in zip(rows, self.spans(rows), strict=True):
            if any(span.start < stop and span.stop > start for span in spans):
                yield row

    def draw(self, batch_size: int, seed: int, k: int) -> np.ndarray:
        return self.order.rows(np.arange(k * batch_size, (k + 1) * batch_size), seed)

    def all_ids(self, most: int | None = None) -> np.ndarray:
        return spread(self.order.size, most)

    def gather(self, sample_ids: np.ndarray) -> Batch:
        shape = (len(sample_ids), self.seq_len)
        inputs, targets = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        segments = np.zeros(shape, np.int32)
        present = np.flatnonzero(sample_ids >= 0).tolist()
        rows = self.spans(sample_ids[present].tolist())
        read = iter(self.tokens.read_learned([(span.start, span.stop) for spans in rows for span in spans]))
        for row, spans in zip(present, rows, strict=True):
            at = 0
            for segment, span in enumerate(spans, start=1):
                (tokens, learned), end = next(read), at + span.length
                inputs[row, at:end] = tokens[: span.length]
                targets[row, at : at + len(tokens) - 1] = np.where(learned[1:], tokens[1:], -1)
                segments[row, at:end] = segment
                at = end
        # The lower bits tell rows of a batch apart, and the arrays of a batch are int32.
        low = np.where(sample_ids < 0, -1, sample_ids & 0x7FFFFFFF).astype(np.int32)
        batch = {"inputs": inputs, "targets": targets, "sample_ids": low}
        return batch | {"segments": segments} if self.has_segments else batch


class Windows(StoreRows):
    """Windows of consecutive tokens, across the ends of documents, an end-of-text id between them.

    Window w holds the targets w·T + 1 to w·T + T, so that each token but the first is a target once; the last window
    may have fewer.
    """

    def __init__(self, tokens: TokenSide, seq_len: int, what: str) -> None:
        """Raises ValueError where there is no whole window; `what` names the tokens in it."""
        if len(tokens) <= seq_len:
            rule = f"{what} has {len(tokens)} tokens but seq_len={seq_len} needs at least {seq_len + 1}"
            raise ValueError(f"{rule}; use a shorter --seq-len, or prepare more documents or a larger --held-out")
        self.tokens, self.seq_len = tokens, seq_len
        self.num_targets = len(tokens) - 1
        self.order = Shuffled(-(-self.num_targets // seq_len))

    def spans(self, rows: Sequence[int]) -> list[Sequence[Span]]:
        starts = [row * self.seq_len for row in rows]
        return [(Span(start, min(self.seq_len, self.num_targets - start), True),) for start in starts]

    def rows_of(self, start: int, stop: int) -> range:
        first = max(0, -(-start // self.seq_len) - 1)
        return range(first, min((stop - 1) // self.seq_len + 1, self.order.size))

    def epochs(self, count: int) -> float:
        return count * self.seq_len / self.num_targets


class PackedBlocks(StoreRows):
    """Documents packed into rows without a gap, a block of consecutive ones at a time (see `data.packing.fill`).

    Block b holds the tokens b·R·T to (b + 1)·R·T - 1 in R rows of T; only the last block has gaps. So the number of
    rows follows from that of the tokens, and no document is read before its block is. A document is cut where a block
    ends, where it is longer than a row, and where it fills a gap. Each token but the first of a document is a target
    once; its last one, the end-of-text id, has none.
    """

    has_segments = True

    def __init__(self, tokens: TokenSide, seq_len: int, what: str) -> None:
        """Raises ValueError where there is no token; `what` names them in it."""
        _require_documents(tokens, what)
        self.tokens, self.seq_len = tokens, seq_len
        self._rows = max(BLOCK_ROWS, BLOCK_TOKENS // seq_len)
        self.order = ShuffledByBlocks(-(-len(tokens) // seq_len), self._rows, GROUP)
        self._packed = lru_cache(2 * GROUP)(self._pack)

    def spans(self, rows: Sequence[int]) -> list[Sequence[Span]]:
        found: list[Sequence[Span]] = []
        for row in rows:
            block, place = divmod(row, self._rows)
            starts, lengths, goes_on, firsts = self._packed(block)
            at = slice(firsts[place], firsts[place + 1])
            found.append(list(map(Span, starts[at].tolist(), lengths[at].tolist(), goes_on[at].tolist())))
        return found

    def rows_of(self, start: int, stop: int) -> Iterable[int]:
        size = self._rows * self.seq_len
        for block in range(max(0, start - 1) // size, (stop - 1) // size + 1):
            starts, lengths, goes_on, firsts = self._packed(block)
            shown = np.flatnonzero((starts < stop) & (starts + lengths + goes_on > start))
            yield from (block * self._rows + np.unique(np.searchsorted(firsts, shown, "right") - 1)).tolist()

    def epochs(self, count: int) -> float:
        return count * self.seq_len / len(self.tokens)

    def _pack(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Start, length and `goes_on` of each span, and the first span of each row, with their number at the end."""
        first = block * self._rows * self.seq_len
        stop = min(first + self._rows * self.seq_len, len(self.tokens))
        bounds = np.unique(np.concatenate([[first], self.tokens.starts_in(first, stop), [stop]]))
        starts, lengths = bounds[:-1], np.diff(bounds)
        is_cut = np.zeros(len(starts), bool)  # the last document may go on in the next block
        is_cut[-1] = stop < len(self.tokens) and not len(self.tokens.starts_in(stop, stop + 1))
        num_rows = -(-(stop - first) // self.seq_len)
        index = fill(pack(np.arange(len(starts)), lengths, self.seq_len), self.seq_len, num_rows)
        ends = index.start + index.length == lengths[index.document]
        goes_on = ~ends | is_cut[index.document]
        return starts[index.document] + index.start, index.length, goes_on, index.row_start


class SingleDocuments(StoreRows):
    """A document a row: its first T + 1 tokens, and padding behind them. The rest of a longer one is not learned."""

    def __init__(self, tokens: TokenSide, seq_len: int, what: str) -> None:
        """Raises ValueError where there is no token; `what` names them in it."""
        _require_documents(tokens, what)
        self.tokens, self.seq_len = tokens, seq_len
        self.order = Shuffled(tokens.num_documents)

    def spans(self, rows: Sequence[int]) -> list[Sequence[Span]]:
        found: list[Sequence[Span]] = []
        for start, stop in self.tokens.spans_of(rows):
            length = min(stop - start - 1, self.seq_len)
            found.append((Span(start, length, True),) if length > 0 else ())
        return found

    def rows_of(self, start: int, stop: int) -> Iterable[int]:
        rows = range(self.tokens.number_at(start), self.tokens.number_at(stop - 1) + 1)
        return self._that_show(rows, start, stop)

    def count_cut(self) -> int:
        return _longer(self.tokens, self.seq_len + 1)


class WholeDocuments(StoreRows):
    """Whole documents packed into rows with padding behind them; of one longer than a row its first T + 1 tokens.

    All are packed at the start, by a table that takes some 40 bytes of memory a document.
    """

    has_segments = True

    def __init__(self, tokens: TokenSide, seq_len: int, what: str) -> None:
        """Raises ValueError where there is no token; `what` names them in it."""
        _require_documents(tokens, what)
        self.tokens, self.seq_len = tokens, seq_len
        starts = tokens.starts_in(0, len(tokens))
        lengths = np.diff(starts, append=len(tokens))
        inputs = np.minimum(lengths - 1, seq_len)  # the last token is a target alone
        shown = np.flatnonzero(inputs)
        if not len(shown):
            raise ValueError(f"{what} must hold a document of two tokens and holds none; prepare more documents")
        packed = pack(shown, inputs[shown], seq_len)
        self._starts = starts[packed.document]
        self._lengths, self._firsts = packed.length, packed.row_start
        self._row_of = np.full(len(lengths), -1, np.int32)
        self._row_of[packed.document] = np.repeat(np.arange(packed.num_rows), np.diff(packed.row_start))
        self.order = Shuffled(packed.num_rows)

    def spans(self, rows: Sequence[int]) -> list[Sequence[Span]]:
        found: list[Sequence[Span]] = []
        for row in rows:
            at = slice(self._firsts[row], self._firsts[row + 1])
            pairs = zip(self._starts[at].tolist(), self._lengths[at].tolist(), strict=True)
            found.append([Span(start, length, True) for start, length in pairs])
        return found

    def rows_of(self, start: int, stop: int) -> Iterable[int]:
        rows = np.unique(self._row_of[self.tokens.number_at(start) : self.tokens.number_at(stop - 1) + 1])
        return self._that_show(rows[rows >= 0].tolist(), start, stop)

    def count_cut(self) -> int:
        return _longer(self.tokens, self.seq_len + 1)


class Pairs(SingleDocuments):
    """A document a row, which is two conversations: the preferred one first, each a segment of its own.

    Of each at most T/2 tokens are read: of a longer one the first, so that its answer, which alone is learned, may be
    cut off.
    """

    has_segments = True

    def spans(self, rows: Sequence[int]) -> list[Sequence[Span]]:
        most = self.seq_len // 2
        return [[Span(begin, min(end - begin - 1, most), True) for begin, end in sides] for sides in self._sides(rows)]

    def count_cut(self) -> int:  # reads all of them
        most, count = self.seq_len // 2 + 1, 0
        for first in range(0, self.order.size, BLOCK_ROWS):
            for sides in self._sides(range(first, min(first + BLOCK_ROWS, self.order.size))):
                count += any(end - begin > most for begin, end in sides)
        return count

    def _sides(self, rows: Sequence[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Where either conversation of each row begins, and the position behind its last token."""
        found, spans = [], self.tokens.spans_of(rows)
        for (start, stop), (_, learned) in zip(spans, self.tokens.read_learned(spans), strict=True):
            # The first run of learned tokens ends the preferred one.
            first = start + int(np.flatnonzero(np.diff(learned.astype(np.int8)) == -1)[0]) + 1
            found.append(((start, first), (first, stop)))
        return found


Packing = type[Windows] | type[PackedBlocks] | type[WholeDocuments] | type[SingleDocuments] | type[Pairs]
PACKINGS: dict[str, Packing] = {
    "concat": Windows,
    "best-fit": PackedBlocks,
    "whole": WholeDocuments,
    "none": SingleDocuments,
}


def _longer(tokens: TokenSide, most: int) -> int:
    """How many documents have more tokens than `most`."""
    lengths = np.diff(tokens.starts_in(0, len(tokens)), append=len(tokens))
    return int(np.count_nonzero(lengths > most))


def _require_documents(tokens: TokenSide, what: str) -> None:
    if not len(tokens):
        raise ValueError(f"{what} must hold a document and holds none; prepare more documents or a larger --held-out")
