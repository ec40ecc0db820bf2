"""The start of a run, failed at each of its stages: before all input is known to be good nothing is written, and what a
start that fails later leaves can be gone on with."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from scripts import train
from scripts.training import attempt, job
from tests.scripts.runs import ROOT, SHORT, SMALL, checkpoints

FLAGS = [*SMALL, *SHORT, "--steps", "1"]
STAGES = [
    *((job, name) for name in ("load_corpus", "choose_folder", "tokenizer_for", "prepare", "settle_layout")),
    *((job, name) for name in ("bind_state", "get_strategy", "choose_attention", "bind_step")),
    *((attempt, name) for name in ("Workspace", "Checkpointer", "describe_run")),
]


@pytest.mark.parametrize(("module", "name"), STAGES, ids=[name for _, name in STAGES])
def test_nothing_is_written_before_all_input_is_known_to_be_good(text, refuses, monkeypatch, module, name):
    def fail(*args, **kwargs):
        raise ValueError(f"{name} must be good; choose another")

    monkeypatch.setattr(module, name, fail)
    refuses(train, ["--dataset", "text.txt", *FLAGS, "--output-dir", "run"], f"{name} must be good")


@pytest.mark.parametrize("name", ["write_json", "save_tokenizer"])
def test_a_start_that_failed_while_it_wrote_is_gone_on_with(text, call, monkeypatch, name):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    flags = ["--dataset", "text.txt", *FLAGS, "--output-dir", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(attempt, name, fail)
        status, _, err = call(train, *flags)
    assert status == 2
    assert err.splitlines()[-1].startswith("error: --output-dir run cannot be written: No space left on device;")
    (text / "run" / ".config.json.8c5f").touch()  # as a kill leaves it
    status, _, err = call(train, *flags, "--resume")
    assert status == 0, err
    assert checkpoints(text / "run") == [1]


def test_a_data_set_whose_name_is_not_utf_8_is_trained_on_and_found_again(text, call):
    name = os.fsdecode(b"caf\xe9.txt")
    (text / "text.txt").rename(text / name)
    status, _, err = call(train, "--dataset", name, *FLAGS)
    assert status == 0, err
    run = text / "runs" / "caf_-tiny"
    config = json.loads((run / "config.json").read_text("utf-8"))
    assert (config["run"]["dataset"], config["corpus"]["edition"]) == (name, r"text file caf\xe9.txt")
    status, _, err = call(train, "--resume", "--output-dir", run, "--steps", "2")
    assert status == 0, err
    assert checkpoints(run) == [1, 2]


STOPPED = """
import threading
from data.preparing.preparation import Preparation
from scripts import train
from scripts.training import attempt, output_dir

def wait(*args):
    print("waiting", flush=True)
    threading.Event().wait()

STAGE = wait
output_dir._locked = lambda descriptor: None  # a file system without locks
raise SystemExit(train.run_process(train.main))
"""


@pytest.mark.parametrize("stage", ["Preparation._take", "attempt.write_json"])
def test_sigterm_before_the_first_step_ends_a_run_at_once(text, stage):
    """While its data is prepared, of which nothing half-written stays, and while its folder is made."""
    words = (text / "text.txt").read_text().split()
    rows = [json.dumps({"text": " ".join(words[at : at + 60])}) + "\n" for at in range(0, 600, 60)]
    (text / "rows.jsonl").write_text("".join(rows))
    run = subprocess.Popen(
        [
            sys.executable,
            "-c",
            STOPPED.replace("STAGE", stage),
            "--dataset",
            "rows.jsonl",
            *FLAGS,
            "--output-dir",
            "run",
        ],
        cwd=text,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(text / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == "waiting\n"
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 0, err
    assert err.splitlines()[-1] == "stopped   before the first step"
    assert [path.name for path in (text / "run").glob("*")] == []
    stores = text / "cache" / "parallax" / "stores"
    kept = {path.name for path in stores.rglob("*") if path.is_file()}
    assert (kept == {"lock"}) == stage.startswith("Preparation")
