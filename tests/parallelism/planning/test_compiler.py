"""Numbers read from the report of a compiler; with the real one see tests/scripts/test_plan_libtpu.py."""

from types import SimpleNamespace

import pytest

from parallelism.planning.compiler import temporary_size


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
