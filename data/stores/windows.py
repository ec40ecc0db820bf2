"""The samples of a token store: windows of one side, each once an epoch.

Invariant: which windows global batch k holds is a function of the store, the seed and k alone, and takes the same time
for a store of any size: nothing is listed, shuffled or read ahead.
"""

import numpy as np

from data.samples import Batch, spread
from data.stores.permutation import shuffled, unshuffled
from data.stores.store import TokenSide


class StoreWindows:
    """Windows of consecutive tokens; a sample id is a window's number. Each epoch has its own order of them.

    Window w holds the targets w·T + 1 to w·T + T, so that each token but the first is a target once; the last window
    may have fewer. Documents follow each other, an end-of-text id between them.
    """

    def __init__(self, tokens: TokenSide, seq_len: int, what: str) -> None:
        """Raises ValueError where there is no whole window; `what` names the tokens in it."""
        if len(tokens) <= seq_len:
            rule = f"{what} has {len(tokens)} tokens but seq_len={seq_len} needs at least {seq_len + 1}"
            raise ValueError(f"{rule}; use a shorter --seq-len, or prepare more documents or a larger --held-out")
        self.tokens, self.seq_len = tokens, seq_len
        self.num_targets = len(tokens) - 1
        self.num_windows = -(-self.num_targets // seq_len)

    def draw(self, batch_size: int, seed: int, k: int) -> np.ndarray:
        return self.ordered(np.arange(k * batch_size, (k + 1) * batch_size), seed)

    def ordered(self, numbers: np.ndarray, seed: int) -> np.ndarray:
        """The windows that a run sees as its samples of these numbers, counted from 0 over all epochs, int64."""
        epochs, places = np.divmod(numbers, self.num_windows)
        windows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = shuffled(places[here], self.num_windows, seed, epoch)
        return windows

    def when(self, window: int, seed: int, count: int) -> list[int]:
        """At which of the first `count` numbers of `ordered` a window comes."""
        size, found = self.num_windows, []
        for epoch in range(-(-count // size)):
            found.append(epoch * size + int(unshuffled(np.array([window]), size, seed, epoch)[0]))
        return [number for number in found if number < count]

    def span(self, window: int) -> tuple[int, int]:
        """The first token that a window shows, as input or target, and the one behind the last."""
        start = window * self.seq_len
        return start, min(start + self.seq_len, self.num_targets) + 1

    def windows_of(self, start: int, stop: int) -> range:
        """The windows that show a token from start to stop - 1."""
        first = max(0, -(-start // self.seq_len) - 1)
        return range(first, min((stop - 1) // self.seq_len + 1, self.num_windows))

    def all_ids(self, most: int | None = None) -> np.ndarray:
        return spread(self.num_windows, most)

    def gather(self, sample_ids: np.ndarray) -> Batch:
        shape = (len(sample_ids), self.seq_len)
        inputs, targets = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        rows = np.flatnonzero(sample_ids >= 0).tolist()
        spans = [self.span(int(sample_ids[row])) for row in rows]
        for row, tokens in zip(rows, self.tokens.read_spans(spans), strict=True):
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, : len(tokens) - 1] = tokens[1:]
        # The lower bits tell rows of a batch apart, and the arrays of a batch are int32.
        low = np.where(sample_ids < 0, -1, sample_ids & 0x7FFFFFFF)
        return {"inputs": inputs, "targets": targets, "sample_ids": low.astype(np.int32)}
