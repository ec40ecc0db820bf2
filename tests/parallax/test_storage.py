"""Addresses refused before anything is asked of the network, and local files written whole."""

import errno
import importlib.util
import json
import os
import pathlib
import pwd

import pytest

from parallax.storage import cache_folder, file_sizes, is_remote, open_folder, write_atomically, write_json, write_whole


def test_local_paths_stay_as_they_are(tmp_path):
    for name in ("runs/x", tmp_path / "x", "~/x", "."):
        assert not is_remote(name)
        assert str(open_folder(name)) == str(name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "s3://bucket/run",
            "folder s3://bucket/run must be a local path or start with gs://; try gs://BUCKET/runs/NAME",
        ),
        ("gs:///run", "folder gs:///run names no bucket; try gs://BUCKET/runs/NAME"),
        ("gs://bucket/run", r"gs://bucket/run needs the package gcsfs, which is missing; try pip install -e '.[gcs]'"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(monkeypatch, address, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        open_folder(address)
    assert str(error.value) == message


def test_a_file_is_replaced_at_once(tmp_path):
    file = open_folder(tmp_path) / "manifest.json"
    for text in ("one", "two"):
        write_whole(file, text)
        assert file.read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_content_replaces_what_was_there_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"first", b"second"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_json_holds_names_of_files_that_are_not_utf_8(tmp_path):
    value = {"dataset": os.fsdecode(b"caf\xe9.txt"), "edition": "Ünicode 🙂 \\udce9"}
    write_json(tmp_path / "file.json", value)
    assert json.loads((tmp_path / "file.json").read_text("utf-8")) == value
    assert "Ünicode 🙂" in (tmp_path / "file.json").read_text("utf-8")


def test_failure_half_way_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"half")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_found_with_their_sizes_at_any_depth(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c~").write_bytes(b"123")
    (tmp_path / "d").write_bytes(b"")
    assert file_sizes(open_folder(tmp_path)) == {"a/b/c~": 3, "d": 0}


def test_a_user_without_a_name_or_a_home_has_a_cache(monkeypatch):
    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert cache_folder().is_absolute()
    monkeypatch.setenv("HOME", "/home/x")
    assert cache_folder() == pathlib.Path("/home/x/.cache/parallax")
