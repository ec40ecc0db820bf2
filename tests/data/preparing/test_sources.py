"""Arguments become files in one order; what is meant is never guessed."""

import gzip
import hashlib
import os

import pytest

from data.preparing.sources import SourceFile, decompressed, find_sources


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "web/b.jsonl",
        "web/a.jsonl.gz",
        "web/deep/c.jsonl",
        "web/.cache/d.jsonl",
        "mixed/a.csv",
        "mixed/b.MD",
    ):
        os.makedirs(os.path.dirname(name), exist_ok=True)
        open(name, "w").close()
    os.makedirs("empty")
    open("notes", "w").close()
    os.makedirs("packed")
    open("packed/a.parquet.zst", "w").close()


def test_folders_and_globs_by_name(files):
    assert [source.path for source in find_sources(["web"])] == ["web/a.jsonl.gz", "web/b.jsonl", "web/deep/c.jsonl"]
    assert [source.path for source in find_sources(["web/b*", "web/**/c.jsonl"])] == ["web/b.jsonl", "web/deep/c.jsonl"]
    assert [(source.path, source.format) for source in find_sources(["mixed"], "csv")] == [("mixed/a.csv", "csv")]
    assert find_sources(["mixed/b.MD"])[0].format == "text"
    assert find_sources(["notes"], "text")[0].format == "text"
    os.makedirs("web/first.store")
    for name in ("00000.train.tokens", "manifest.json", "journal.jsonl"):
        open(f"web/first.store/{name}", "w").close()
    open("web/README.md", "w").close()
    assert len(find_sources(["web"])) == 3
    for name in ("journal.jsonl", "other.jsonl"):
        os.makedirs("diary", exist_ok=True)
        open(f"diary/{name}", "w").close()
    assert [source.path for source in find_sources(["diary"])] == ["diary/journal.jsonl", "diary/other.jsonl"]
    open("empty/README.md", "w").close()
    assert [source.path for source in find_sources(["empty"])] == ["empty/README.md"]


@pytest.mark.parametrize(
    ("given", "format", "words"),
    [
        ("mixed", None, "holds csv (1), text (1); choose: --format"),
        ("empty", None, "folder empty must hold a file of .txt"),
        ("mixed", "parquet", "must hold a file of .parquet and holds none"),
        ("notes", None, "source notes must end in .txt"),
        ("nowhere", None, "source nowhere must be a file, a folder or a glob"),
        ("web/*.txt", None, "must be a file, a folder or a glob"),
        ("packed/a.parquet.zst", None, "packed/a.parquet.zst must be parquet as it is"),
        ("packed", None, "packed/a.parquet.zst must be parquet as it is"),
        ("x" * 300, None, "must be a file, a folder or a glob"),
        ("s3://bucket/a.jsonl", None, "must be a local path or start with gs://"),
    ],
)
def test_refusals(files, refused, given, format, words):
    with refused(words):
        find_sources([given], format)


def test_a_file_named_twice_is_refused(files, refused):
    with refused("web/b.jsonl is named twice"):
        find_sources(["web", "web/b.jsonl"])


def test_hash_is_of_the_whole_file_however_much_was_read(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(os.urandom(100_000)) + b"tail")
    for size in (0, 10, 100_000):
        with SourceFile(str(path)) as file:
            decompressed(file, path.name).read(size)
            assert file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
