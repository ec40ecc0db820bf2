"""Sliding windows: each target once, with the context that is promised."""

import numpy as np
import pytest

from scripts.evaluation.score import NO_TARGET, batches, count_windows, windows


@pytest.mark.parametrize("seed", range(30))
def test_each_target_is_scored_once_with_enough_context(seed):
    rng = np.random.default_rng(seed)
    window = int(rng.integers(1, 12))
    stride = int(rng.integers(1, window + 1))
    # Ids tell document and position, so that nothing can be taken for another.
    documents = [100 * number + np.arange(rng.integers(1, 40), dtype=np.int32) for number in range(4)]
    found = list(windows(documents, window, stride))
    assert len(found) == count_windows([len(tokens) for tokens in documents], window, stride)
    scored = []
    for inputs, targets in found:
        assert inputs.shape == targets.shape == (window,)
        for at in np.flatnonzero(targets != NO_TARGET):
            scored.append(int(targets[at]))
            document, place = divmod(int(targets[at]), 100)
            context = inputs[: at + 1]
            np.testing.assert_array_equal(context, 100 * document + np.arange(place - at - 1, place))
            assert len(context) >= min(window - stride, place)
    assert scored == [token for tokens in documents for token in tokens[1:].tolist()]


def test_the_last_batch_is_filled_up():
    rows = windows([np.arange(10, dtype=np.int32)], 4, 2)
    found = list(batches(rows, 3, 4))
    assert [batch["inputs"].shape for batch in found] == [(3, 4), (3, 4)]
    assert (found[1]["targets"][1:] == NO_TARGET).all()
