"""Published steps: laid out by their sources, expected within the stated error, and nothing left out in silence."""

import statistics

import pytest

from parallelism.planning.step_time import calibration
from tests.claims.published import ROWS, config_of, lay_out, read_rows, stated_flops

ALL = {row["id"]: row for row in read_rows()}


@pytest.fixture(scope="module")
def laid():
    """The rows that can be laid out, and of the others the reasons."""
    found, left = {}, {}
    for name, row in ALL.items():
        try:
            found[name] = lay_out(row)
        except ValueError as reason:
            left[name] = str(reason)
    return found, left


def test_no_row_is_left_out_without_its_reason(laid):
    found, left = laid
    assert len(found) + len(left) == len(ALL)
    assert len(found) >= 52
    assert all(
        reason.startswith(("computes in", "ran on", "is split", "has ", "the ", "states", "what"))
        for reason in left.values()
    ), left


def test_times_are_within_the_stated_error_of_what_is_expected(laid):
    """Of a fit to these rows; the error of rows that a fit has not seen stands in docs/planning.md."""
    known = calibration()
    errors = [
        abs(known.seconds(each.work, each.generation) / each.seconds - 1) for each in laid[0].values() if each.seconds
    ]
    assert statistics.median(errors) < 0.12
    assert sum(error < 0.25 for error in errors) >= 0.9 * len(errors)


def test_what_ran_is_said_to_fit_and_what_was_refused_is_not(laid):
    assert {name: each.fits for name, each in laid[0].items()} == {name: each.ran for name, each in laid[0].items()}
    refused = laid[0]["v4-52B-head"]  # its compiler counted 33.27 of 30.75 GiB
    assert refused.memory_bytes / 2**30 == pytest.approx(33.27, rel=0.1)
    assert refused.device_memory / 2**30 == pytest.approx(30.75, rel=0.01)


@pytest.mark.parametrize("name", ["llama3.1-8b-v6e-8", "llama3.1-70b-v6e-256", "llama3.1-405b-v5p-1024"])
def test_a_source_counts_operations_as_it_says(name):
    """By its time, its operations a second and its tokens, all three of which it states."""
    row = ALL[name]
    tokens = float(row["seqs_per_chip"]) * int(row["seq"])
    stated = float(row["step_s"]) * float(row["tflops_per_chip"]) * 1e12
    assert tokens * stated_flops(row, config_of(row)) == pytest.approx(stated, rel=2e-3)


def test_a_feed_forward_of_two_matrices_has_two_thirds_of_the_width():
    """MaxText's 22B of 2023 has 2 × 6144 × 24576 weights in the feed-forward of a block."""
    assert config_of(ALL["v4-22B-1x"]).mlp_dim * 3 == 2 * 24576
    assert config_of(ALL["v4-22B-head"]).mlp_dim == 24576


def test_experts_are_counted_in_all_and_as_a_token_goes_through_them():
    """Llama 4 Maverick: 128 experts in every other layer, of which a token takes one, beside one that all take."""
    config = config_of(ALL["llama4-maverick-v5p-256"])
    assert config.num_params() / 1e9 == pytest.approx(400, rel=0.02)
    assert config.num_params(active=True) / 1e9 == pytest.approx(17, rel=0.05)
    assert [layer.feed_forward for layer in config.layers[:4]] == ["dense", "experts"] * 2


def test_a_table_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "short.csv").write_text("id,chip\na,v5e\n")
    with pytest.raises(ValueError, match=f"lacks the columns .*; it must have those of {ROWS}"):
        read_rows(tmp_path / "short.csv")
