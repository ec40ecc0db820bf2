"""The same store whatever the workers and the kills, and one line for what cannot be prepared."""

import errno
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.preparing import output
from data.preparing.preparation import Preparation, Settings
from data.preparing.sources import find_sources
from data.stores import store as store_module
from data.stores.store import open_store, verify
from parallax.tokenizers.plain import ByteTokenizer, CharTokenizer
from tests.data.small_stores import decoded, prepared, texts, write_jsonl

ROOT = Path(__file__).parents[3]
# Children of this process are killed before the n-th time that something is made lasting, for each n there is.
KILLS = """
import os, pathlib, signal, sys
from tests.data.small_stores import prepared
from data.stores.store import verify

base = pathlib.Path(sys.argv[1])

def attempt(name, last):
    child = os.fork()
    if child == 0:
        calls = [0]
        def dying(call):
            def counted(*args, **keywords):
                calls[0] += 1
                if calls[0] == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **keywords)
            return counted
        os.fsync, os.truncate = dying(os.fsync), dying(os.truncate)
        for call in ("replace", "unlink", "mkdir"):
            setattr(pathlib.Path, call, dying(getattr(pathlib.Path, call)))
        prepared(base / name, base / "a.jsonl", base / "b.jsonl", held_out=0.3, shard_tokens=1000, deduplicate=True)
        os._exit(0)
    return os.waitpid(child, 0)[1]

from data.stores.store import open_store
attempt("whole", 0)
expected, n = open_store(base / "whole").sha256, 1
while attempt(f"store-{n}", n) != 0:
    attempt(f"store-{n}", 4)  # killed again, early in the next attempt
    assert attempt(f"store-{n}", 0) == 0, n
    store = open_store(base / f"store-{n}")
    verify(store)
    assert store.sha256 == expected, n
    assert not [path.name for path in store.folder.iterdir() if path.name.startswith(".")], n
    n += 1
print(n)
"""


@pytest.fixture
def sources(tmp_path):
    documents = texts(40)
    return write_jsonl(tmp_path / "a.jsonl", documents[:25]), write_jsonl(tmp_path / "b.jsonl", documents[20:])


def files_of(store):
    return {path.name: path.read_bytes() for path in store.folder.iterdir()}


def test_any_number_of_workers_makes_the_same_files(tmp_path, sources):
    stores = [
        prepared(tmp_path / f"store-{workers}", *sources, workers=workers, held_out=0.3, shard_tokens=500)
        for workers in (1, 3)
    ]
    assert files_of(stores[0]) == files_of(stores[1])
    assert len(stores[0].manifest["shards"]) > 3


