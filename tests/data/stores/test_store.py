"""A store gives back its tokens and where they came from, opens by its manifest alone, and finds any changed byte."""

import json

import numpy as np
import pytest

from data.stores.mixture import Stores
from data.stores.store import is_store, open_store, verify
from parallax.tokenizers.plain import ByteTokenizer
from tests.data.small_stores import decoded, prepared, texts, write_jsonl


@pytest.fixture
def documents():
    return texts(60)


@pytest.fixture
def store(tmp_path, documents):
    write_jsonl(tmp_path / "a.jsonl", documents[:25])
    write_jsonl(tmp_path / "b.jsonl", documents[25:])
    return prepared(tmp_path / "store", tmp_path / "a.jsonl", tmp_path / "b.jsonl", held_out=0.2, shard_tokens=1000)


def test_both_sides_hold_each_document_once_with_its_place(store, documents):
    found = decoded(store)
    assert sorted(found) == sorted(
        [("a.jsonl", i + 1, text) for i, text in enumerate(documents[:25])]
        + [("b.jsonl", i + 1, text) for i, text in enumerate(documents[25:])]
    )
    held = store.manifest["held_out"]["documents"]
    assert 2 <= held <= 30
    assert len(store.manifest["shards"]) > 3
    assert store.manifest["documents"] == 60
    assert store.manifest["bytes"] == sum(len(text.encode()) for text in documents)
    assert store.manifest["tokens"] == sum(len(text.encode()) + 1 for text in documents)


def test_ranges_cross_shards_and_positions_name_documents(store):
    whole = np.concatenate([ids for _, ids in store.train.documents()])
    assert len(store.train) == len(whole)
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, len(whole) + 1, (50, 2))):
        if start < stop:
            np.testing.assert_array_equal(store.train.read(start, stop), whole[start:stop])
    position = 0
    for document, ids in store.train.documents():
        for at in (position, position + len(ids) - 1):
            assert list(store.train.documents_in(at, at + 1)) == [(position, document)]
        assert list(store.train.find(document.path, document.line)) == [(position, document)]
        position += len(ids)
    assert [document for _, document in store.train.documents_in(0, position)] == [
        document for document, _ in store.train.documents()
    ]


def test_offsets_find_the_line(store):
    for document, ids in store.train.documents():
        with open(document.path, "rb") as file:
            file.seek(document.offset)
            assert json.loads(file.readline())["text"] == ByteTokenizer().decode(ids)


def test_opening_reads_the_manifest_alone(store, refused):
    for path in store.folder.iterdir():
        if path.name != "manifest.json":
            path.unlink()
    opened = open_store(store.folder)
    assert len(opened.train) == len(store.train)
    with refused("00000.train.tokens cannot be read (No such file", "--verify"):
        opened.train.read(0, 1)


def test_verify_names_the_file_of_a_flipped_byte(store, refused):
    verify(store)
    for name in ("00001.train.tokens", "00002.held_out.documents", "tokenizer.json"):
        path = store.folder / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with refused(f"is damaged: {name} must have the sha256"):
            verify(store)
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    (store.folder / "00000.train.tokens").unlink()
    with refused("is damaged: 00000.train.tokens must"):
        verify(store)


def test_a_shard_cut_short_is_named(store, refused):
    path = store.folder / "00000.train.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with refused("00000.train.tokens cannot be read (it ends at byte"):
        list(store.train.documents())


def test_what_is_no_store_is_refused_in_one_line(store, tmp_path, refused):
    folder = store.folder
    assert is_store(folder)
    (folder / "manifest.json").write_text(json.dumps({**store.manifest, "version": 2}))
    with refused("must have format version 1, got format version 2; prepare it again"):
        open_store(folder)
    changed = json.dumps({**store.manifest, "tokens": 1})
    for content, message in (
        (changed, "was changed after"),
        ("[1]", "and is none"),
        ("{", "must be a store's manifest"),
    ):
        (folder / "manifest.json").write_text(content)
        assert is_store(folder)
        with refused(message, "prepare"):
            open_store(folder)
    (folder / "manifest.json").unlink()
    assert is_store(folder)
    with refused("must hold a manifest.json and holds none"):
        open_store(folder)
    (folder / "journal.jsonl").write_text('{"format": "parallax token store", "version": 1}\n')
    with refused("is not finished; give the prepare.py command"):
        open_store(folder)
    with refused("a.jsonl must be a folder with a manifest.json", "(Not a directory); give one that prepare.py made"):
        open_store(tmp_path / "a.jsonl")
    assert not is_store(tmp_path)
    (tmp_path / "journal.jsonl").write_text('{"text": "dear diary"}\n')
    assert not is_store(tmp_path)


def test_content_is_known_wherever_its_sources_were(tmp_path, documents):
    stores = []
    for host in ("one", "other"):
        path = write_jsonl(tmp_path / host / "a.jsonl", documents)
        stores.append(prepared(tmp_path / host / "store", path, held_out=0.2))
    assert stores[0].sha256 != stores[1].sha256
    assert stores[0].content_sha256 == stores[1].content_sha256
    assert Stores((stores[0],)).sha256 == Stores((stores[1],)).sha256
    less = prepared(tmp_path / "less", tmp_path / "one/a.jsonl", held_out=0.3)
    assert Stores((less,)).sha256 != Stores((stores[0],)).sha256


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Large(ByteTokenizer):
        vocab_size = 1 << 17

    write_jsonl(tmp_path / "a.jsonl", ["abc"])
    store = prepared(tmp_path / "store", tmp_path / "a.jsonl", tokenizer=Large(), held_out=0.0)
    assert store.manifest["dtype"] == "uint32"
    assert store.train.read(0, 4).tolist() == [97, 98, 99, 256]
