"""Attempts at a run: resumed, stopped, killed and failed, on one layout and on another."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from scripts import train
from scripts.training import attempt
from scripts.training.attempt import Attempt
from tests.scripts.runs import checkpoints, rows


def losses(folder, name="loss"):
    return [row[name] for row in rows(folder) if name in row]


def columns(folder):
    """Steps and held-out losses."""
    evaluated = [row for row in rows(folder) if "eval_loss" in row]
    return [row["step"] for row in evaluated], [row["eval_loss"] for row in evaluated]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_finished_run_stays_as_it_is(call, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*.json*") if path.name != "summary.json"}
    first, again = (call("--output-dir", "run", "--resume", "--print-param-hash") for _ in range(2))
    assert (first[0], again[0]) == (0, 0)
    assert first[1] == again[1]
    assert first[1].startswith("params sha256 ")
    assert before == {path: path.read_bytes() for path in before}


def test_resume_takes_its_settings_from_the_run_and_accounts_for_all_attempts(finished, monkeypatch, capsys):
    """Of the first, which stands there as one that was killed 100 s after its last word."""
    before = summary_of(finished)
    (first,) = before["attempts"]
    assert {"startup", "compile", "step", "data", "check", "evaluation", "checkpoint", "other"} == set(
        first["seconds"]
    )
    assert 0 < before["goodput"] < 1
    last_row = first["began"] + before["wall_seconds"] + 100
    os.utime(finished / "metrics.jsonl", (last_row, last_row))
    before["attempts"] = [first | {"end": ""}]
    (finished / "summary.json").write_text(json.dumps(before))
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--output-dir", "run", "--steps", "15"])
    assert train.main() == 0
    assert rows(finished)[-1]["step"] == 15
    assert json.loads((finished / "config.json").read_text())["model"]["embed_dim"] == 32
    found = summary_of(finished)
    killed, second = found["attempts"]
    assert killed["end"] == "killed"
    assert killed["seconds"]["lost"] == pytest.approx(100, abs=0.1)  # milliseconds are rounded
    assert (second["from_step"], second["to_step"], second["end"]) == (12, 15, "finished")
    assert found["seconds"]["restart"] == second["seconds"]["startup"]
    assert found["wall_seconds"] == pytest.approx(sum(found["seconds"].values()), abs=0.1)
    assert "in 2 attempts: steps" in capsys.readouterr().err


def test_resume_on_another_layout_goes_on_with_the_same_curve(call, text, monkeypatch):
    """Held-out text is also evaluated in batches of another size."""
    fixed = ["--final-rate", "1", "--warmup-steps", "2"]  # a rate that does not depend on where a part ends
    call("--output-dir", "whole", "--log-interval", "1", *fixed)
    monkeypatch.setattr(attempt, "EVALUATED_TOKENS", 1)
    for steps, layout in (("5", ["--mesh", "fsdp=8"]), ("9", ["--strategy", "pmap"]), ("12", [])):
        flags = ["--log-interval", "1", *fixed, *layout]
        assert call("--output-dir", "moved", "--resume", "--steps", steps, *flags)[0] == 0
    assert losses(text / "moved") == pytest.approx(losses(text / "whole"), rel=1e-5)  # sums in another order
    held_out = dict(zip(*columns(text / "moved"), strict=True))
    for step, loss in zip(*columns(text / "whole"), strict=True):
        assert held_out[step] == pytest.approx(loss, rel=1e-5)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(call, finished):
    _, expected, _ = call("--output-dir", "run", "--resume", "--print-param-hash")
    newest = finished / "checkpoints" / "12"
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    status, found, err = call("--output-dir", "run", "--resume", "--print-param-hash")
    assert status == 0
    assert found == expected
    assert file.name in err
    assert "from step 6" in err
    assert [path.name for path in newest.parent.glob("12.damaged*")]


def test_steps_that_are_not_finite_stop_the_run(call, text):
    status, _, err = call(
        "--output-dir", "run", "--learning-rate", "1e30", "--max-bad-steps", "3", "--clip-norm", "0"
    )
    assert status == 1
    assert "3 steps in a row" in err
    assert "Traceback" not in err
    found = summary_of(text / "run")
    assert (found["finished"], found["step"], found["attempts"][-1]["end"]) == (False, 0, "failed")
    assert "3 steps in a row" in found["failure"]


def test_replicas_that_differ_end_the_run_before_they_are_saved(call, text, monkeypatch):
    """With the exit status of a failure from outside, since the same steps would go well on other devices."""
    check, checked = Attempt._check, []

    def tampered(self, step, state, batch):
        checked.append(step)
        if step == 6:
            state = state.replace(params=jax.tree.map(lambda x: x.at[5].add(1e-3), state.params))
        check(self, step, state, batch)

    monkeypatch.setattr(Attempt, "_check", tampered)
    intervals = ["--checkpoint-interval", "3", "--check-interval", "5"]
    status, out, err = call("--output-dir", "run", "--strategy", "pmap", *intervals)
    assert (status, out) == (3, "")
    assert checked == [3, 5, 6]
    assert err.splitlines()[-1].startswith("error: stopped: ")
    assert "last good checkpoint is step 3 of run" in err
    assert checkpoints(text / "run") == [3]
    assert losses(text / "run", "eval_loss") == []
    found = summary_of(text / "run")
    assert (found["finished"], found["step"], found["best_step"]) == (False, 3, 3)
    assert found["failure"] in err


def test_sigterm_saves_and_exits_well(text, command):
    flags = ["--steps", "100000", "--log-interval", "1", "--output-dir", "run"]
    process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = text / "run" / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count("\n") > 5:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "--resume" in err
    saved = checkpoints(text / "run")[-1]
    assert saved >= rows(text / "run")[-1]["step"]
    found = summary_of(text / "run")
    assert (found["step"], found["finished"], found["attempts"][-1]["end"]) == (saved, False, "stopped")
