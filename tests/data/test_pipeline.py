"""Batches show the tokens and their successors, are a function of the seed and k, and hold out the same text always."""

import threading
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from data.corpus import Corpus, load_corpus, overfit_corpus
from data.pipeline import evaluation_batches, prepare, tokenizer_for, training_batches
from parallax.tokenizers.plain import ByteTokenizer
from parallax.tokenizers.registry import save_tokenizer, train_tokenizer
from tests.data.small_stores import write_token_records

SEQ_LEN = 16


@pytest.fixture(params=["text", "documents", "records"])
def sides(request, make_corpus):
    corpus = make_corpus(request.param)
    return prepare(corpus, tokenizer_for(corpus), SEQ_LEN)


def take(batches, count):
    return list(islice(batches, count))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_batches_have_fixed_shapes_and_types(sides):
    train, held_out = sides
    batches = take(training_batches(train, batch_size=6, seed=0), 3) + list(evaluation_batches(held_out, batch_size=6))
    for batch in batches:
        assert batch.keys() == batches[0].keys()
        for name, array in batch.items():
            assert array.dtype == np.int32
            assert array.shape == ((6,) if name == "sample_ids" else (6, SEQ_LEN))


def test_batch_depends_on_seed_and_k_alone(sides):
    train, _ = sides
    first = take(training_batches(train, batch_size=6, seed=5), 12)
    for other in (take(training_batches(train, batch_size=6, seed=5), 12), [train.gather(train.draw(6, 5, 0))]):
        for one, two in zip(first, other, strict=False):
            assert_same(one, two)
    assert len({batch["sample_ids"].tobytes() for batch in first}) == 12
    another_seed = next(training_batches(train, batch_size=6, seed=6))
    assert (another_seed["sample_ids"] != first[0]["sample_ids"]).any()


@pytest.mark.parametrize("start", [1, 7])
def test_resuming_at_k_continues_exactly(sides, start):
    train, _ = sides
    whole = take(training_batches(train, batch_size=4, seed=1), 10)
    for one, two in zip(whole[start:], training_batches(train, batch_size=4, seed=1, start=start), strict=False):
        assert_same(one, two)


@pytest.mark.parametrize("hosts", [2, 4])
def test_rows_of_all_hosts_are_the_global_batch(sides, hosts):
    train, held_out = sides
    order = np.random.default_rng(hosts).permutation(8)  # any partition, in any order
    parts = [*order.reshape(hosts, -1)]
    for make in (
        lambda rows: take(training_batches(train, batch_size=8, seed=3, rows=rows), 4),
        lambda rows: list(evaluation_batches(held_out, batch_size=8, rows=rows)),
    ):
        whole, shares = make(None), [make(rows) for rows in parts]
        for k, batch in enumerate(whole):
            joined = {name: np.concatenate([share[k][name] for share in shares])[np.argsort(order)] for name in batch}
            assert_same(batch, joined)
    assert_same(
        next(training_batches(train, batch_size=8, seed=3, rows=slice(2, 4))),
        next(training_batches(train, batch_size=8, seed=3, rows=np.array([2, 3]))),
    )


def test_overfitting_trains_and_evaluates_on_one_window():
    corpus = overfit_corpus()
    text, tokenizer = corpus.documents[0], tokenizer_for(corpus)
    train, held_out = prepare(corpus, tokenizer, len(text) - 1, held_out_fraction=0)
    batch = next(training_batches(train, batch_size=3, seed=0))
    (evaluation,) = evaluation_batches(held_out, batch_size=1)
    for row in range(3):
        assert tokenizer.decode(batch["inputs"][row]) == text[:-1]
        assert tokenizer.decode(batch["targets"][row]) == text[1:]
    assert_same(evaluation, {name: array[:1] for name, array in batch.items()})


def test_batches_are_made_ahead_by_another_thread(make_corpus):
    corpus = make_corpus("text")
    train, _ = prepare(corpus, tokenizer_for(corpus), SEQ_LEN)
    gather, threads, ahead = train.gather, set(), threading.Semaphore(0)

    def watched(sample_ids):
        threads.add(threading.get_ident())
        ahead.release()
        return gather(sample_ids)

    train.gather = watched
    batches = training_batches(train, batch_size=2, seed=0)
    next(batches)
    for _ in range(2):  # the first batch, and one that nobody has asked for yet
        assert ahead.acquire(timeout=30)
    assert threading.get_ident() not in threads


def test_error_while_a_batch_is_made_reaches_the_caller(make_corpus):
    corpus = make_corpus("text")
    train, _ = prepare(corpus, tokenizer_for(corpus), SEQ_LEN)
    with pytest.raises(IndexError):
        next(training_batches(train, batch_size=2, seed=0, rows=np.array([2])))


def test_arguments_out_of_range_are_refused(make_corpus, refused):
    corpus = make_corpus("text")
    tokenizer = tokenizer_for(corpus)
    with refused("seq_len=0 must be at least 1"):
        prepare(corpus, tokenizer, 0)
    with refused("held_out_fraction=1 must be"):
        prepare(corpus, tokenizer, SEQ_LEN, held_out_fraction=1)
    train, held_out = prepare(corpus, tokenizer, SEQ_LEN)
    with refused("batch_size=0 must be at least 1"):
        training_batches(train, batch_size=0, seed=0)
    with refused("batch_size=0 must be at least 1"):
        evaluation_batches(held_out, batch_size=0)
    with refused("seed=-1"):
        training_batches(train, batch_size=1, seed=-1)


