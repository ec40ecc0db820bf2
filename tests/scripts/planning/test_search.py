"""The largest size that fits: by a rule that is false from some size on, then by what a compiler says."""

from typing import NamedTuple

import pytest

from scripts.planning.search import TRIES, corrected, largest


@pytest.mark.parametrize(("limit", "found"), [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (33, 32), (1000, 96), (96, 96)])
def test_the_largest_multiple_that_fits_is_found(limit, found):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    assert largest(4, 99, fits) == found
    assert all(size % 4 == 0 and 0 < size <= 99 for size in tried)
    assert len(tried) <= 9


class Compiled(NamedTuple):
    """What is asked of a row: ten bytes of state, and its needs."""

    size: int
    needed_bytes: float
    parameter_bytes: int = 4
    optimizer_bytes: int = 6
    report: None = None

    def fits(self, memory):
        return self.needed_bytes <= memory


@pytest.mark.parametrize("first", [8, 40, 44, 48, 88])
@pytest.mark.parametrize("fixed", [0, 5])
def test_a_size_is_corrected_by_what_the_compiler_says(first, fixed):
    """Two bytes a unit beside state and a fixed part: up to 44 or 40 of them fit into a hundred bytes."""
    rows = list(corrected(first, 4, 96, lambda size: Compiled(size, 10 + fixed + 2 * size), 100))
    assert len(rows) <= TRIES
    fitting = [row.size for row in rows if row.fits(100)]
    assert max(fitting) == (44 if fixed == 0 else 40)
    assert len({row.size for row in rows}) == len(rows)


def test_what_fits_at_the_most_is_left():
    rows = list(corrected(96, 4, 96, lambda size: Compiled(size, 20), 100))
    assert [row.size for row in rows] == [96]