def test_a_kill_at_any_moment_changes_nothing(tmp_path, sources):
    done = subprocess.run([sys.executable, "-c", KILLS, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


def test_a_shard_ends_with_the_document_that_fills_it(tmp_path, sources):
    store = prepared(tmp_path / "store", *sources, held_out=0.0, shard_tokens=500)
    counts = [shard["train"]["tokens"] for shard in store.manifest["shards"]]
    lengths = [len(ids) for _, ids in store.train.documents()]
    expected, open_shard = [], 0
    for length in lengths:
        open_shard += length
        if open_shard >= 500:
            expected.append(open_shard)
            open_shard = 0
    assert counts == [*expected, *([open_shard] if open_shard else [])]


def test_held_out_by_text_alone(tmp_path, sources):
    one = prepared(tmp_path / "one", *sources, held_out=0.3)
    other = prepared(tmp_path / "other", *reversed(sources), held_out=0.3, min_chars=20)

    def held(store):
        return {ByteTokenizer().decode(ids) for _, ids in store.held_out.documents()}

    assert held(other) == {text for text in held(one) if len(text) >= 20}
    assert 3 < len(held(one)) < 25


def test_what_is_left_out_is_counted(tmp_path, sources):
    store = prepared(tmp_path / "store", *sources, min_chars=40, deduplicate=True)
    kept = dict.fromkeys(text for text in texts(40) if len(text) >= 40)
    assert sorted(text for *_, text in decoded(store)) == sorted(kept)
    repeated = [text for text in texts(40)[20:25] if len(text) >= 40]
    assert store.manifest["left_out"]["duplicates"] == len(repeated)
    assert store.manifest["left_out"]["short"] == 45 - len(kept) - len(repeated)


def test_composed_letters(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [unicodedata.normalize("NFD", "Ångström")])
    ((*_, text),) = decoded(prepared(tmp_path / "store", path, nfc=True, held_out=0.0))
    assert text == "Ångström"


def test_unreadable_documents_fail_or_are_counted_and_named(tmp_path, sources, refused):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n" * 12 + json.dumps({"text": "good"}) + "\n")
    with refused(f"{broken}:1: there is no field 'text'", "--on-error skip"):
        prepared(tmp_path / "store", *sources, broken)
    assert not (tmp_path / "store").exists()
    store = prepared(tmp_path / "store", *sources, broken, skip=True)
    assert store.manifest["left_out"]["unreadable"] == 12
    assert [line.split(": ")[0] for line in store.manifest["unreadable"]] == [f"{broken}:{i}" for i in range(1, 11)]


def test_whole_shards_outlive_a_failure_and_the_same_command_goes_on(tmp_path, sources, refused):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    with refused("there is no field"):
        prepared(tmp_path / "store", *sources, broken, shard_tokens=500)
    with refused("there is no field", "mend it and give another --output, or use --on-error skip"):
        prepared(tmp_path / "store", *sources, broken, shard_tokens=500)
    names = {path.name for path in (tmp_path / "store").iterdir()}
    assert {"journal.jsonl", "tokenizer.json", "00000.train.tokens"} < names
    assert not [name for name in names if name.startswith(".")]
    before = (tmp_path / "store/00000.train.tokens").stat().st_mtime_ns
    store = prepared(tmp_path / "store", *sources, broken, shard_tokens=500, skip=True)
    assert (tmp_path / "store/00000.train.tokens").stat().st_mtime_ns == before
    assert store.sha256 == prepared(tmp_path / "other", *sources, broken, shard_tokens=500, skip=True).sha256


def test_a_full_disk_is_one_line_and_goes_on_later(tmp_path, sources, refused, monkeypatch):
    write, written = store_module._Draft.write, []

    def full(draft, content):
        written.append(content)
        if len(written) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(draft, content)

    with monkeypatch.context() as patch, refused("cannot be written: No space left on device", "same command"):
        patch.setattr(store_module._Draft, "write", full)
        prepared(tmp_path / "store", *sources, shard_tokens=500)
    with refused("is not finished"):
        open_store(tmp_path / "store")
    store = prepared(tmp_path / "store", *sources, shard_tokens=500)
    assert store.sha256 == prepared(tmp_path / "other", *sources, shard_tokens=500).sha256
    verify(store)


def test_another_command_does_not_go_on_with_a_store(tmp_path, sources, refused):
    prepared(tmp_path / "store", *sources)
    found = find_sources([str(path) for path in sources])
    with refused(
        "was prepared with --min-chars 1, got 9; give the same command, or another --output, or remove the folder"
    ):
        Preparation(tmp_path / "store", found, Settings(min_chars=9), "byte")
    with refused("was prepared with --tokenizer byte, got char"):
        Preparation(tmp_path / "store", found, Settings(), "char")
    with refused("was prepared from other sources, or they changed since"):
        Preparation(tmp_path / "store", found[:1], Settings(), "byte")
    again = Preparation(tmp_path / "store", found, Settings(), "byte")
    before = files_of(again.finished)
    assert again.run(ByteTokenizer()) is again.finished
    assert files_of(again.finished) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with refused("exists and is no store; choose another"):
        Preparation(tmp_path / "mine", found, Settings(), "byte")


@pytest.mark.parametrize("journal", ["", "notes", "dear diary\n", '{"text": "mine"}\n', '{"format": "parallax'])
def test_a_journal_of_somebody_else_is_left_alone(tmp_path, sources, refused, journal):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in (("journal.jsonl", journal), ("tokenizer.json", '{"mine": 1}'), (".notes.draft", "mine")):
        (folder / name).write_text(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with refused("exists and is no store; choose another"):
        prepared(folder, *sources)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["tokenizer.json", "journal.jsonl", ".notes.draft", "00000.train.tokens"])
def test_what_comes_into_the_folder_meanwhile_is_left_alone(tmp_path, sources, refused, name):
    found = find_sources([str(path) for path in sources])
    preparation = Preparation(tmp_path / "store", found, Settings(), "byte")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / name).write_text("mine")
    with refused("exists and is no store; choose another"):
        preparation.run(ByteTokenizer())
    assert (tmp_path / "store" / name).read_text() == "mine"


def test_files_beside_those_of_a_begun_store_are_kept(tmp_path, sources, refused):
    (tmp_path / "broken.jsonl").write_text("{}\n")
    with refused("there is no field"):
        prepared(tmp_path / "store", *sources, tmp_path / "broken.jsonl", shard_tokens=500)
    for name in ("notes.txt", ".notes.draft", ".tokenizer.json.swp"):
        (tmp_path / "store" / name).write_text("mine")
    store = prepared(tmp_path / "store", *sources, tmp_path / "broken.jsonl", shard_tokens=500, skip=True)
    for name in ("notes.txt", ".notes.draft", ".tokenizer.json.swp"):
        assert (tmp_path / "store" / name).read_text() == "mine"
    verify(store)
    journal = tmp_path / "store/journal.jsonl"
    (tmp_path / "store/manifest.json").unlink()
    journal.write_text('{"format": "parallax token store"}\n{\n')
    with refused("journal.jsonl must be a store's journal", "another --output"):
        prepared(tmp_path / "store", *sources)


def test_a_source_that_changes_meanwhile_is_refused(tmp_path, sources, refused):
    found = find_sources([str(path) for path in sources])
    with sources[1].open("a") as file:
        file.write('{"text": "more"}\n')
    with refused("b.jsonl must stay as it is and changed while it was read"):
        Preparation(tmp_path / "store", found, Settings(), "byte").run(ByteTokenizer())
    assert not (tmp_path / "store").exists()


def test_two_processes_never_write_one_store(tmp_path, sources, refused):
    import fcntl

    found = find_sources([str(path) for path in sources])
    preparation = Preparation(tmp_path / "store", found, Settings(), "byte")
    (tmp_path / "store").mkdir()
    descriptor = os.open(tmp_path / "store", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with refused("is being written by another process"):
            preparation.run(ByteTokenizer())
    finally:
        os.close(descriptor)


def test_sources_without_a_document_are_refused(tmp_path, refused):
    (tmp_path / "a.jsonl").write_text("\n")
    with refused("must hold a document and hold none that is kept"):
        prepared(tmp_path / "store", tmp_path / "a.jsonl")
    assert not (tmp_path / "store").exists()


def test_progress_reaches_the_end(tmp_path, sources):
    seen = []
    found = find_sources([str(path) for path in sources])
    Preparation(tmp_path / "store", found, Settings(), "byte").run(
        ByteTokenizer(), observe=lambda progress: seen.append((progress.documents, progress.share))
    )
    assert (seen[0], seen[-1]) == ((0, 0.0), (45, 1.0))


def test_arguments_out_of_range(refused):
    for values, message in (
        ({"held_out": 1.5}, "held_out=1.5 must be from 0 to 1"),
        ({"shard_tokens": 0}, "shard_tokens=0 must be at least 1"),
        ({"field": ""}, "field='' must name"),
    ):
        with refused(message):
            Settings(**values)


def test_ids_are_those_of_the_tokenizer_with_an_end(tmp_path, sources):
    store = prepared(tmp_path / "store", *sources, held_out=0.0)
    expected = [[*text.encode(), 256] for text in [*texts(40)[:25], *texts(40)[20:]]]
    np.testing.assert_array_equal(store.train.read(0, len(store.train)), np.concatenate(expected))


def test_on_gs_the_shards_of_another_process_are_left(tmp_path, monkeypatch):
    """Nobody holds a folder there: who fails before a shard of its own removes none of a store that was made meanwhile.

    A local folder stands for one on gs://.
    """
    with monkeypatch.context() as patched:
        patched.setattr(output, "is_remote", lambda folder: True)
        late = output.Output(tmp_path / "web.store")
    prepared(tmp_path / "web.store", write_jsonl(tmp_path / "a.jsonl", texts(9)))
    late.remove_drafts(all=True)
    verify(open_store(tmp_path / "web.store"))


@pytest.fixture
def on_gs(tmp_path, monkeypatch):
    """Makes preparations that all look at the same moment at a folder which stands for one on gs://."""

    def put_file(path, target, mode):
        if mode == "create" and os.path.exists(target):
            raise FileExistsError
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy(path, target)

    monkeypatch.setattr(output, "is_remote", lambda folder: True)
    monkeypatch.setattr(output, "bucket_files", lambda: SimpleNamespace(put_file=put_file))
    monkeypatch.setattr(output.Output, "_require_unchanged", lambda self: None)
    sources = find_sources([str(write_jsonl(tmp_path / "a.jsonl", ["ab", "ba", "aab"]))])
    return lambda: Preparation(tmp_path / "web.store", sources, Settings(held_out=0.0, shard_tokens=5), "given")


def test_on_gs_one_of_two_processes_begins(tmp_path, on_gs, refused):
    first, second, third = (on_gs() for _ in range(3))

    def observe(progress):
        if not progress.documents:
            with refused("web.store changed meanwhile; give the same command again"):
                second.run(CharTokenizer("abc", True))

    verify(first.run(ByteTokenizer(), observe=observe))
    with refused("web.store changed meanwhile"):
        third.run(CharTokenizer("abc", True))
    store = open_store(tmp_path / "web.store")
    verify(store)
    assert [text for *_, text in decoded(store)] == ["ab", "ba", "aab"]
    assert not (tmp_path / "web.store/journal.jsonl").exists()


def test_on_gs_a_store_without_a_shard_is_begun_again_and_no_mixture_of_two(tmp_path, on_gs, refused):
    slow, tokenizer = on_gs(), CharTokenizer("abc", True)

    def observe(progress):
        if not progress.documents:
            on_gs().run(tokenizer)

    with refused("web.store changed meanwhile"):
        slow.run(ByteTokenizer(), observe=observe)
    store = open_store(tmp_path / "web.store")
    verify(store)
    assert [text for *_, text in decoded(store, tokenizer)] == ["ab", "ba", "aab"]
