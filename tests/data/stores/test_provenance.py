"""What a step learned from, and when a document was seen, are what counting every token finds."""

import numpy as np
import pytest

from data.corpus import load_corpus
from data.pipeline import prepare, tokenizer_for
from data.samples import Windows
from data.stores import rows
from data.stores.provenance import pieces_of_step, steps_of_document
from tests.data.small_stores import prepared, texts, write_jsonl

SEQ_LEN, SIZE, SEED, STEPS = 16, 4, 3, 300


MIXTURE = "web.store:0.75,code.store:0.25"
RUNS = [
    ("web.store", "concat"),
    (MIXTURE, "concat"),
    ("mix.json", "concat"),
    ("web.store", "best-fit"),
    (MIXTURE, "none"),
]


@pytest.fixture(params=RUNS, ids=lambda run: " ".join(run))
def run(request, tmp_path, monkeypatch):
    """The corpus of a run, and its training side."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows, "BLOCK_TOKENS", 8 * SEQ_LEN)
    monkeypatch.setattr(rows, "BLOCK_ROWS", 8)
    for seed, name in enumerate(("web", "code")):
        write_jsonl(tmp_path / f"{name}.jsonl", texts(50, seed))
        prepared(tmp_path / f"{name}.store", f"{name}.jsonl", held_out=0.2, shard_tokens=900)
    (tmp_path / "mix.json").write_text(
        '{"stages": [{"until_step": 77, "weights": {"web.store": 1}},'
        ' {"weights": {"code.store": 0.6, "web.store": 0.4}}]}'
    )
    name, packing = request.param
    corpus = load_corpus(name, notify=lambda line: None)
    return corpus, prepare(corpus, tokenizer_for(corpus), SEQ_LEN, packing=packing)[0]


def brute_force(corpus, training):
    """Of each step from 1 the documents of its rows: of batches that hold positions in place of tokens."""
    parts = getattr(training, "parts", [training])
    owners = []
    for store, part in zip(corpus.stores.stores, parts, strict=True):
        listed = [document for document, _ in store.train.documents()]
        owners.append(np.repeat(np.arange(len(listed)), [document.tokens for document in listed]))
        part.tokens.read_learned = lambda spans: [
            (np.arange(*span), np.ones(span[1] - span[0], bool)) for span in spans
        ]
    steps = [set()]
    for k in range(STEPS):
        ids = training.draw(SIZE, SEED, k)
        batch = training.gather(ids)
        has_target = batch["targets"] >= 0
        has_input = batch.get("segments", has_target) > 0
        seen = set()
        for row, sample_id in enumerate(ids.tolist()):
            store = int(training.source_of(sample_id)) if len(parts) > 1 else 0
            shown = np.append(batch["inputs"][row][has_input[row]], batch["targets"][row][has_target[row]])
            seen |= {(row, store, int(number)) for number in owners[store][shown]}
        steps.append(seen)
    for part in parts:
        del part.tokens.read_learned
    return steps


def test_both_directions_are_what_counting_finds(run):
    corpus, training = run
    truth = brute_force(corpus, training)
    numbers = [{d: i for i, (d, _) in enumerate(store.train.documents())} for store in corpus.stores.stores]
    rng = np.random.default_rng(0)
    for step in rng.integers(1, STEPS + 1, 60).tolist():
        pieces = list(pieces_of_step(training, SIZE, SEED, step))
        assert {(piece.row, piece.store, numbers[piece.store][piece.document]) for piece in pieces} == truth[step]
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
        shown = [ids[piece.store][piece.document][piece.start : piece.stop].tolist() for piece in pieces]
        inputs, targets = batch["inputs"][row], batch["targets"][row]
        if "segments" not in batch:
            tokens = np.concatenate(shown)
            np.testing.assert_array_equal(tokens[1:], targets[targets >= 0])
            assert tokens[0] == inputs[0]
            continue
        segments = batch["segments"][row]
        for number, tokens in enumerate(shown, start=1):
            learned = targets[(segments == number) & (targets >= 0)]
            assert [inputs[segments == number][0], *learned] == tokens
        assert segments.max() == len(shown)


def test_held_out_documents_and_unknown_ones(run, refused):
    corpus, training = run
    document, _ = next(corpus.stores.stores[0].held_out.documents())
    arguments = (corpus.stores, training, SIZE, SEED, STEPS)
    assert steps_of_document(*arguments, document.path, document.line) == [(document, "web.store", None)]
    with refused("no document of web.store", "is from web.jsonl:999"):
        steps_of_document(*arguments, "web.jsonl", 999)
    with refused("known of stores alone"):
        list(pieces_of_step(Windows(np.arange(99), 4, "text"), SIZE, SEED, 1))
