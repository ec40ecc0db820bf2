"""Which folder a run may write, and that a local one is its own workspace; test_train_gs.py has the others."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import time

import pytest

from parallax.storage import open_folder, write_json
from scripts import train
from scripts.training import lease, output_dir
from scripts.training.output_dir import Workspace, choose_folder


def test_the_next_free_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = []
    for _ in range(3):
        chosen.append(choose_folder(None, "text", "tiny", resume=False))
        chosen[-1].mkdir(parents=True)
    assert [path.as_posix() for path in chosen] == ["runs/text-tiny", "runs/text-tiny-2", "runs/text-tiny-3"]


def test_nothing_is_made(tmp_path):
    choose_folder(str(tmp_path / "a" / "b"), "text", "tiny", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_be_written_is_taken_whatever_its_parent_is(tmp_path, monkeypatch):
    """As a volume that is mounted where nobody may write."""
    volume, locked = tmp_path / "volume", tmp_path / "locked"
    volume.mkdir()
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) == os.fspath(volume))
    assert choose_folder(str(volume), "text", "tiny", resume=True) == volume
    assert choose_folder(str(volume / "a" / "b"), "text", "tiny", resume=False) == volume / "a" / "b"
    with pytest.raises(ValueError, match=r"locked is not writable; choose another"):
        choose_folder(str(locked), "text", "tiny", resume=True)
    for below in (locked / "a" / "b", tmp_path / "new"):
        with pytest.raises(ValueError, match=r"cannot be made in .*, which is not writable"):
            choose_folder(str(below), "text", "tiny", resume=False)


def test_a_run_is_refused_without_resume_and_taken_with_it(tmp_path):
    write_json(tmp_path / "config.json", {})
    with pytest.raises(ValueError, match="--resume"):
        choose_folder(str(tmp_path), "text", "tiny", resume=False)
    assert choose_folder(str(tmp_path), "text", "tiny", resume=True) == tmp_path


def test_a_prediction_goes_before_a_run_and_must_be_one(tmp_path):
    path = tmp_path / "prediction.json"
    ends = {"loss": 2.0, "low": 1.9, "high": 2.1, "level": 0.8, "curve": [[0.2, 1.5, 1.1], [1.0, 1.0, 1.0]]}
    of_what = {"params": 1, "tokens": 512, "seq_len": 8, "eval_tokens": 64, "model": {}}
    write_json(path, ends | of_what | {"corpus_sha256": "c0ffee", "ladder_sha256": "1add3e"})
    assert choose_folder(str(tmp_path), "text", "tiny", resume=False) == tmp_path
    write_json(path, ends)
    with pytest.raises(ValueError, match=r"prediction\.json is no prediction .* remove it, or register another"):
        choose_folder(str(tmp_path), "text", "tiny", resume=False)


def test_a_folder_cut_off_before_its_config_can_be_resumed(tmp_path):
    assert choose_folder(str(tmp_path), "text", "tiny", resume=True) == tmp_path


def test_what_a_kill_left_of_the_first_file_does_not_stand_in_the_way(tmp_path):
    (tmp_path / ".config.json.8c5f").touch()
    assert choose_folder(str(tmp_path), "text", "tiny", resume=True) == tmp_path


@pytest.mark.parametrize("flag", ["caf\udce9", None])
def test_a_folder_whose_name_is_not_utf_8_is_refused(refused, flag):
    with refused("run folder 'caf\\udce9' must have a name in UTF-8; choose another"):
        choose_folder(flag, "text", "caf\udce9", resume=False)


def test_a_local_folder_is_written_in_place(tmp_path):
    folder = open_folder(tmp_path / "runs" / "x")
    workspace = Workspace(folder)
    assert not folder.exists()
    workspace.fetch()
    assert list(workspace.path.iterdir()) == []
    (workspace.path / "loss.png").write_bytes(b"x")
    workspace.send()
    assert [str(path) for path in (tmp_path / "runs" / "x").iterdir()] == [str(folder / "loss.png")]


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
    folder = open_folder(tmp_path / "x")
    Workspace(folder).hold()  # there is nothing to hold
    workspace = Workspace(folder)
    workspace.fetch()
    workspace.hold()  # it holds it already
    with pytest.raises(ValueError, match=r"is being written by another process; stop that one"):
        Workspace(folder).hold(patience=0.2)
    workspace.release()
    Workspace(folder).hold()


def test_a_run_that_is_being_written_is_not_resumed(text, refuses):
    (text / "run").mkdir()
    descriptor = os.open(text / "run", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        flags = ["--dataset", "text.txt", "--output-dir", "run", "--resume"]
        refuses(train, flags, "is being written by another process")
    finally:
        os.close(descriptor)


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, and leases that take moments."""

    def refuses(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(output_dir.fcntl, "flock", refuses)
    for name, seconds in {"BEAT": 0.02, "EXPIRY": 0.5, "SETTLE": 0.01, "LOOK": 0.01}.items():
        monkeypatch.setattr(lease, name, seconds)


def workspace_on(folder):
    workspace = Workspace(open_folder(folder))
    workspace.fetch()
    return workspace


def test_where_there_are_no_locks_a_folder_is_leased(tmp_path, no_locks):
    first = workspace_on(tmp_path)
    first.hold()  # it has it already
    owner = json.loads((tmp_path / "lease.json").read_text())
    assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
    assert time.time() - owner["time"] < 60
    with pytest.raises(ValueError, match=rf"is being written by another process, {os.getpid()} on .*; stop that one"):
        Workspace(open_folder(tmp_path)).hold()
    first.check()
    first.release()
    assert list(tmp_path.iterdir()) == []
    assert choose_folder(str(tmp_path), "text", "tiny", resume=True) == tmp_path
    workspace_on(tmp_path).release()


@pytest.mark.parametrize(
    "change",
    [
        {},  # of this machine, whose process is gone
        {"space": "another machine"},  # which nobody renews
        {"space": "another machine", "time": 0.0},
    ],
)
def test_a_lease_that_is_over_is_taken(tmp_path, no_locks, change):
    ended = subprocess.Popen(["true"])
    ended.wait()
    owner = {"name": "x", "host": "h", "pid": ended.pid, "space": lease._space(), "time": time.time()}
    (tmp_path / "lease.json").write_text(json.dumps(owner | change))
    assert choose_folder(str(tmp_path), "text", "tiny", resume=True) == tmp_path  # killed before config.json
    workspace = workspace_on(tmp_path)
    assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
    workspace.release()


def test_who_was_held_up_until_another_took_the_folder_writes_no_more(tmp_path, no_locks):
    late = workspace_on(tmp_path)
    owner = json.loads((tmp_path / "lease.json").read_text()) | {"name": "x", "host": "h", "pid": 7}
    limit = time.monotonic() + 10
    while late._lease.rival is None and time.monotonic() < limit:
        write_json(tmp_path / "lease.json", owner)
    with pytest.raises(OSError, match="it was taken by another process, 7 on h"):
        late.check()
    late.release()
    assert json.loads((tmp_path / "lease.json").read_text()) == owner
