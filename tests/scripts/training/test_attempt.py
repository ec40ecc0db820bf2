"""Attempts at a run: resumed, stopped, killed and failed, on one layout and on another."""

import json
import os
import signal

import jax
import pytest

from parallelism import sentinel
from scripts import train
from tests.scripts.runs import SHORT, SMALL, Training, checkpoints, reached, rows, single


def losses(folder, name="loss"):
    return [row[name] for row in rows(folder) if name in row]


def columns(folder):
    """Steps and held-out losses."""
    evaluated = [row for row in rows(folder) if "eval_loss" in row]
    return [row["step"] for row in evaluated], [row["eval_loss"] for row in evaluated]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_finished_run_stays_as_it_is(train_small, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*.json*") if path.name != "summary.json"}
    first, again = (train_small("--output-dir", "run", "--resume", "--print-param-hash") for _ in range(2))
    assert (first[0], again[0]) == (0, 0)
    assert first[1] == again[1]
    assert first[1].startswith("params sha256 ")
    assert before == {path: path.read_bytes() for path in before}


def test_resume_takes_its_settings_from_the_run_and_accounts_for_all_attempts(finished, call):
    """Of the first, which stands there as one that was killed 100 s after its last word."""
    before = summary_of(finished)
    (first,) = before["attempts"]
    assert {"startup", "compile", "step", "data", "check", "evaluation", "checkpoint", "other"} == set(first["seconds"])
    assert 0 < before["goodput"] < 1
    last_row = first["began"] + before["wall_seconds"] + 100
    os.utime(finished / "metrics.jsonl", (last_row, last_row))
    before["attempts"] = [first | {"end": ""}]
    (finished / "summary.json").write_text(json.dumps(before))
    status, _, err = call(train, "--resume", "--output-dir", "run", "--steps", "15")
    assert status == 0
    assert rows(finished)[-1]["step"] == 15
    assert json.loads((finished / "config.json").read_text())["model"]["embed_dim"] == 32
    found = summary_of(finished)
    killed, second = found["attempts"]
    assert killed["end"] == "killed"
    assert killed["seconds"]["lost"] == pytest.approx(100, abs=0.1)  # milliseconds are rounded
    assert (second["from_step"], second["to_step"], second["end"]) == (12, 15, "finished")
    assert found["seconds"]["restart"] == second["seconds"]["startup"]
    assert found["wall_seconds"] == pytest.approx(sum(found["seconds"].values()), abs=0.1)
    assert "in 2 attempts: steps" in err


def test_resume_on_another_layout_goes_on_with_the_same_curve(train_small, text):
    fixed = ["--log-interval", "1", "--final-rate", "1", "--warmup-steps", "2"]  # a rate that no end decides
    train_small("--output-dir", "whole", *fixed)
    for steps, layout in (("5", ["--mesh", "fsdp=8"]), ("9", ["--strategy", "pmap"]), ("12", [])):
        status, _, err = train_small("--output-dir", "moved", "--resume", "--steps", steps, *fixed, *layout)
        assert status == 0, err
    assert losses(text / "moved") == pytest.approx(losses(text / "whole"), rel=1e-5)  # sums in another order
    held_out = dict(zip(*columns(text / "moved"), strict=True))
    for step, loss in zip(*columns(text / "whole"), strict=True):
        assert held_out[step] == pytest.approx(loss, rel=1e-5)


def test_steps_that_are_not_finite_stop_the_run(train_small, text):
    wild = ("--learning-rate", "1e30", "--max-bad-steps", "3", "--clip-norm", "0")
    status, _, err = train_small("--output-dir", "run", *wild)
    assert status == 1
    assert "3 steps in a row" in err
    assert "Traceback" not in err
    found = summary_of(text / "run")
    assert (found["finished"], found["step"], found["attempts"][-1]["end"]) == (False, 0, "failed")
    assert "3 steps in a row" in found["failure"]


def test_replicas_that_differ_end_the_run_before_they_are_saved(train_small, text, monkeypatch):
    """With the exit status of a failure from outside, since the same steps would go well on other devices."""
    check, checked = sentinel.check, []

    def tampered(step, trees, facts, **how):
        checked.append(step)
        if step == 6:
            trees = jax.tree.map(lambda x: x.at[5].add(1), trees)
        check(step, trees, facts, **how)

    monkeypatch.setattr(sentinel, "check", tampered)
    intervals = ["--checkpoint-interval", "3", "--check-interval", "5"]
    status, out, err = train_small("--output-dir", "run", "--strategy", "pmap", *intervals)
    assert (status, out) == (3, "")
    assert checked == [3, 5, 6]
    assert err.splitlines()[-1].startswith("error: stopped: ")
    assert "last good checkpoint is step 3 of run" in err
    assert checkpoints(text / "run") == [3]
    assert losses(text / "run", "eval_loss") == []
    found = summary_of(text / "run")
    assert (found["finished"], found["step"], found["best_step"]) == (False, 3, 3)
    assert found["failure"] in err


FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\na page of buffers")


def of_a_save(cause):
    error = OSError("checkpoint 6 could not be saved")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (FULL, 1, "allocating 9 bytes.; the devices' memory is too small for this run; try --remat full"),
        (of_a_save(FULL), 1, "try --remat full"),
        (jax.errors.JaxRuntimeError("UNIMPLEMENTED: not\non this device"), 1, "UNIMPLEMENTED: not on this device"),
        (jax.errors.JaxRuntimeError("INTERNAL: core halted"), 5, "the run lost a device: INTERNAL: core halted"),
        (of_a_save(None), 3, "checkpoint 6 could not be saved"),
    ],
    ids=["memory", "memory in a save", "unimplemented", "device", "disk"],
)
def test_an_error_of_the_device_ends_the_run_with_its_words_and_a_status(
    error, status, words, train_small, text, monkeypatch
):
    def check(step, *arguments, **how):
        if step == 6:
            raise error

    monkeypatch.setattr(sentinel, "check", check)
    found, _, err = train_small("--output-dir", "run", "--strategy", "pmap", "--checkpoint-interval", "3")
    assert found == status
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err
    assert "the last good checkpoint is step 3 of run" in err
    summary = summary_of(text / "run")
    assert summary["attempts"][-1]["end"] == "failed"
    assert words in summary["failure"]


def test_sigterm_saves_and_exits_well(text):
    flags = ["--dataset", "text.txt", *SMALL, *SHORT, "--steps", "100000", "--log-interval", "1"]
    training = Training(text, "run", single(), flags)
    assert training.wait_for(reached(text / "run", 5)), training.words()
    training.process.send_signal(signal.SIGTERM)
    assert training.end() == 0, training.words()
    assert "--resume" in training.words()
    saved = checkpoints(text / "run")[-1]
    assert saved >= rows(text / "run")[-1]["step"]
    found = summary_of(text / "run")
    assert (found["step"], found["finished"], found["attempts"][-1]["end"]) == (saved, False, "stopped")
