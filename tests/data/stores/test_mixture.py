"""Mixtures: exact shares a block, each source in its own epochs, a function of the stages, the seed and k alone."""

import json
from fractions import Fraction

import numpy as np
import pytest

from data.corpus import load_corpus
from data.pipeline import evaluation_batches, prepare, tokenizer_for, training_batches
from data.stores.mixture import Mixture, Stage, load_stores
from parallax.tokenizers.plain import CharTokenizer
from tests.data.small_stores import prepared, texts, write_jsonl

SEQ_LEN, SIZE = 16, 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with three stores of different sizes."""
    monkeypatch.chdir(tmp_path)
    for seed, (name, count) in enumerate({"web": 40, "code": 25, "books": 30}.items()):
        path = write_jsonl(tmp_path / f"{name}.jsonl", texts(count, seed))
        prepared(tmp_path / f"{name}.store", path, held_out=0.3)
    return tmp_path


def sides(name):
    corpus = load_corpus(name, notify=lambda line: None)
    return corpus, *prepare(corpus, tokenizer_for(corpus), SEQ_LEN)


def write_stages(folder, *stages):
    (folder / "mix.json").write_text(json.dumps({"stages": stages}))
    return "mix.json"


def test_shares_are_exact_in_each_block_and_close_within(folder):
    corpus, train, _ = sides("web.store:0.7,code.store:0.2,books.store:0.1")
    assert corpus.name == "web_code_books"
    assert corpus.edition.startswith("mixture of web.store:0.7, code.store:0.2, books.store:0.1: 95 documents, ")
    sources = train.source_of(np.concatenate([train.draw(SIZE, 3, k) for k in range(375)]))
    for block in sources.reshape(3, 1000):
        assert np.bincount(block).tolist() == [700, 200, 100]
    for stop in range(0, 3000, 77):
        counts = np.bincount(sources[:stop], minlength=3)
        assert counts.tolist() == train.counts(SIZE, 3, stop)
        assert np.abs(counts - stop * np.array([0.7, 0.2, 0.1])).max() < 100


def test_stages_change_the_shares_and_no_source_begins_again(folder):
    name = write_stages(
        folder,
        {"until_step": 100, "weights": {"web.store": 1}},
        {"until_step": 150, "weights": {"web.store": 0.25, "code.store": 0.75}},
        {"weights": {"code.store": 0.5, "web.store": 0.5}},
    )
    corpus, train, _ = sides(name)
    assert "in 3 stages" in corpus.edition
    ids = np.concatenate([train.draw(SIZE, 0, k) for k in range(400)])
    sources = train.source_of(ids)
    assert (sources[: 100 * SIZE] == 0).all()
    for source, part in enumerate(train.parts):
        seen = ids[sources == source] - train.starts[source]
        np.testing.assert_array_equal(seen, part.order.rows(np.arange(len(seen)), 0))
    for samples in (799, 800, 1000, 1200, 1201, 3200):
        assert np.bincount(sources[:samples], minlength=2).tolist() == train.counts(SIZE, 0, samples)
    facts = corpus.stores.seen(train, SIZE, 0, 150)
    assert [fact["weight"] for fact in facts.values()] == [0.25, 0.75]
    assert sum(fact["tokens"] for fact in facts.values()) == 150 * SIZE * SEQ_LEN
    web = facts["web"]
    assert web["epochs"] == pytest.approx(web["tokens"] / train.parts[0].num_targets, abs=1e-6)


def test_batches_are_those_of_the_parts_at_any_k(folder):
    _, train, held_out = sides("web.store:0.6,code.store:0.4")
    ids = train.draw(SIZE, 1, 10**7)
    whole = next(training_batches(train, batch_size=SIZE, seed=1, start=10**7))
    for row, sample_id in enumerate(ids.tolist()):
        source = int(train.source_of(np.array([sample_id]))[0])
        alone = train.parts[source].gather(np.array([sample_id - train.starts[source]]))
        np.testing.assert_array_equal(whole["inputs"][row], alone["inputs"][0])
        np.testing.assert_array_equal(whole["targets"][row], alone["targets"][0])
    targets = np.concatenate([batch["targets"].ravel() for batch in evaluation_batches(held_out, batch_size=3)])
    assert (targets >= 0).sum() == sum(part.num_targets for part in held_out.parts)
    bounded = list(evaluation_batches(held_out, batch_size=2, most_tokens=4 * SEQ_LEN))
    found = held_out.source_of(np.concatenate([batch["sample_ids"] for batch in bounded]))
    assert np.bincount(found).tolist() == [2, 2]


def test_one_part_alone_is_the_store_itself(folder):
    _, alone, _ = sides("web.store")
    _, train, _ = sides("web.store:0.5,code.store:0.5")
    assert isinstance(train, Mixture)
    np.testing.assert_array_equal(alone.draw(SIZE, 0, 5), train.parts[0].draw(SIZE, 0, 5))
    assert load_stores("web.store") is None
    assert load_corpus("web.store:0.5,code.store:0.5").sha256 != load_corpus("web.store:0.4,code.store:0.6").sha256


def test_weights_are_exact():
    stage = Stage(None, (Fraction("0.1234"), Fraction("0.8766")))
    assert (stage.block, stage.quotas) == (5000, (617, 4383))


BAD = {
    "web.store:0.7,code.store:0.2": "must add up to 1 and add up to 0.9; correct one",
    "web.store:1.5,code.store:-0.5": "weight 1.5 of web.store",
    "web.store:x": "must be tiny_shakespeare or a path that exists",
    "C:foo.txt": "must be tiny_shakespeare or a path that exists",
    "web.store:x,code.store:0.5": "weight 'x' of web.store in web.store:x,code.store:0.5 must be a number",
    "web.store:0.5,web.store:0.5": "must give each store once",
    "web.store:0.5,code.store": "must give each store once",
    "web.store:0.5,code.store/../web.store:0.5": "web.store and code.store/../web.store are one; spell it one way",
    "web.store:0.1234567,code.store:0.8765433": "at most 6 decimals",
    ",".join(f"{'long' * 9}{i}.store:0.1" for i in range(10)): "0.store must hold a manifest.json",
    "web.store:0.5,none.store:0.5": "store none.store must hold a manifest.json",
    "web.store:0.5,chars.store:0.5": "must have one tokenizer, and web.store has byte",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lists_are_refused(folder, refused, name):
    path = write_jsonl(folder / "chars.jsonl", ["abc", "cab"])
    prepared(folder / "chars.store", path, tokenizer=CharTokenizer("abc", True))
    with refused(BAD[name]):
        load_corpus(name)


GOOD = {"weights": {"web.store": 1}}
BAD_STAGES = [
    ([], "must list a stage"),
    ([{"until_step": 5, **GOOD}], "must go on to the end, got until_step 5"),
    ([GOOD, GOOD], "stage 1 of mix.json must end at a step after 0, got None"),
    ([{"until_step": 5, **GOOD}, {"until_step": 5, **GOOD}, GOOD], "stage 2 of mix.json must end at a step after 5"),
    ([{"weights": {}}], 'stage 1 of mix.json must be {"until_step"'),
    ([{**GOOD, "more": 1}], 'stage 1 of mix.json must be {"until_step"'),
    ([{"weights": {"web.store": 0.5}}], "the weights of stage 1 of mix.json must add up to 1"),
]


@pytest.mark.parametrize(("stages", "message"), BAD_STAGES)
def test_bad_stages_are_refused(folder, refused, stages, message):
    with refused(message):
        load_corpus(write_stages(folder, *stages))
