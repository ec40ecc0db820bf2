"""What a step learned from, and when a document was seen, are what counting every token finds."""

import numpy as np
import pytest

from data.corpus import load_corpus
from data.pipeline import prepare, tokenizer_for
from data.samples import Windows
from data.stores.permutation import shuffled, unshuffled
from data.stores.provenance import pieces_of_step, steps_of_document
from tests.data.small_stores import prepared, texts, write_jsonl

SEQ_LEN, SIZE, SEED, STEPS = 16, 4, 3, 300


@pytest.fixture(params=["web.store", "web.store:0.75,code.store:0.25", "mix.json"])
def run(request, tmp_path, monkeypatch):
    """The corpus of a run, and its training side."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("web", "code")):
        write_jsonl(tmp_path / f"{name}.jsonl", texts(50, seed))
        prepared(tmp_path / f"{name}.store", f"{name}.jsonl", held_out=0.2, shard_tokens=900)
    (tmp_path / "mix.json").write_text(
        '{"stages": [{"until_step": 77, "weights": {"web.store": 1}},'
        ' {"weights": {"code.store": 0.6, "web.store": 0.4}}]}'
    )
    corpus = load_corpus(request.param, notify=lambda line: None)
    return corpus, prepare(corpus, tokenizer_for(corpus), SEQ_LEN)[0]


def brute_force(corpus, training):
    """Of each step from 1 the documents of its rows: by each token of each window."""
    parts = getattr(training, "parts", [training])
    owners = []
    for store in corpus.stores.stores:
        listed = [document for document, _ in store.train.documents()]
        owners.append(np.repeat(np.arange(len(listed)), [document.tokens for document in listed]))
    steps = [set()]
    for k in range(STEPS):
        seen = set()
        for row, sample_id in enumerate(training.draw(SIZE, SEED, k).tolist()):
            store = 0
            while sample_id >= parts[store].num_windows:
                sample_id -= parts[store].num_windows
                store += 1
            shown = owners[store][sample_id * SEQ_LEN : sample_id * SEQ_LEN + SEQ_LEN + 1]
            seen |= {(row, store, int(number)) for number in shown}
        steps.append(seen)
    return steps


def test_both_directions_are_what_counting_finds(run):
    corpus, training = run
    truth = brute_force(corpus, training)
    numbers = [{d: i for i, (d, _) in enumerate(store.train.documents())} for store in corpus.stores.stores]
    rng = np.random.default_rng(0)
    for step in rng.integers(1, STEPS + 1, 60).tolist():
        pieces = list(pieces_of_step(training, SIZE, SEED, step))
        assert {(piece.row, piece.store, numbers[piece.store][piece.document]) for piece in pieces} == truth[step]
        for row in range(SIZE):  # no token is left out between the pieces of a row
            shown = sum(piece.stop - piece.start for piece in pieces if piece.row == row)
            assert shown == SEQ_LEN + 1 or shown > 0
    for store, names in enumerate(numbers):
        for document in list(names)[::3]:
            found = steps_of_document(corpus.stores, training, SIZE, SEED, STEPS, document.path, document.line)
            expected = [
                step
                for step in range(1, STEPS + 1)
                if any(s == store and n == names[document] for _, s, n in truth[step])
            ]
            assert found == [(document, corpus.stores.names[store], expected)]


def test_pieces_are_the_tokens_of_the_batch(run):
    corpus, training = run
    ids = [dict(store.train.documents()) for store in corpus.stores.stores]
    batch = training.gather(training.draw(SIZE, SEED, 9))
    for row in range(SIZE):
        pieces = [piece for piece in pieces_of_step(training, SIZE, SEED, 10) if piece.row == row]
        tokens = np.concatenate([ids[piece.store][piece.document][piece.start : piece.stop] for piece in pieces])
        targets = batch["targets"][row]
        np.testing.assert_array_equal(tokens[1:], targets[targets >= 0])
        assert tokens[0] == batch["inputs"][row, 0]


def test_held_out_documents_and_unknown_ones(run, refused):
    corpus, training = run
    document, _ = next(corpus.stores.stores[0].held_out.documents())
    arguments = (corpus.stores, training, SIZE, SEED, STEPS)
    assert steps_of_document(*arguments, document.path, document.line) == [(document, "web.store", None)]
    with refused("no document of web.store", "is from web.jsonl:999"):
        steps_of_document(*arguments, "web.jsonl", 999)
    with refused("known of stores alone"):
        list(pieces_of_step(Windows(np.arange(99), 4, "text"), SIZE, SEED, 1))


@pytest.mark.parametrize("size", [1, 2, 5, 64, 1001])
def test_a_permutation_goes_both_ways(size):
    places = np.arange(size)
    np.testing.assert_array_equal(unshuffled(shuffled(places, size, 4, 2), size, 4, 2), places)
