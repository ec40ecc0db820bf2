"""A corpus is split into what is trained on and what is held out, at a place that no tokenizer moves."""

import numpy as np
import pytest

from data.corpus import Corpus, load_corpus
from data.pipeline import count_target_bytes, evaluation_batches, prepare, tokenizer_for
from data.records import write_token_records
from parallax.tokenizers.plain import ByteTokenizer
from parallax.tokenizers.registry import save_tokenizer, train_tokenizer

SEQ_LEN = 16


@pytest.mark.parametrize("spec", ["char", "byte", "bpe:300"])
def test_text_is_split_by_characters_at_the_same_place_for_every_tokenizer(make_corpus, spec):
    corpus = make_corpus("text")
    tokenizer = tokenizer_for(corpus, spec)
    train, held_out = prepare(corpus, tokenizer, SEQ_LEN)
    first, second = tokenizer.decode(train.tokens), tokenizer.decode(held_out.tokens)
    text = corpus.documents[0]
    assert first + second == text
    assert len(second) == len(text) - int(0.9 * len(text))
    unseen = len(tokenizer.token_bytes(int(held_out.tokens[0])))
    assert count_target_bytes(held_out, tokenizer) == len(second.encode()) - unseen


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
