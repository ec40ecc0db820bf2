"""Attempts at a run: resumed, stopped, killed and failed, on one layout and on another."""

import errno
import gc
import itertools
import json
import math
import os
import resource
import signal
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from parallax.storage import make_folder
from parallax.training import checkpoint_folder
from parallax.training.checkpoint import Checkpointer
from parallax.training.checkpoint_folder import CheckpointFolder
from parallelism import sentinel
from scripts import train
from scripts.training import attempt, record
from tests.scripts.runs import checkpoints, rows


def losses(folder, name="loss"):
    return [row[name] for row in rows(folder) if name in row]


def curve(folder, name):
    """Losses by step."""
    return {row["step"]: row[name] for row in rows(folder) if name in row}


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


def test_resume_on_another_layout_goes_on_with_the_same_curve(train_small, text, template):
    for steps, layout in (("7", ["--mesh", "fsdp=8"]), ("12", [])):
        flags = ["--steps", steps, "--schedule-steps", "12", *layout]
        status, _, err = train_small("--output-dir", "moved", "--resume", *flags)
        assert status == 0, err
    for name in ("loss", "eval_loss"):
        moved = curve(text / "moved", name)
        for step, loss in curve(template, name).items():
            assert moved[step] == pytest.approx(loss, rel=1e-5)  # sums in another order


def test_steps_that_are_not_finite_stop_the_run(train_small, text, paste):
    """What was saved at step 1 and later gave no finite step: it is set aside, and the printed command works."""
    wild = ("--learning-rate", "1e30", "--max-bad-steps", "3", "--checkpoint-interval", "1")
    status, _, err = train_small("--output-dir", "run", *wild)
    assert status == 1
    *_, error = err.splitlines()
    assert error.startswith("error: stopped: 3 steps in a row up to step 4 had a loss or gradient that is not finite; ")
    assert "Traceback" not in err
    found = summary_of(text / "run")
    assert (found["finished"], found["step"], found["attempts"][-1]["end"]) == (False, 0, "failed")
    assert "3 steps in a row" in found["failure"]
    assert checkpoints(text / "run") == []
    assert {path.name for path in (text / "run" / "checkpoints").iterdir()} >= {"1.diverged", "2.diverged"}
    assert "run has no checkpoint; try " in error
    assert paste(error.partition("; try ")[2])[0] == 0
    assert summary_of(text / "run")["attempts"][-1]["changed"] == {"--learning-rate": [1e30, 1e-3]}
    assert np.isfinite(losses(text / "run")).all()


def test_a_run_that_diverges_after_a_good_checkpoint_keeps_it(call, text, finished, paste):
    """Step 13 from the checkpoint of step 12 is finite, and what it leaves gives no finite step."""
    wild = ("--steps", "18", "--learning-rate", "1e30", "--dtype", "bfloat16", "--max-bad-steps", "3")
    status, _, err = call(train, "--resume", "--output-dir", "run", *wild, "--checkpoint-interval", "1")
    assert status == 1
    *_, error = err.splitlines()
    assert "the last good checkpoint is step 12 of run; try " in error
    assert error.endswith("--learning-rate 0.001, or with --dtype float32 instead of that rate")
    assert checkpoints(finished)[-1] == 12
    assert {path.name for path in (finished / "checkpoints").iterdir()} >= {"13.diverged"}
    assert paste(error.partition("; try ")[2].partition(", or ")[0])[0] == 0
    assert rows(finished)[-1]["step"] == 18


def one_higher_on_a_device(x):
    shards = [
        jax.device_put(np.asarray(shard.data) + np.asarray(number == 5, x.dtype), shard.device)
        for number, shard in enumerate(x.addressable_shards)
    ]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


def test_replicas_that_differ_end_the_run_before_they_are_saved(train_small, text, monkeypatch):
    """With the exit status of a failure from outside, since the same steps would go well on other devices."""
    check, checked = sentinel.check, []

    def tampered(step, trees, facts):
        checked.append(step)
        if step == 6:
            trees = jax.tree.map(one_higher_on_a_device, trees)
        check(step, trees, facts)

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


