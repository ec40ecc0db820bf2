"""Pieces of stores on gs://, kept on the disk: what is put is found, and there is never more than fits."""

import os

import pytest

from data.stores.pieces import Pieces


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PARALLAX_STORE_CACHE_GIB", str(1000 / 2**30))
    return tmp_path / "parallax/pieces"


def test_a_piece_is_found_again_by_the_same_store(cache):
    Pieces("a" * 64, 600).put("00000.train.tokens", 3, b"abc")
    assert Pieces("a" * 64, 600).get("00000.train.tokens", 3) == b"abc"
    assert Pieces("a" * 64, 600).get("00000.train.tokens", 2) is None
    assert Pieces("b" * 64, 300).get("00000.train.tokens", 3) is None


def test_those_used_longest_ago_make_room(cache):
    for place, name in enumerate("abc"):
        store = Pieces(name * 64, 300)
        store.put("x", 0, b"1")
        os.utime(cache / (name * 32) / "size", (place, place))
    os.utime(cache / ("a" * 32) / "size", (9, 9))
    Pieces("d" * 64, 600)
    assert sorted(path.name[0] for path in cache.iterdir() if path.is_dir()) == ["a", "d"]
    assert Pieces("a" * 64, 300).get("x", 0) == b"1"
    gone = Pieces("b" * 64, 300)
    assert gone.get("x", 0) is None
    assert not Pieces("e" * 64, 1001).are_kept
    assert not Pieces("", 1).are_kept


def test_without_room_on_the_disk_nothing_is_kept(cache, monkeypatch, refused):
    store = Pieces("a" * 64, 300)
    (cache / ("a" * 32) / "size").unlink()
    (cache / ("a" * 32)).rmdir()
    store.put("x", 0, b"1")
    assert store.get("x", 0) is None
    cache.rename(cache.with_name("moved"))
    cache.write_text("a file")
    assert not Pieces("a" * 64, 300).are_kept
    monkeypatch.setenv("PARALLAX_STORE_CACHE_GIB", "much")
    with refused("PARALLAX_STORE_CACHE_GIB=much must be a number of GiB", "try 16"):
        Pieces("a" * 64, 300)
