"""What train.py prepares by itself: rows of other formats and large texts, into the cache, once."""

import gzip
import json
import shutil

import pytest

from data.corpus import load_corpus
from data.store import open_store
from parallax.run_folder import read_settings
from parallax.storage import open_folder
from parallax.tokenizers.registry import load_tokenizer
from scripts import evaluate, prepare, train
from scripts.preparing import automatic
from scripts.preparing.automatic import prepared
from tests.data.stores import decoded, texts, write_jsonl
from tests.scripts.runs import SHORT, SMALL


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache/parallax/stores"


def test_rows_are_prepared_once_and_trained_on(call, refuses, tmp_path, cache):
    write_jsonl(tmp_path / "web.jsonl", texts(80))
    flags = ["--dataset", "web.jsonl", "--tokenizer", "bpe:300", *SMALL, *SHORT, "--steps", "2"]
    status, _, err = call(train, *flags, "--output-dir", "run")
    assert status == 0, err
    (made,) = cache.glob("*/web.store")
    assert f"prepare   web.jsonl into {made}" in err
    store, tokenizer = open_store(made), load_tokenizer("run/tokenizer.json")
    assert sorted(text for *_, text in decoded(store, tokenizer)) == sorted(texts(80))
    assert 2 < store.manifest["held_out"]["documents"] < 20
    settings = read_settings(open_folder("run"))
    assert (settings["run"]["dataset"], settings["corpus"]["sha256"]) == ("web.jsonl", store.sha256)
    shutil.rmtree(cache)
    status, _, err = call(train, "--resume", "--output-dir", "run", "--steps", "3")
    assert status == 0, err
    assert "\nresume    from step 2" in err
    before = (made / "manifest.json").stat().st_mtime_ns
    status, out, err = call(prepare, "--seen", "run", "--step", "3")
    assert (status, err) == (0, "")
    assert "web.jsonl:" in out
    assert (made / "manifest.json").stat().st_mtime_ns == before
    refuses(evaluate, ["--checkpoint", "run", "--dataset", "web.jsonl"], "must be plain text to be read as it is")


def test_what_is_prepared_and_what_is_left(tmp_path, cache, monkeypatch, refused):
    lines = []

    def given(name):
        return prepared(name, "byte", lines.append)

    write_jsonl(tmp_path / "web/a.jsonl", texts(30))
    write_jsonl(tmp_path / "web/b.jsonl", texts(9))
    store = open_store(tmp_path / given("web"))
    assert store.manifest["documents"] == 39
    assert given("web") == str(store.folder)
    with (tmp_path / "web/b.jsonl").open("a") as file:
        file.write('{"text": "another"}\n')
    assert given("web") != str(store.folder)
    assert given(str(store.folder)) == str(store.folder)
    assert given("tiny_shakespeare") == "tiny_shakespeare"
    (tmp_path / "notes.txt").write_text("to be " * 50)
    (tmp_path / "log").write_text("to be " * 50)
    (tmp_path / "notes.txt.gz").write_bytes(gzip.compress(b"to be " * 50))
    assert (given("notes.txt"), given("log")) == ("notes.txt", "log")
    assert load_corpus(given("notes.txt.gz"), notify=lines.append).stores is not None
    monkeypatch.setattr(automatic, "READ_WHOLE", 100)
    assert load_corpus(given("notes.txt"), notify=lines.append).stores is not None
    lines.clear()
    (tmp_path / "web/README.md").write_text("what the files are")
    assert load_corpus(given("web"), notify=lines.append).stores.stores[0].manifest["documents"] == 40
    (tmp_path / "web/notes.md").write_text("words")
    with refused("dataset folder web must hold files of one format and holds jsonl", "--format jsonl"):
        given("web")
    (tmp_path / "web/notes.md").write_text("words " * 9999)
    lines.clear()
    given("web")
    assert lines[0].endswith("its text files are taken")
    (tmp_path / "mix.json").write_text(json.dumps({"stages": [{"weights": {str(store.folder): 1}}]}))
    assert given("mix.json") == "mix.json"


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:300"])
def test_what_cannot_be_prepared_is_one_line_and_leaves_no_store(tmp_path, cache, refused, tokenizer):
    write_jsonl(tmp_path / "web.jsonl", ["a"], field="body")
    with refused("dataset web.jsonl cannot be prepared as it is: ", "--field"):
        prepared("web.jsonl", tokenizer, lambda line: None)
    assert not list(cache.glob("*/*.store"))
