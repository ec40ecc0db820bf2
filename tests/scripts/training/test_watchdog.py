"""A step that does not end ends its process, with the stacks of its threads; what is slow for a reason does not."""

import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from parallax.training import loop
from scripts.training.watchdog import Watchdog

ROOT = Path(__file__).parents[3]
HUNG = """
    import time
    from scripts.training import watchdog

    watchdog.GRACE_SECONDS = 0
    stopwatch = watchdog.Watchdog(0.4)

    def step(do):
        with stopwatch.timing("data"):
            pass
        with stopwatch.timing("step"):
            do()

    def hung_collective():
        time.sleep(600)

    with stopwatch.watching():
        with stopwatch.timing("compile"):
            time.sleep(0.8)
        for _ in range(3):
            step(lambda: None)
        for what in ("checkpoint", "evaluation"):
            with stopwatch.timing(what):
                time.sleep(0.8)
        print("so far", flush=True)
        HANG
"""


@pytest.mark.parametrize("hang", ["step(hung_collective)", "hung_collective()"], ids=["in a step", "between steps"])
def test_a_step_that_does_not_end_ends_the_process_and_shows_where_it_was(hang):
    command = [sys.executable, "-c", textwrap.dedent(HUNG).replace("HANG", hang)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (5, "so far\n")
    assert "error: process 0: its step has not ended within " in done.stderr
    assert "in hung_collective" in done.stderr


@pytest.fixture
def clock(monkeypatch):
    """Seconds by the stopwatch's clock, which a test moves."""
    now = [0.0]
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def spend(watchdog, clock, **seconds):
    for what, spent in seconds.items():
        with watchdog.timing(what):
            clock[0] += spent


def test_the_limit_is_a_multiple_of_the_median_and_no_less_than_five_minutes(clock):
    watchdog = Watchdog()
    assert watchdog.limit("step") == 1500  # nothing is known yet
    for seconds in (20.0, 1.0, 20.0, 500.0, 20.0):
        spend(watchdog, clock, data=2.0, step=seconds)
        spend(watchdog, clock, step=1.0)  # what reads the metrics
    spend(watchdog, clock, data=2.0)
    assert watchdog.limit("step") == watchdog.limit("data") == 20 * 23
    spend(watchdog, clock, evaluation=1.0, check=60.0, checkpoint=0.5)
    assert [watchdog.limit(what) for what in ("evaluation", "check", "checkpoint")] == [300, 1200, 1500]


def test_a_timeout_that_is_given_is_kept_for_steps(clock):
    watchdog = Watchdog(30)
    spend(watchdog, clock, compile=900.0, data=1.0, step=20.0)
    spend(watchdog, clock, data=1.0, evaluation=20.0)
    assert watchdog.limit("step") == 30
    assert watchdog.limit("evaluation") == 400


def test_none_watches_where_the_timeout_is_zero():
    watchdog = Watchdog(0)
    with watchdog.watching(), watchdog.timing("step"):
        pass
    assert watchdog.seconds.keys() == {"step"}
