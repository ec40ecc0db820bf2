"""Numbers read from the report of a compiler; with the real one see tests/scripts/test_plan_libtpu.py."""

from types import SimpleNamespace

import pytest

from parallelism.planning.compiler import Report, temporary_size


@pytest.mark.parametrize(
    ("peak", "temp", "output", "expected"),
    [
        (150, 70, 100, 50),  # gaps are laid out too
        (250, 40, 100, 40),  # most of the peak is on the chip
        (150, 30, 110, 40),  # ten of the output are no argument that was given away
    ],
)
def test_memory_in_use_is_the_lesser_of_the_peak_and_of_what_is_laid_out(peak, temp, output, expected):
    memory = SimpleNamespace(
        argument_size_in_bytes=100,
        alias_size_in_bytes=100,
        peak_memory_in_bytes=peak,
        temp_size_in_bytes=temp,
        output_size_in_bytes=output,
    )
    assert temporary_size(memory) == expected


@pytest.mark.parametrize(("unit", "size"), [("M", 2**20), ("G", 2**30), ("T", 2**40)])
def test_how_much_is_missing_is_read_in_any_unit(unit, size):
    report = Report(error=f"Used 1.25{unit} of 15.75G hbm. Exceeded hbm capacity by 1.00{unit}")
    assert report.shortage == (1.25 * size, 15.75 * 2**30)
    assert Report(error="it ran out of registers").shortage is None
