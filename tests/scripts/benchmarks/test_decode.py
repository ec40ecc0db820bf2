"""`benchmark.py decode`: what a token costs, and what is compared."""

import pytest

from scripts.benchmarks.decode import result, same_tokens, step_bytes
from scripts.benchmarks.settings import MODELS


def test_what_a_token_must_read():
    model = MODELS["trial"]
    cache = 2 * 2 * 2 * 16  # keys and values, of two layers, two heads, of 16
    assert step_bytes(model, 3, 10) == 4 * (model.num_params() + 3 * 10 * cache)


def test_speed_bandwidth_and_ratios():
    """By hand: two rows of 11 tokens, of which the later ten take 0.1 s each, or 0.4."""
    found = result(
        2,
        11,
        50.0,
        {
            "parallax": [{"first": 1.0, "whole": 2.0}],
            "transformers": [{"first": 4.0, "whole": 8.0}],
            "bandwidth": [{"bytes_per_second": 1000.0}],
        },
    )
    assert {column: value for column, (value,) in found["parallax"].items()} == pytest.approx(
        {
            "first token ms": 1000.0,
            "tokens/s": 11.0,
            "of the bandwidth": 0.5,
            "ratio": 1.0,
            "ratio of the first token": 1.0,
        }
    )
    assert found["transformers"]["ratio"] == found["transformers"]["ratio of the first token"] == [4.0]
    assert found["transformers"]["of the bandwidth"] == pytest.approx([0.125])


def test_contenders_that_begin_with_other_tokens_are_refused():
    assert same_tokens([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75
    with pytest.raises(ValueError, match="begin with different tokens"):
        same_tokens([[1, 2]], [[2, 2]])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--models giant", "model 'giant' is not one of"),
        ("--batches 1,x", "batch 'x' must be a positive number"),
        ("--new-tokens 1", "new_tokens=1 must be at least 2"),
        ("--prompt-tokens 0", "prompt_tokens=0 must be positive"),
        ("--contenders transformers", "contenders 'transformers' must be parallax"),
    ],
)
def test_bad_input_is_one_line(refuse, args, message):
    refuse(f"decode {args}", message)
