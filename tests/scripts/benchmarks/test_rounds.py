"""Contenders take turns, and a ratio is that of two which followed each other."""

import pytest

from scripts import benchmark
from scripts.benchmarks.rounds import Timing, Worker, measure, ratio


class Recorded:
    """Stands for a contender that needs `seconds` for a unit of work: notes when it is asked for how much."""

    def __init__(self, name, log, seconds):
        self.name, self.log, self.seconds = name, log, seconds

    def ask(self, units):
        self.log.append((self.name, units))
        return {"seconds": units * self.seconds, "at": len(self.log)}


def test_contenders_take_turns_and_the_first_round_does_not_count():
    log = []
    contenders = [Recorded("A", log, 0.25), Recorded("B", log, 4.0)]
    found = measure(contenders, Timing(rounds=2, seconds=1.0), "test")
    a, b = ("A", 4), ("B", 1)  # each for a second, or for a unit
    assert log[-6:] == [b, a, a, b, b, a]
    assert [each["at"] for each in found["B"]] == [len(log) - 2, len(log) - 1]
    assert [(each["units"], each["each"]) for each in found["A"]] == 2 * [(4, 0.25)]


def test_a_ratio_is_taken_pair_by_pair():
    """A machine that becomes ten times slower for a round changes both of a pair, and no ratio."""
    assert ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_a_worker_answers_wrong_input_by_its_rule():
    with pytest.raises(ValueError, match="ours: setting 'x' must be"):
        Worker("ours", "train-parallax", setting="x", strategy="single", weights="")


def test_a_worker_that_dies_shows_what_it_wrote_last():
    with pytest.raises(RuntimeError, match=r"ours ended with status 1\n(?s:.*)KeyError: 'fly'"):
        Worker("ours", "fly")


def test_help_names_every_command(call):
    status, out, _ = call("--help")
    assert status == 0
    assert all(f"\n  {name} " in out for name in benchmark.COMMANDS)


def test_an_unknown_command_is_refused(refuse):
    refuse("fly", "command 'fly' is not one of train")
