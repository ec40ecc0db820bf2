"""The largest size that fits: by a rule that is false from some size on, then by what a compiler says."""

from typing import NamedTuple

import pytest

from parallelism.planning.compiler import Report
from scripts.planning.search import PRECISION, TRIES, corrected, largest


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
    """What is asked of a row: ten bytes of state, what it needs, and what a compiler says that refuses it."""

    size: int
    needed_bytes: float
    parameter_bytes: int = 4
    optimizer_bytes: int = 6
    report: Report | None = None

    def fits(self, memory):
        return self.report is None and self.needed_bytes <= memory


@pytest.mark.parametrize("first", [8, 40, 44, 48, 88])
@pytest.mark.parametrize("fixed", [0, 5])
def test_a_size_is_corrected_by_what_the_compiler_says(first, fixed):
    """Two bytes a unit beside state and a fixed part: up to 44 or 40 of them fit into a hundred bytes."""
    rows = list(corrected(first, 4, 96, lambda size: Compiled(size, 10 + fixed + 2 * size), 100))
    assert len(rows) <= TRIES
    fitting = [row.size for row in rows if row.fits(100)]
    assert max(fitting) == (44 if fixed == 0 else 40)
    assert len({row.size for row in rows}) == len(rows)


@pytest.mark.parametrize("most", [96, 98])
def test_what_fits_at_the_most_is_left(most):
    rows = list(corrected(96, 4, most, lambda size: Compiled(size, 20), 100))
    assert [row.size for row in rows] == [96]


REFUSED = "the total memory required for HLO temporaries ({:.2f}G) exceeds available HBM (15.75G)"


@pytest.mark.parametrize("words", [REFUSED, "Used {:.2f}G of 15.75G hbm", "no figures"])
def test_a_compiler_that_needs_more_than_its_peaks_say_is_asked_until_its_limit_is_found(words):
    """As libtpu did of SMALL on v5litepod-8: rows of a peak of 15.6 of 16 GiB fit, and 13 more are refused."""

    def compiled(size):
        laid_out = 15.75 + 0.03 * (size - 553)
        report = Report(error=words.format(laid_out)) if laid_out > 15.75 else None
        return Compiled(size, (0.29 + 0.0277 * size) * 2**30, 2**27, 2**27, report)

    rows = list(corrected(508, 1, 2**20, compiled, 16 * 2**30))
    largest_that_fits = max(row.size for row in rows if row.report is None)
    least_that_does_not = min(row.size for row in rows if row.report)
    assert largest_that_fits < least_that_does_not <= largest_that_fits * (1 + 1 / PRECISION)
    assert largest_that_fits >= 545
