"""summary.json of runs that end, go on and are killed, on a clock that only the test moves."""

import json
import os

import pytest

from parallax.training.loop import Stopwatch
from scripts.training import summary
from scripts.training.summary import Summary, describe_time

BEGAN = 1_000_000.0


class Clock:
    """Stands for the module `time`."""

    now = BEGAN

    def time(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(summary, "time", clock)
    return clock


@pytest.fixture
def attempt(tmp_path, clock):
    """Makes a Summary whose stopwatch has these seconds; the process began `now`, and they and 1 s more have passed."""

    def attempt(start, **seconds):
        stopwatch, began = Stopwatch(), clock.now
        made = Summary(tmp_path, began, start, stopwatch)
        stopwatch.seconds.update(seconds)
        clock.now += sum(seconds.values()) + 1.0
        return made

    return attempt


@pytest.fixture
def read(tmp_path):
    return lambda: json.loads((tmp_path / "summary.json").read_text())


def logs_at(folder, seconds):
    """metrics.jsonl, last written then."""
    (folder / "metrics.jsonl").write_text("{}\n")
    os.utime(folder / "metrics.jsonl", (seconds, seconds))


def test_one_attempt_accounts_for_all_of_its_time(attempt, read):
    attempt(0, startup=10.0, compile=5.0, step=60.0, data=4.0).write(40, 30, "finished")
    seconds = {"startup": 10.0, "compile": 5.0, "step": 60.0, "data": 4.0, "other": 1.0}
    assert read() == {
        "finished": True,
        "step": 40,
        "best_step": 30,
        "failure": None,
        "wall_seconds": 80.0,
        "seconds": seconds,
        "goodput": 0.75,
        "attempts": [{"from_step": 0, "began": BEGAN, "to_step": 40, "end": "finished", "seconds": seconds}],
    }


def test_an_attempt_keeps_what_it_changed_of_the_run(tmp_path, read):
    for start, changed in ((0, {}), (12, {"--learning-rate": [1e-3, 5e-4]}), (15, {})):
        Summary(tmp_path, BEGAN, start, Stopwatch(), changed).write(start + 3, None, "stopped")
    assert [attempt.get("changed") for attempt in read()["attempts"]] == [None, {"--learning-rate": [1e-3, 5e-4]}, None]


@pytest.mark.parametrize(("end", "failure"), [("stopped", None), ("failed", "stopped: 3 steps in a row"), ("", None)])
def test_only_a_finished_run_says_so(attempt, read, end, failure):
    attempt(0, step=1.0).write(7, None, end, failure)
    assert (read()["finished"], read()["step"], read()["failure"]) == (False, 7, failure)
    assert read()["attempts"][0]["end"] == end


def test_a_later_word_of_an_attempt_replaces_the_earlier_one(attempt, read, clock):
    running = attempt(0, step=8.0)
    running.write(10, None)
    clock.now += 5.0
    running.write(20, 20, "finished")
    (only,) = read()["attempts"]
    assert (only["to_step"], only["end"], only["seconds"]) == (20, "finished", {"step": 8.0, "other": 6.0})


def test_attempts_add_up_and_later_start_ups_are_restarts(attempt, read, clock):
    attempt(0, startup=10.0, step=20.0, check=1.0).write(10, 10, "stopped")
    clock.now += 500.0  # nothing runs, so nothing is spent
    attempt(10, startup=7.0, step=30.0).write(25, 20, "failed", "stopped: a peer")
    attempt(20, startup=6.0, step=40.0).write(50, 20, "finished")
    assert read()["seconds"] == {"startup": 10.0, "restart": 13.0, "step": 90.0, "check": 1.0, "other": 3.0}
    assert read()["wall_seconds"] == 117.0
    assert read()["goodput"] == round(90 / 117, 4)
    assert [(each["from_step"], each["to_step"], each["end"]) for each in read()["attempts"]] == [
        (0, 10, "stopped"),
        (10, 25, "failed"),
        (20, 50, "finished"),
    ]
    assert read()["attempts"][1]["seconds"]["startup"] == 7.0


def test_a_killed_attempt_lost_the_time_from_its_last_save_to_its_last_row(attempt, read, clock, tmp_path):
    attempt(0, startup=10.0, step=20.0).write(10, 10)  # at 31 s
    logs_at(tmp_path, BEGAN + 45)
    clock.now += 300.0
    resumed = attempt(10, startup=8.0, step=50.0)
    logs_at(tmp_path, BEGAN + 400)  # rows of the new attempt are not lost ones
    resumed.write(30, 30, "finished")
    killed, last = read()["attempts"]
    assert killed["end"] == "killed"
    assert killed["seconds"] == {"startup": 10.0, "step": 20.0, "other": 1.0, "lost": 14.0}
    assert "lost" not in last["seconds"]
    expected = {"startup": 10.0, "step": 70.0, "other": 2.0, "lost": 14.0, "restart": 8.0}
    assert read()["seconds"] == expected
    assert read()["wall_seconds"] == sum(expected.values())

    attempt(30).write(30, 30, "finished")
    assert read()["attempts"][0] == killed, "what was settled stays"


@pytest.mark.parametrize("last_row", [None, BEGAN + 20], ids=["no row", "a row before the save"])
def test_an_attempt_killed_right_after_a_save_lost_nothing(attempt, read, tmp_path, last_row):
    attempt(0, step=30.0).write(10, 10)
    if last_row is not None:
        logs_at(tmp_path, last_row)
    attempt(10).write(10, 10, "finished")
    assert read()["attempts"][0]["seconds"] == {"step": 30.0, "other": 1.0, "lost": 0.0}


def test_attempts_killed_before_their_first_save_are_time_lost(attempt, read, clock, tmp_path):
    """They leave no word of their own: the time since the last attempt that did began is lost."""
    attempt(0, step=30.0).write(10, 10)
    attempt(10)
    logs_at(tmp_path, BEGAN + 100)
    attempt(10, step=5.0).write(20, 10, "finished")
    assert [each["end"] for each in read()["attempts"]] == ["killed", "finished"]
    assert read()["seconds"]["lost"] == 100 - 31


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\xff\xfe",
        b'{"attempts": [',
        b"[]",
        b'{"attempts": 3}',
        b'{"attempts": [{}]}',
        b'{"attempts": [{"from_step": 0, "began": 1.0, "to_step": 5, "end": "stopped", "seconds": [1.0]}]}',
        b'{"attempts": [{"from_step": 0, "began": null, "to_step": 5, "end": "", "seconds": {"step": 1.0}}]}',
    ],
)
def test_a_damaged_file_costs_the_account_of_earlier_attempts_and_nothing_else(attempt, read, tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    attempt(10, startup=1.0, step=2.0).write(20, 20, "finished")
    assert [each["from_step"] for each in read()["attempts"]] == [10]
    assert read()["seconds"] == {"startup": 1.0, "step": 2.0, "other": 1.0}


def test_time_is_described_in_one_line(attempt, tmp_path):
    attempt(0, startup=10.0, step=85.0, evaluation=3.6, check=0.4).write(10, 10, "stopped")
    assert describe_time(tmp_path) == "100 s: steps 85%, startup 10%, evaluation 4%, other 1%"
    attempt(10, startup=49.0, step=50.0).write(20, 20, "finished")
    expected = "200 s in 2 attempts: steps 68%, restart 24%, startup 5%, evaluation 2%, other 1%"
    assert describe_time(tmp_path) == expected
