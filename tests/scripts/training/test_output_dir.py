"""Which folder a run may write."""

import pytest

from parallax.storage import write_json
from scripts.training.output_dir import choose_folder


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
