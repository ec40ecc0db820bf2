"""Windows of a store: each once an epoch, in an order of its own, a function of the seed and k however large k is."""

import json

import numpy as np
import pytest

from data.corpus import load_corpus
from data.pipeline import evaluation_batches, prepare, tokenizer_for, training_batches
from data.stores.store import manifest_sha256
from parallax.tokenizers.plain import ByteTokenizer, CharTokenizer
from tests.data.small_stores import prepared, texts, write_jsonl

SEQ_LEN = 16


@pytest.fixture
def store(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts(60))
    return prepared(tmp_path / "web.store", path, held_out=0.2, shard_tokens=700)


@pytest.fixture
def sides(store):
    corpus = load_corpus(str(store.folder), notify=lambda line: None)
    return prepare(corpus, tokenizer_for(corpus), SEQ_LEN)


def test_a_store_is_a_corpus_with_its_own_tokenizer(store, refused):
    lines = []
    corpus = load_corpus(str(store.folder), notify=lines.append)
    assert (corpus.name, corpus.sha256) == ("web", store.content_sha256)
    assert lines == [f"dataset store {store.folder}: 60 documents, {store.manifest['tokens']:,} tokens"]
    assert tokenizer_for(corpus) == ByteTokenizer()
    with refused("--tokenizer bpe does not go with a store"):
        tokenizer_for(corpus, "bpe")
    with refused("holds tokens of another tokenizer (byte) than the run's (char)", "--tokenizer and the folder"):
        prepare(corpus, CharTokenizer("abc"), SEQ_LEN)
    with refused("the training side of", f"needs at least {10**6 + 1}", "--held-out"):
        prepare(corpus, ByteTokenizer(), 10**6)


def test_windows_are_the_tokens_and_their_successors(store, sides):
    train, _ = sides
    whole = store.train.read(0, len(store.train))
    batch = train.gather(np.array([2, -1, train.order.size - 1]))
    np.testing.assert_array_equal(batch["inputs"][0], whole[32:48])
    np.testing.assert_array_equal(batch["targets"][0], whole[33:49])
    assert (batch["targets"][1] == -1).all()
    last = batch["targets"][2]
    assert last[last >= 0].tolist() == whole[(train.order.size - 1) * SEQ_LEN + 1 :].tolist()
    assert batch["sample_ids"].tolist() == [2, -1, train.order.size - 1]


def test_each_epoch_visits_every_window_once_in_its_own_order(sides):
    train, _ = sides
    count, size = train.order.size, 7
    ids = np.concatenate([train.draw(size, 3, k) for k in range(4 * count // size + 1)])
    epochs = ids[: 3 * count].reshape(3, count)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(count))
    assert len({epoch.tobytes() for epoch in epochs}) == 3
    assert (train.draw(size, 4, 0) != epochs[0, :size]).any()


def test_an_evaluation_has_each_target_once_in_order(sides):
    _, held_out = sides
    targets = np.concatenate([b["targets"].ravel() for b in evaluation_batches(held_out, batch_size=4)])
    np.testing.assert_array_equal(targets[targets >= 0], held_out.tokens.read(1, len(held_out.tokens)))


def test_a_bounded_evaluation_takes_windows_from_all_over(sides):
    _, held_out = sides
    batches = list(evaluation_batches(held_out, batch_size=3, most_tokens=5 * SEQ_LEN + 1))
    ids = np.concatenate([batch["sample_ids"] for batch in batches])
    ids = ids[ids >= 0]
    assert len(ids) == len(set(ids.tolist())) == 5
    assert np.ptp(np.diff(ids)) <= 1
    assert ids[-1] >= held_out.order.size * 0.7
    assert len(list(evaluation_batches(held_out, batch_size=3, most_tokens=1))) == 1


def test_ten_trillion_tokens_take_no_longer(store):
    """A manifest that claims them, over files that are holes: batch 10^7, without a list of windows."""
    shard = json.loads(json.dumps(store.manifest["shards"][0]))
    shard["train"]["tokens"] = 10**13 // 8
    manifest = {**store.manifest, "shards": [shard] * 8}
    manifest["sha256"] = manifest_sha256(manifest)
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    for number in range(8):
        for side, tokens in (("train", 10**13 // 8), ("held_out", shard["held_out"]["tokens"])):
            with (store.folder / f"{number:05d}.{side}.tokens").open("wb") as file:
                file.truncate(2 * tokens)
    corpus = load_corpus(str(store.folder), notify=lambda line: None)
    train, _ = prepare(corpus, ByteTokenizer(), 2048 // 4)
    assert train.order.size > 2**34
    ids = np.concatenate([train.draw(64, 0, k) for k in (0, 10**7, 10**9)])
    assert len(set(ids.tolist())) == len(ids)
    assert ids.max() > 2**33
    batch = next(training_batches(train, batch_size=4, seed=0, start=10**7))
    assert batch["inputs"].shape == (4, 512)
    assert (batch["sample_ids"] >= 0).all()
