"""The start of a run, failed at each of its stages: before all input is known to be good nothing is written, and what a
start that fails later leaves can be gone on with."""

import errno
import json
import os

import pytest

from scripts import train
from scripts.training import attempt, job
from tests.scripts.runs import SHORT, SMALL, checkpoints

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