@pytest.mark.parametrize("spec", ["char", "byte", "bpe:300"])
def test_text_is_split_by_characters_at_the_same_place_for_every_tokenizer(make_corpus, spec):
    corpus = make_corpus("text")
    tokenizer = tokenizer_for(corpus, spec)
    train, held_out = prepare(corpus, tokenizer, SEQ_LEN)
    first, second = tokenizer.decode(train.tokens), tokenizer.decode(held_out.tokens)
    text = corpus.documents[0]
    assert first + second == text
    assert len(second) == len(text) - int(0.9 * len(text))


@pytest.mark.parametrize(("count", "held"), [(2, 1), (9, 1), (40, 4)])
def test_last_documents_are_held_out_whole(count, held):
    documents = tuple(chr(0x4E00 + i) * 30 for i in range(count))  # each has a character of its own
    corpus = Corpus("documents", "distinct", documents)
    tokenizer = tokenizer_for(corpus)
    seen = []
    for side in prepare(corpus, tokenizer, SEQ_LEN):
        inputs = np.concatenate(
            [batch["inputs"][batch["segments"] > 0] for batch in evaluation_batches(side, batch_size=2)]
        )
        seen.append("".join(sorted(tokenizer.decode(inputs))))
    assert seen == ["".join(documents[: count - held]), "".join(documents[count - held :])]


@pytest.mark.parametrize("fraction", [1e-20, 0.1, 0.99])
def test_each_side_has_a_document_whatever_the_fraction(fraction):
    corpus = Corpus("two", "two", ("ab", "cd"))
    for side in prepare(corpus, tokenizer_for(corpus), 2, held_out_fraction=fraction):
        assert side.num_targets == 2


def test_single_record_is_one_text(tmp_path):
    write_token_records(tmp_path / "a.array_record", [np.arange(200)])
    save_tokenizer(ByteTokenizer(), tmp_path / "tokenizer.json")
    corpus = load_corpus(str(tmp_path), notify=lambda line: None)
    train, held_out = prepare(corpus, tokenizer_for(corpus), SEQ_LEN)
    np.testing.assert_array_equal(np.concatenate([train.tokens, held_out.tokens]), np.arange(200))


@pytest.mark.parametrize(
    ("length", "held_out_fraction", "message"),
    [
        (800, 0.1, "held-out text has 80 tokens but seq_len=256 needs at least 257"),
        (200, 0.1, "training text has 180 tokens but seq_len=256 needs at least 257"),
        (256, 0, "text has 256 tokens but seq_len=256 needs at least 257"),
    ],
)
def test_text_shorter_than_a_sequence_is_refused(refused, length, held_out_fraction, message):
    corpus = Corpus("short", "short", ("ab" * (length // 2),))
    with refused(message, "use a shorter --seq-len or a longer text"):
        prepare(corpus, tokenizer_for(corpus), 256, held_out_fraction=held_out_fraction)


def test_records_keep_their_own_tokenizer(make_corpus, refused):
    corpus = make_corpus("records")
    assert tokenizer_for(corpus) == ByteTokenizer()
    with refused("--tokenizer bpe", "leave it out"):
        tokenizer_for(corpus, "bpe")
    with refused("must hold ids from 0 to 2"):
        prepare(corpus, train_tokenizer("char", ["abc"]), SEQ_LEN)


def test_windows_are_the_text_and_its_next_characters(make_corpus):
    corpus = make_corpus("text")
    tokenizer = tokenizer_for(corpus)
    train, _ = prepare(corpus, tokenizer, SEQ_LEN)
    text = corpus.documents[0]
    for batch in islice(training_batches(train, batch_size=8, seed=0), 20):
        for start, inputs, targets in zip(batch["sample_ids"], batch["inputs"], batch["targets"], strict=True):
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
        for inputs, targets, segments in zip(batch["inputs"], batch["targets"], batch["segments"], strict=True):
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
    batches = islice(training_batches(train, batch_size=5, seed=2), 3 * rows // 5 + 1)  # epochs end inside batches
    ids = np.concatenate([batch["sample_ids"] for batch in batches])[: 3 * rows].reshape(3, rows)
    np.testing.assert_array_equal(np.sort(ids), np.tile(np.arange(rows), (3, 1)))
    assert len({epoch.tobytes() for epoch in ids}) == 3


def test_batch_larger_than_the_corpus_goes_on_into_the_next_epochs():
    corpus = Corpus("few", "few", ("ab", "cd", "ef"))
    train, _ = prepare(corpus, tokenizer_for(corpus), 2)
    batch = next(training_batches(train, batch_size=7, seed=0))
    assert Counter(batch["sample_ids"][:6].tolist()) == {0: 3, 1: 3}


@pytest.mark.parametrize("kind", ["text", "documents"])
def test_an_id_outside_the_vocabulary_is_refused_before_training(make_corpus, kind):
    """A model cannot check it: what an array holds is not known while a step is compiled."""

    class Longer(ByteTokenizer):
        vocab_size = 97

    with pytest.raises(ValueError, match=r"token id \d+ must be from 0 to 96; use the model's own tokenizer"):
        prepare(make_corpus(kind), Longer(), SEQ_LEN)
