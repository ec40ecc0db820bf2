"""Which folder a run may write, and that a local one is its own workspace; test_train_gs.py has the others."""

import fcntl
import os

import pytest

from parallax.storage import open_folder, write_json
from scripts import train
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


def test_a_run_is_refused_without_resume_and_taken_with_it(tmp_path):
    write_json(tmp_path / "config.json", {})
    with pytest.raises(ValueError, match="--resume"):
        choose_folder(str(tmp_path), "text", "tiny", resume=False)
    assert choose_folder(str(tmp_path), "text", "tiny", resume=True) == tmp_path


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
