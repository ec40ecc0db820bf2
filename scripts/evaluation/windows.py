"""A window that slides over documents of tokens.

Invariant: each token but the first of a document is a target once, seen from a window in which at least
window - stride tokens stand before it, or all that there are.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from parallax.training.loss import NO_TARGET


def windows(documents: Sequence[np.ndarray], window: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets), each int32 [window]; targets are NO_TARGET where nothing is scored.

    A document's first window scores all of its targets, each further one the last `stride`. Windows are filled up
    with padding at their end, which no earlier token sees.
    """
    for tokens in documents:
        last = len(tokens) - 1  # targets
        start = 0
        scored = 0
        while scored < last:
            stop = min(start + window, last)
            inputs, targets = np.zeros(window, np.int32), np.full(window, NO_TARGET, np.int32)
            inputs[: stop - start] = tokens[start:stop]
            targets[scored - start : stop - start] = tokens[scored + 1 : stop + 1]
            yield inputs, targets
            scored, start = stop, stop + stride - window


def count_windows(lengths: Sequence[int], window: int, stride: int) -> int:
    """How many `windows` gives for documents of so many tokens."""
    rest = (max(length - 1 - window, 0) for length in lengths)
    return sum((length > 1) + -(-more // stride) for length, more in zip(lengths, rest, strict=True))


def batches(rows: Iterator[tuple[np.ndarray, np.ndarray]], size: int, window: int) -> Iterator[dict[str, np.ndarray]]:
    """Windows by the batch; the last batch is filled up with rows in which nothing is scored."""
    batch: list[tuple[np.ndarray, np.ndarray]] = []
    padding = (np.zeros(window, np.int32), np.full(window, NO_TARGET, np.int32))
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield _stacked(batch)
            batch = []
    if batch:
        yield _stacked(batch + [padding] * (size - len(batch)))


def _stacked(batch: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    inputs, targets = zip(*batch, strict=True)
    return {"inputs": np.stack(inputs), "targets": np.stack(targets)}
