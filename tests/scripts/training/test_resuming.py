"""A run that goes on: the command for it, what it says it was, and what may change."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading

import jax
import pytest
from etils import epath

from parallelism.hosts import StopRequest
from scripts import train
from scripts.training.flags import read_flags
from scripts.training.lease import LEASE_FILE
from scripts.training.resuming import resume_command
from tests.scripts.runs import ROOT, SHORT, SMALL, checkpoints, rows


@pytest.mark.parametrize(
    ("args", "program", "processes", "expected"),
    [
        ("", "scripts/train.py", 1, "python scripts/train.py --resume --output-dir run"),
        (
            "--mesh data=2,fsdp=4 --rules my.json --data-dir data",
            *("scripts/train.py", 1),
            "JAX_NUM_CPU_DEVICES=8 python scripts/train.py --resume --output-dir run --data-dir data "
            "--strategy mesh --mesh data=2,fsdp=4 --rules my.json",
        ),
        (
            "--mode distributed --print-param-hash",
            *("parallax train", 1),
            "JAX_NUM_CPU_DEVICES=8 parallax train --resume --output-dir run --strategy pmap --print-param-hash",
        ),
        (
            "--strategy pmap --coordinator 127.0.0.1:8482 --num-processes 2 --process-id 0",
            *("scripts/train.py", 2),
            "python scripts/launch.py local --processes 2 --devices 8 -- --resume --output-dir run --strategy pmap",
        ),
        (
            "--strategy pmap --coordinator 10.0.0.2:8482 --num-processes 2 --process-id 0",
            *("scripts/train.py", 2),
            "python scripts/train.py --resume --output-dir run --strategy pmap --coordinator 10.0.0.2:8482 "
            "--num-processes 2 --process-id I (in each of 2 processes)",
        ),
        (
            "--step-timeout 0 --strategy pmap --coordinator 10.0.0.2:8482 --num-processes 2 --process-id 0 "
            "--local-device-ids 0 1",
            *("scripts/train.py", 2),
            "python scripts/train.py --resume --output-dir run --strategy pmap --step-timeout 0 "
            "--coordinator 10.0.0.2:8482 --num-processes 2 --process-id I --local-device-ids IDS "
            "(in each of 2 processes)",
        ),
        (
            "--step-timeout 90.5",
            *("scripts/train.py", 1),
            "python scripts/train.py --resume --output-dir run --step-timeout 90.5",
        ),
    ],
)
def test_the_command_is_whole(args, program, processes, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert resume_command(read_flags(args.split()), epath.Path("run")) == expected


def stop_at(monkeypatch, number):
    """A stop is requested the so many-th time that the run asks."""
    asked = iter(range(1, 10**6))
    monkeypatch.setattr(StopRequest, "__call__", lambda self: next(asked) == number)


def test_a_stopped_run_goes_on_by_the_command_that_it_prints(train_small, text, paste, monkeypatch):
    stop_at(monkeypatch, 4)
    status, _, err = train_small("--output-dir", "run", "--strategy", "pmap")
    assert status == 0
    assert "stopped   at step 4 of 12; best checkpoint: step 4" in err
    (command,) = (line.removeprefix("go on").strip() for line in err.splitlines() if line.startswith("go on"))
    status, _, err = paste(command)
    assert status == 0
    assert "\nbefore    pmap: 8 cpu devices, state replicated\n" in err
    assert "\nresume    from step 4 of run\n" in err
    assert "\nstrategy  pmap: 8 cpu devices, state replicated\n" in err
    assert "changed" not in err
    assert "schedule" not in err
    assert json.loads((text / "run" / "summary.json").read_text())["finished"]


def test_a_resumed_run_says_where_it_was_and_where_it_is(train_small, finished):
    status, _, err = train_small("--output-dir", "run", "--resume", "--strategy", "pmap")
    assert status == 0
    assert "\nbefore    single: 1 of " in err
    assert "\nstrategy  pmap: 8 cpu devices" in err


@pytest.mark.parametrize(("asked", "step"), [(7, 6), (13, 12)])
def test_a_stop_in_an_evaluation_saves_at_once_and_the_evaluation_is_made_up_for(
    train_small, text, template, monkeypatch, asked, step
):
    """After steps 1 to 6 it asks for the seventh time before a batch of held-out text."""
    stop_at(monkeypatch, asked)
    status, _, err = train_small("--output-dir", "run")
    assert status == 0
    assert f"stopped   at step {step} of 12" in err
    assert checkpoints(text / "run")[-1] == step
    evaluated = [row["step"] for row in rows(text / "run") if "eval_loss" in row]
    assert evaluated == [6][: asked // 13]
    assert not json.loads((text / "run" / "summary.json").read_text())["finished"]
    assert train_small("--output-dir", "run", "--resume")[0] == 0
    assert json.loads((text / "run" / "summary.json").read_text())["finished"]
    for row, whole in zip(rows(text / "run"), rows(template), strict=True):
        assert row == pytest.approx(whole, rel=1e-5)  # sums in another order
    losses = {row["step"]: row["eval_loss"] for row in rows(text / "run") if "eval_loss" in row}
    for saved in checkpoints(text / "run"):
        manifest = json.loads((text / "run" / "checkpoints" / str(saved) / "manifest.json").read_text())
        assert manifest["eval_loss"] == losses[saved]
    before = (text / "run" / "metrics.jsonl").read_bytes()
    assert train_small("--output-dir", "run", "--resume")[0] == 0
    assert (text / "run" / "metrics.jsonl").read_bytes() == before


COMPILING = """
import hashlib, sys
from parallelism.single import Single
from scripts import train
from scripts.training import output_dir

