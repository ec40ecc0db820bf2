"""A local run folder is its own workspace; tests/scripts/test_train_gs.py has the others."""

import fcntl
import os
import subprocess
import sys

import pytest

from parallax.storage import open_folder
from scripts.training import output_dir
from scripts.training.output_dir import Workspace


def test_a_local_folder_is_written_in_place(tmp_path):
    folder = open_folder(tmp_path / "runs" / "x")
    workspace = Workspace(folder)
    assert not folder.exists()
    workspace.fetch()
    assert list(workspace.path.iterdir()) == []
    (workspace.path / "loss.png").write_bytes(b"x")
    workspace.send()
    assert [str(path) for path in (tmp_path / "runs" / "x").iterdir()] == [str(folder / "loss.png")]


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(output_dir, "PATIENCE", 0.2)
    folder = open_folder(tmp_path / "x")
    Workspace(folder).hold()  # there is nothing to hold
    workspace = Workspace(folder)
    workspace.fetch()
    workspace.hold()  # it holds it already
    with pytest.raises(ValueError, match=r"is being written by another process; stop that one"):
        Workspace(folder).hold()
    workspace.release()
    Workspace(folder).hold()


def test_a_run_that_is_being_written_is_not_resumed(tmp_path):
    run, text = tmp_path / "run", tmp_path / "text.txt"
    run.mkdir()
    text.write_text("to be or not to be, that is the question\n" * 50)
    descriptor = os.open(run, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    train = [
        sys.executable,
        "scripts/train.py",
        "--dataset",
        str(text),
        "--steps",
        "2",
        "--output-dir",
        str(run),
    ]
    refused = subprocess.run([*train, "--resume"], capture_output=True, text=True, check=False)
    assert (refused.returncode, list(run.iterdir())) == (2, [])
    assert "is being written by another process" in refused.stderr.splitlines()[-1]
    os.close(descriptor)
    subprocess.run([*train, "--resume"], capture_output=True, check=True)
    assert (run / "metrics.jsonl").exists()
