"""Pieces of stores on gs://, kept on the disk: what is put is found, and there is never more than fits."""

import os
from types import SimpleNamespace

import pytest
from etils import epath

from data.stores import pieces, ranges
from data.stores.pieces import Pieces


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PARALLAX_STORE_CACHE_GIB", str(1000 / 2**30))
    return tmp_path / "parallax/pieces"


def test_a_piece_is_found_again_by_the_same_store(cache):
    Pieces("a" * 64, 600).put("00000.train.tokens", 3, b"abc")
    assert Pieces("a" * 64, 600).get("00000.train.tokens", 3, 1, 3) == b"bc"
    assert Pieces("a" * 64, 600).get("00000.train.tokens", 3, 1, 4) is None
    assert Pieces("a" * 64, 600).get("00000.train.tokens", 2, 0, 1) is None
    assert Pieces("b" * 64, 300).get("00000.train.tokens", 3, 0, 1) is None


def test_those_used_longest_ago_make_room(cache):
    for place, name in enumerate("abc"):
        store = Pieces(name * 64, 300)
        store.put("x", 0, b"1")
        os.utime(cache / (name * 32) / "size", (place, place))
    os.utime(cache / ("a" * 32) / "size", (9, 9))
    Pieces("d" * 64, 600)
    assert sorted(path.name[0] for path in cache.iterdir() if path.is_dir()) == ["a", "d"]
    assert Pieces("a" * 64, 300).get("x", 0, 0, 1) == b"1"
    gone = Pieces("b" * 64, 300)
    assert gone.get("x", 0, 0, 1) is None
    assert not Pieces("e" * 64, 1001).are_kept
    assert not Pieces("", 1).are_kept


def test_without_room_on_the_disk_nothing_is_kept(cache, monkeypatch, refused):
    store = Pieces("a" * 64, 300)
    (cache / ("a" * 32) / "size").unlink()
    (cache / ("a" * 32)).rmdir()
    store.put("x", 0, b"1")
    assert store.get("x", 0, 0, 1) is None
    cache.rename(cache.with_name("moved"))
    cache.write_text("a file")
    assert not Pieces("a" * 64, 300).are_kept
    for given in ("much", "inf"):
        monkeypatch.setenv("PARALLAX_STORE_CACHE_GIB", given)
        with refused(f"PARALLAX_STORE_CACHE_GIB={given} must be a number of GiB", "try 16"):
            Pieces("a" * 64, 300)


def test_a_process_that_ends_in_the_middle_is_made_up_for(cache, monkeypatch):
    """On a full disk no size is half written; what was half removed goes, and nothing is put there meanwhile."""
    first = Pieces("a" * 64, 600)
    first.put("x", 0, b"1")

    def full(path, content):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(pieces, "write_atomically", full)
        assert not Pieces("b" * 64, 300).are_kept
    assert Pieces("b" * 64, 300).are_kept
    with monkeypatch.context() as patched:
        patched.setattr(pieces.shutil, "rmtree", lambda path: first.put("x", 1, b"2"))
        Pieces("c" * 64, 800)
    assert [first.get("x", place, 0, 1) for place in (0, 1)] == [None, None]
    assert Pieces("c" * 64, 800).are_kept
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["c" * 32]


def test_a_batch_reads_and_fetches_parts_of_pieces_a_few_at_a_time(cache, monkeypatch):
    """Of a store whose pieces are kept: the bytes of each range, whatever is here, missing, cut or out of reach."""
    content, asked = bytes(range(50)), []

    def cat_ranges(paths, starts, stops, on_error):
        asked.append(len(paths))
        found = [content[start:stop] for start, stop in zip(starts, stops, strict=True)]
        return [FileNotFoundError() if "lost" in path else each for path, each in zip(paths, found, strict=True)]

    monkeypatch.setattr(ranges, "PIECE_BYTES", 8)
    monkeypatch.setattr(ranges, "FETCHED_PIECES", 3)
    monkeypatch.setattr(ranges, "bucket_files", lambda: SimpleNamespace(cat_ranges=cat_ranges))
    files = ranges.Files(epath.Path("gs://bucket/web.store"), "a" * 64, 50)
    wanted = [("x", 3, 21), ("x", 8, 9), ("x", 15, 16), ("x", 44, 50), ("x", 20, 20), ("x", 30, 34)]
    expected = [content[start:stop] for _, start, stop in wanted]
    assert (files.read(wanted), asked) == (expected, [3, 3, 1])
    (cut,) = cache.glob("*/x.1")
    cut.write_bytes(cut.read_bytes()[:5])
    assert (files.read(wanted), asked) == (expected, [3, 3, 1, 1])
    assert (files.read(wanted), asked) == (expected, [3, 3, 1, 1])
    for name, stop, reason in (("x", 51, "it ends at byte 50"), ("lost", 50, "No such file")):
        with pytest.raises(ranges.Damaged, match=reason):
            files.read([(name, 44, stop)])