@pytest.fixture
def full_at(monkeypatch):
    """Makes the disk full for the checkpoints of these steps: a file of 10 kB and more cannot be written."""
    before, full = resource.getrlimit(resource.RLIMIT_FSIZE), set()
    wait, make_room = Checkpointer.wait, CheckpointFolder.make_room

    def waited(self):
        try:
            wait(self)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def made_room(self, step):
        make_room(self, step)
        if step in full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))

    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)  # else half a program stays for all tests
    monkeypatch.setattr(Checkpointer, "wait", waited)
    monkeypatch.setattr(CheckpointFolder, "make_room", made_room)
    yield full.update
    gc.collect()  # so that what a failed save leaves unfinished warns here, and not in some later test
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_takes_one_line_and_is_tried_again_at_the_next(train_small, text, full_at):
    full_at({3, 6})
    status, _, err = train_small("--output-dir", "run", "--checkpoint-interval", "3")
    assert status == 0, err
    told = [line for line in err.splitlines() if "unsaved" in line]
    assert [line.split(" could")[0] for line in told] == ["unsaved   checkpoint 3", "unsaved   checkpoint 6"]
    assert all(line.endswith("; the next save tries again") for line in told)
    usual = {"run", "model", "dataset", "tokens", "steps", "strategy", "step", "finished", "time"}
    assert {line.split()[0] for line in err.splitlines()} == {*usual, "unsaved"}
    assert checkpoints(text / "run") == [9, 12]
    assert (summary_of(text / "run")["step"], summary_of(text / "run")["finished"]) == (12, True)


def test_a_last_save_that_fails_is_a_failure_and_the_summary_names_what_is_saved(train_small, text, full_at):
    full_at({6, 9, 12})
    status, _, err = train_small("--output-dir", "run", "--checkpoint-interval", "3")
    assert status == 3
    assert "Traceback" not in err
    assert "tensorstore_spec" not in err
    assert err.splitlines()[-1].startswith("error: stopped: checkpoint 12 could not be saved in ")
    assert err.splitlines()[-1].endswith("; the last good checkpoint is step 3 of run")
    found = summary_of(text / "run")
    assert (found["step"], found["finished"], found["attempts"][-1]["end"]) == (3, False, "failed")
    assert found["attempts"][-1]["to_step"] == 3


def test_a_disk_that_is_full_at_the_first_save_takes_one_line(train_small, text, monkeypatch):
    full = iter([OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])

    def make(folder):
        for error in full:
            raise error
        make_folder(folder)

    monkeypatch.setattr(checkpoint_folder, "make_folder", make)
    status, _, err = train_small("--output-dir", "run", "--checkpoint-interval", "3")
    assert status == 0, err
    (line,) = (line for line in err.splitlines() if "unsaved" in line)
    assert line.startswith("unsaved   checkpoint 3 could not be saved in ")
    assert line.endswith(": [Errno 28] No space left on device; the next save tries again")
    assert checkpoints(text / "run") == [6, 9, 12]


FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\na page of buffers")


def of_a_save(cause):
    error = OSError("checkpoint 6 could not be saved")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (of_a_save(FULL), 1, "allocating 9 bytes.; the devices' memory is too small for this run; try --remat full"),
        (jax.errors.JaxRuntimeError("INTERNAL: core halted"), 5, "the run lost a device: INTERNAL: core halted"),
        (of_a_save(None), 3, "checkpoint 6 could not be saved"),
    ],
    ids=["memory in a save", "device", "disk"],
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


@pytest.mark.parametrize("number", [1, 4])
def test_a_bucket_that_fails_while_a_run_trains_is_a_failure_from_outside(train_small, text, monkeypatch, number):
    """With an error of gcsfs, which is no OSError, at each look at what is saved from the `number`th on."""
    failing = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})
    looks, best_first = itertools.count(1), CheckpointFolder.best_first

    def look(self):
        if next(looks) >= number:
            raise failing("backend error, 503")
        return best_first(self)

    monkeypatch.setattr(CheckpointFolder, "best_first", look)
    status, _, err = train_small("--output-dir", "run", "--checkpoint-interval", "3")
    assert status == 3
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: stopped: ")
    assert "backend error, 503; run does not say what is saved (backend error, 503); go on" in err.splitlines()[-1]


def test_whatever_ends_a_run_gives_the_terminal_back(train_small, monkeypatch):
    lost, closed = jax.errors.JaxRuntimeError("UNAVAILABLE: a peer is gone"), []

    def check(step, *arguments, **how):
        raise lost

    monkeypatch.setattr(sentinel, "check", check)
    monkeypatch.setattr(attempt, "has_peers", lambda: True)
    monkeypatch.setattr(attempt, "Files", Mock())
    monkeypatch.setattr(attempt.Terminal, "close", lambda self: closed.append(self))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a peer is gone"):
        train_small("--output-dir", "run", "--strategy", "pmap")
    assert len(closed) == 1


def test_sigterm_saves_and_exits_well(train_small, text, monkeypatch):
    """At step 5 of very many, in this process; tests/claims/soak.py, run by hand, sends it to real ones."""
    write = record.Files.row

    def struck(self, row):
        write(self, row)
        if row["step"] == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(record.Files, "row", struck)
    status, _, err = train_small("--output-dir", "run", "--steps", "100000", "--log-interval", "1")
    assert status == 0
    assert "--resume" in err
    saved = checkpoints(text / "run")[-1]
    assert saved >= rows(text / "run")[-1]["step"]
    found = summary_of(text / "run")
    assert (found["step"], found["finished"], found["attempts"][-1]["end"]) == (saved, False, "stopped")
