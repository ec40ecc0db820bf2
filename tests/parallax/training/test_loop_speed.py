"""What the loop says of its speed, on a clock that only the test moves."""

import contextlib

import pytest

from parallax.config import TrainConfig
from parallax.training import loop
from parallax.training.loop import Stopwatch
from tests.parallax.training.harness import TIMING, TOKENS, Harness


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loop.time, "perf_counter", clock)
    return clock


def test_stopwatch_knows_what_the_time_went_to(clock):
    """A step of 1 s after a first of 100 s, data of 0.25 s, checks of 0.5 s, evaluations of 30 s, saves of 7 s."""
    config = TrainConfig(steps=10, log_interval=4, eval_interval=5, checkpoint_interval=3, check_interval=4)
    run = Harness(clock=clock)
    run.train(config)
    expected = {"compile": 100.0, "step": 9.0, "data": 2.5, "check": 7 * 0.5}
    expected |= {"evaluation": 2 * 30.0, "checkpoint": 5 * 7.0}
    assert run.stopwatch.seconds == expected
    assert sum(expected.values()) == clock.now


def test_speed_is_of_steps_and_data_and_not_of_compiling_checking_evaluating_or_saving(clock):
    config = TrainConfig(steps=10, log_interval=4, eval_interval=5, checkpoint_interval=3)
    run = Harness(clock=clock)
    run.train(config, step_flops=20.0, peak_flops=32.0)
    first, *later = [row for row in run.rows if "loss" in row]
    assert not TIMING & set(first)
    assert [row["step"] for row in later] == [4, 8, 10]
    for row in later:
        assert row["step_time"] == 1.25
        assert row["tokens_per_second"] == TOKENS / 1.25
        assert row["mfu"] == 0.5


def test_without_a_known_peak_there_is_no_utilisation():
    run = Harness()
    run.train(TrainConfig(steps=4, log_interval=1), step_flops=20.0, peak_flops=None)
    assert not any("mfu" in row for row in run.rows)
    assert all(row["tokens_per_second"] > 0 for row in run.rows[1:] if "loss" in row)


def test_stopwatch_adds_up_and_counts_what_failed(clock):
    stopwatch = Stopwatch()
    for seconds in (2.0, 3.0):
        with stopwatch.timing("step"):
            clock.now += seconds
    with contextlib.suppress(KeyError), stopwatch.timing("data"):
        clock.now += 5.0
        raise KeyError
    assert stopwatch.seconds == {"step": 5.0, "data": 5.0}
