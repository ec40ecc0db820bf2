"""What a table shows of several measurements."""

import pytest

from scripts.benchmarks.report import show, spread


def test_a_spread_is_median_least_most_in_any_order():
    assert spread([3.0, 1.0, 2.0, 10.0], ".1f") == "2.5 (1.0–10.0)"
    assert spread([10.0, 2.0, 1.0, 3.0], ".1f") == "2.5 (1.0–10.0)"
    assert spread([0.5, 0.25, float("inf")], ".0%") == "50% (25%–inf%)"


@pytest.mark.parametrize("width", ["20", "200"])
def test_a_table_is_markdown_whatever_the_terminal(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    row = {"tokens/s": [1000.0, 3000.0, 2000.0], "ratio": [1.0, 1.0, 1.5]}
    show("a title", {"tokens/s": ",.0f", "ratio": ".3f"}, {"a contender": row})
    title, *lines = filter(str.strip, capsys.readouterr().out.splitlines())
    assert title == "a title; median (least–most)"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "tokens/s", "ratio"]
    assert all(set(cell) == {"-"} for cell in cells[1])
    assert cells[2:] == [["a contender", "2,000 (1,000–3,000)", "1.000 (1.000–1.500)"]]
