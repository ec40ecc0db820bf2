"""The entropy that tests/claims/forecasts.py holds the limit of a fit against."""

import collections

import numpy as np
import pytest

from tests.claims.forecasts import entropy_of

WORDS = {"ab": 0.5, "a": 0.2, "bab": 0.2, "b": 0.1}
SYMBOLS = 8


def test_the_entropy_of_rows_is_that_of_all_texts_they_are_cut_from():
    """Each row of a few symbols with its chance, from every sequence of words and every place to begin in the first."""
    chances, firsts = collections.Counter(), collections.Counter()

    def lengthen(text, begin, chance):
        if len(text) - begin >= SYMBOLS:
            row = text[begin : begin + SYMBOLS]
            chances[row] += chance
            firsts[row[0]] += chance
            return
        for word, share in WORDS.items():
            lengthen(f"{text}{word} ", begin, chance * share)

    symbols = sum(chance * (len(word) + 1) for word, chance in WORDS.items())
    for word, chance in WORDS.items():
        for begin in range(len(word) + 1):
            lengthen(f"{word} ", begin, chance / symbols)
    assert sum(chances.values()) == pytest.approx(1)
    for row, chance in chances.items():
        assert entropy_of([row], WORDS) == pytest.approx(-np.log(chance / firsts[row[0]]) / (SYMBOLS - 1))
