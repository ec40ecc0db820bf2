"""Samples show the tokens and their successors: evaluation sees each target once, an epoch each row once."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from data.corpus import Corpus
from data.pipeline import evaluation_batches, prepare, tokenizer_for, training_batches
from parallax.tokenizers.registry import train_tokenizer

SEQ_LEN = 16


def test_windows_are_the_text_and_its_next_characters(make_corpus):
    corpus = make_corpus("text")
    tokenizer = tokenizer_for(corpus)
    train, _ = prepare(corpus, tokenizer, SEQ_LEN)
    text = corpus.documents[0]
    for batch in islice(training_batches(train, batch_size=8, seed=0), 20):
        for start, inputs, targets in zip(
            batch["sample_ids"], batch["inputs"], batch["targets"], strict=True
        ):
            assert tokenizer.decode(inputs) == text[start : start + SEQ_LEN]
            assert tokenizer.decode(targets) == text[start + 1 : start + SEQ_LEN + 1]


def test_every_window_can_be_drawn():
    corpus = Corpus("short", "short", ("abcdefghij",))
    samples, _ = prepare(corpus, tokenizer_for(corpus), 4, held_out_fraction=0)
    batch = next(training_batches(samples, batch_size=500, seed=0))
    assert set(batch["sample_ids"].tolist()) == set(range(6))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_evaluation_counts_each_target_of_a_text_once(make_corpus, batch_size):
    corpus = make_corpus("text")
    _, held_out = prepare(corpus, tokenizer_for(corpus), SEQ_LEN)
    batches = list(evaluation_batches(held_out, batch_size=batch_size))
    targets = np.concatenate([batch["targets"].ravel() for batch in batches])
    inputs = np.concatenate([batch["inputs"].ravel() for batch in batches])
    np.testing.assert_array_equal(targets[targets >= 0], held_out.tokens[1:])
    np.testing.assert_array_equal(inputs[targets >= 0], held_out.tokens[:-1])
    assert (targets >= 0).sum() == held_out.num_targets


def pairs_of(ids, last_target):
    return zip(ids, [*ids[1:], last_target], strict=True)


def document_pieces(batches):
    """The (input, target) pairs of each segment of each row."""
    for batch in batches:
        for inputs, targets, segments in zip(
            batch["inputs"], batch["targets"], batch["segments"], strict=True
        ):
            assert (targets[segments == 0] == -1).all()
            for segment in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == segment)
                assert at.size
                assert (np.diff(at) == 1).all()
                yield tuple(zip(inputs[at].tolist(), targets[at].tolist(), strict=True))


@pytest.mark.parametrize("kind", ["documents", "records"])
@pytest.mark.parametrize("with_eos", [True, False])
def test_packed_rows_hold_each_document_once_and_never_cross_its_end(make_corpus, kind, with_eos):
    corpus = make_corpus(kind)
    text = "".join(corpus.documents) if kind == "documents" else "".join(map(chr, range(256)))
    tokenizer = tokenizer_for(corpus) if with_eos else train_tokenizer("char", [text])
    samples, _ = prepare(corpus, tokenizer, SEQ_LEN, held_out_fraction=0)
    expected, last_target = Counter(), tokenizer.eos_id if with_eos else -1
    for document in corpus.records or [tokenizer.encode(text) for text in corpus.documents]:
        pairs = list(pairs_of(document.tolist(), last_target))
        expected.update(tuple(pairs[i : i + SEQ_LEN]) for i in range(0, len(pairs), SEQ_LEN))
    found = list(document_pieces(evaluation_batches(samples, batch_size=7)))
    assert Counter(found) == expected
    assert sum(target >= 0 for piece in found for _, target in piece) == samples.num_targets


def test_epoch_holds_every_row_once_in_an_order_of_its_own(make_corpus):
    corpus = make_corpus("documents")
    train, _ = prepare(corpus, tokenizer_for(corpus), SEQ_LEN)
    rows = len(train.all_ids())
    batches = islice(
        training_batches(train, batch_size=5, seed=2), 3 * rows // 5 + 1
    )  # epochs end inside batches
    ids = np.concatenate([batch["sample_ids"] for batch in batches])[: 3 * rows].reshape(3, rows)
    np.testing.assert_array_equal(np.sort(ids), np.tile(np.arange(rows), (3, 1)))
    assert len({epoch.tobytes() for epoch in ids}) == 3


def test_batch_larger_than_the_corpus_goes_on_into_the_next_epochs():
    corpus = Corpus("few", "few", ("ab", "cd", "ef"))
    train, _ = prepare(corpus, tokenizer_for(corpus), 2)
    batch = next(training_batches(train, batch_size=7, seed=0))
    assert Counter(batch["sample_ids"][:6].tolist()) == {0: 3, 1: 3}
