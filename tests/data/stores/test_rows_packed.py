"""Documents of a store packed by blocks, and a document a row: every target once, and no document sees another."""

from itertools import islice

import numpy as np
import pytest

from data.corpus import load_corpus
from data.pipeline import evaluation_batches, prepare, tokenizer_for, training_batches
from data.stores import rows
from tests.data.small_stores import prepared, texts, write_jsonl

SEQ_LEN = 64


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Of several shards and blocks."""
    monkeypatch.setattr(rows, "BLOCK_TOKENS", 12 * SEQ_LEN)
    monkeypatch.setattr(rows, "BLOCK_ROWS", 4)
    path = write_jsonl(tmp_path / "a.jsonl", texts(120))
    return prepared(tmp_path / "web.store", path, held_out=0.2, shard_tokens=1700)


def sides(store, packing):
    corpus = load_corpus(str(store.folder), notify=lambda line: None)
    return prepare(corpus, tokenizer_for(corpus), SEQ_LEN, packing=packing)


def positions(samples, ids):
    """The batch with positions in place of tokens."""
    samples.tokens.read_learned = lambda spans: [(np.arange(*each), np.ones(each[1] - each[0], bool)) for each in spans]
    batch = samples.gather(ids)
    del samples.tokens.read_learned
    return batch


def documents(side):
    """First token and the one behind the last of each."""
    ends = np.cumsum([document.tokens for document, _ in side.documents()])
    return np.stack([np.append(0, ends[:-1]), ends], 1)


@pytest.mark.parametrize("side", [0, 1])
def test_packed_rows_are_full_and_hold_each_target_once(store, side):
    samples = sides(store, "best-fit")[side]
    batch = positions(samples, samples.all_ids())
    spans = documents(samples.tokens)
    assert len(batch["inputs"]) == -(-len(samples.tokens) // SEQ_LEN)
    shown = batch["segments"] > 0
    assert (~shown).sum() == -len(samples.tokens) % SEQ_LEN
    assert shown[: (len(shown) - 1) // 12 * 12].all()
    assert sorted(batch["inputs"][shown].tolist()) == list(range(len(samples.tokens)))
    inside = np.setdiff1d(np.arange(len(samples.tokens)), spans[:, 0])
    assert sorted(batch["targets"][batch["targets"] >= 0].tolist()) == inside.tolist()
    has_target = batch["targets"] >= 0
    np.testing.assert_array_equal(batch["targets"][has_target], batch["inputs"][has_target] + 1)
    owner = np.searchsorted(spans[:, 1], batch["inputs"], "right")
    for row in range(len(owner)):  # a segment is of one document
        for segment in range(1, batch["segments"][row].max() + 1):
            assert len(set(owner[row][batch["segments"][row] == segment].tolist())) == 1
    cut = sum(len(set(np.nonzero((owner == number) & shown)[0].tolist())) > 1 for number in range(len(spans)))
    assert cut < (spans[:, 1] - spans[:, 0] > SEQ_LEN).sum() + 2 * (len(owner) // 12 + 1) + len(owner) // 4


def test_a_document_a_row_is_its_first_tokens(store):
    samples, _ = sides(store, "none")
    batch = positions(samples, np.append(samples.all_ids(), -1))
    for row, (start, stop) in enumerate(documents(samples.tokens).tolist()):
        length = min(stop - start - 1, SEQ_LEN)
        assert batch["inputs"][row, :length].tolist() == list(range(start, start + length))
        assert batch["targets"][row].tolist() == [*range(start + 1, start + length + 1), *[-1] * (SEQ_LEN - length)]
    assert (batch["targets"][-1] == -1).all()
    assert "segments" not in batch
    read, files = [], samples.tokens._files
    files.read = lambda ranges, read_all=files.read: read.append(len(ranges)) or read_all(ranges)
    samples.gather(samples.all_ids()[:9])
    assert read == [9, 9]  # the bounds of documents, then their tokens, each at the same time


def test_whole_documents_share_rows_and_none_is_cut(store):
    samples, _ = sides(store, "whole")
    batch = positions(samples, samples.all_ids())
    shown, spans = batch["segments"] > 0, documents(samples.tokens).tolist()
    lengths = [min(stop - start - 1, SEQ_LEN) for start, stop in spans]
    assert sorted(batch["inputs"][shown].tolist()) == sorted(
        start + at for (start, _), length in zip(spans, lengths, strict=True) for at in range(length)
    )
    assert (batch["targets"][shown] == batch["inputs"][shown] + 1).all()
    assert (batch["targets"][~shown] == -1).all()
    assert len(shown) < len(spans)
    assert samples.count_cut() == sum(stop - start - 1 > SEQ_LEN for start, stop in spans) > 0
    for start, stop in spans[:20]:
        there = np.nonzero((batch["inputs"] == start) & shown)[0]
        assert list(samples.rows_of(start, stop)) == there.tolist()


@pytest.mark.parametrize("packing", ["best-fit", "whole", "none"])
def test_batches_depend_on_the_seed_and_k_alone_for_any_processes(store, packing):
    train, held_out = sides(store, packing)
    whole = list(islice(training_batches(train, batch_size=8, seed=5), 30))
    fresh, _ = sides(store, packing)
    for k in (29, 0, 13):
        resumed = next(training_batches(fresh, batch_size=8, seed=5, start=k))
        half = next(training_batches(fresh, batch_size=8, seed=5, start=k, rows=slice(1, 8, 2)))
        for name, array in whole[k].items():
            assert array.dtype == np.int32
            np.testing.assert_array_equal(resumed[name], array)
            np.testing.assert_array_equal(half[name], array[1::2])
    bounded = list(evaluation_batches(held_out, batch_size=3, most_tokens=4 * SEQ_LEN))
    assert sum((batch["sample_ids"] >= 0).sum() for batch in bounded) == 4


def test_mixtures_are_packed_and_texts_are_not(store, tmp_path, refused):
    other = prepared(tmp_path / "code.store", write_jsonl(tmp_path / "b.jsonl", texts(40, 1)), held_out=0.3)
    corpus = load_corpus(f"{store.folder}:0.5,{other.folder}:0.5", notify=lambda line: None)
    train, _ = prepare(corpus, tokenizer_for(corpus), SEQ_LEN, packing="best-fit")
    batch = train.gather(train.draw(8, 0, 10**6))
    assert (batch["segments"].max(1) > 1).any()
    assert sorted(train.source_of(train.draw(1000, 0, 0)).tolist()) == [0] * 500 + [1] * 500
    (tmp_path / "notes.txt").write_text("to be or not " * 99)
    text = load_corpus(str(tmp_path / "notes.txt"), notify=lambda line: None)
    with refused("--packing none goes with a store, and text file ", "leave it out"):
        prepare(text, tokenizer_for(text), SEQ_LEN, packing="none")


def test_other_stores_are_evaluated(store, tmp_path, refused):
    books = prepared(tmp_path / "books.store", write_jsonl(tmp_path / "b.jsonl", texts(30, 2)), held_out=1.0)
    lines = []
    corpus = load_corpus(str(store.folder), evaluated=str(books.folder), notify=lines.append)
    assert lines[-1] == f"held out  store {books.folder}"
    assert corpus.sha256 not in (store.content_sha256, books.content_sha256)
    train, held_out = prepare(corpus, tokenizer_for(corpus), SEQ_LEN)
    assert (len(train.tokens), len(held_out.tokens)) == (len(store.train), books.manifest["tokens"])
    (tmp_path / "notes.txt").write_text("to be or not " * 99)
    text = load_corpus(str(tmp_path / "notes.txt"), evaluated=str(books.folder), notify=lines.append)
    train, held_out = prepare(text, tokenizer_for(text, "byte"), SEQ_LEN)
    assert (len(train.tokens), len(held_out.tokens)) == (13 * 99, books.manifest["tokens"])
    with refused("holds tokens of another tokenizer (byte) than the run's (char)"):
        prepare(text, tokenizer_for(text, "char"), SEQ_LEN)