def compile(self, step):
    def hang(state, batch):
        print("compiling", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, in which no handler runs
    return hang

Single.compile = compile
output_dir._locked = lambda descriptor: None  # a file system without locks
raise SystemExit(train.run_process(train.main))
"""


HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def test_a_stop_while_the_step_is_compiled_ends_the_run_at_once(text):
    flags = ["--dataset", "text.txt", *SMALL, *SHORT, "--output-dir", "run"]
    terminal, screen = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", COMPILING, *flags],
        cwd=text,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=screen,
        text=True,
    )
    os.close(screen)
    shown, limit = b"", threading.Timer(60, run.kill)
    limit.start()
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == "compiling\n"
        assert (text / "run" / LEASE_FILE).exists()
        run.send_signal(signal.SIGTERM)
        with contextlib.suppress(OSError):  # of a terminal that nobody writes to any more
            while part := os.read(terminal, 1 << 16):
                shown += part
    finally:
        limit.cancel()
        run.kill()
        run.communicate()
        os.close(terminal)
    assert run.returncode == 0
    err = shown.decode().replace("\r\n", "\n")
    assert err.rindex(SHOW_CURSOR) > err.rindex(HIDE_CURSOR)
    assert "stopped   at step 0 of 12; no checkpoint; run folder: run\n" in err
    assert "\ngo on     python" in err
    assert not (text / "run" / LEASE_FILE).exists()
    assert json.loads((text / "run" / "summary.json").read_text())["attempts"][-1]["end"] == "stopped"


def test_intervals_rate_and_dtype_may_change_and_the_run_records_it(call, finished):
    flags = ["--steps", "15", "--eval-interval", "5", "--checkpoint-interval", "7", "--log-interval", "1"]
    flags += ["--learning-rate", "5e-4", "--dtype", "bfloat16"]
    status, _, err = call(train, "--resume", "--output-dir", "run", *flags)
    assert status == 0
    assert "\nchanged   --learning-rate 0.0005, before 0.001\n" in err
    changed = {"--steps": [12, 15], "--log-interval": [4, 1], "--eval-interval": [6, 5]}
    changed |= {"--checkpoint-interval": [250, 7], "--learning-rate": [1e-3, 5e-4]}
    changed |= {"--model.dtype": ["float32", "bfloat16"]}
    first, second = json.loads((finished / "summary.json").read_text())["attempts"]
    assert (first.get("changed"), second["changed"]) == (None, changed)
    config = json.loads((finished / "config.json").read_text())
    assert (config["optimizer"]["learning_rate"], config["model"]["dtype"]) == (5e-4, "bfloat16")
    status, _, err = call(train, "--resume", "--output-dir", "run")  # as it is now
    assert status == 0
    assert "changed" not in err


def test_a_layout_that_a_resumed_run_cannot_have_is_refused_with_one_that_it_can(refuses, call, finished):
    """A batch that 8 devices cannot share stays as it is, so --batch-size 16 would be refused."""
    config = json.loads((finished / "config.json").read_text())
    config["train"]["batch_size"] = 12
    (finished / "config.json").write_text(json.dumps(config))
    command = ["--resume", "--output-dir", "run"]
    words = "as the run was started; try another --mesh, or --strategy single"
    refuses(train, [*command, "--strategy", "pmap"], "batch_size=12", words)
    assert call(train, *command, "--strategy", "single")[0] == 0
