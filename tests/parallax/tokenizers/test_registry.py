"""Tokenizers: round trips, streams, files, refusals."""

import json
import threading

import numpy as np
import pytest

from parallax.tokenizers.base import StreamDecoder
from parallax.tokenizers.bpe import LONGEST_WORD
from parallax.tokenizers.plain import ByteTokenizer, CharTokenizer
from parallax.tokenizers.registry import load_tokenizer, save_tokenizer, tokenizer_from_json, train_tokenizer

TEXT = "To be, or not to be: that is the question — 'ça va?', αβγ 🙂🙂\r\n" * 20
SPECS = ["char", "byte", "bpe:300"]


def random_text(rng, size):
    """Characters from all planes of Unicode, surrogates aside, and plain words."""
    codes = rng.choice([rng.integers(0x20, 0x7F), rng.integers(0xD800), rng.integers(0xE000, 0x110000)], size)
    return "".join(map(chr, codes)) + " the end\n\n <|endoftext|> 12"


@pytest.fixture(params=SPECS)
def tokenizer(request):
    return train_tokenizer(request.param, [TEXT])


def test_own_text_round_trips(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode("").shape == (0,)


@pytest.mark.parametrize("spec", ["byte", "bpe:300"])
def test_any_text_round_trips(spec):
    rng = np.random.default_rng(1)
    tokenizer = train_tokenizer(spec, [TEXT])
    for size in range(60):
        text = random_text(rng, size)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids


def test_stream_shows_whole_characters_and_adds_up(tokenizer):
    stream = StreamDecoder(tokenizer)
    pushed = [stream.push(i) for i in tokenizer.encode(TEXT)]
    assert "�" not in "".join(pushed)
    assert "".join(pushed) == TEXT
    assert stream.flush() == ""


def test_stream_of_random_ids_equals_decoding(tokenizer):
    rng = np.random.default_rng(2)
    for _ in range(200):
        ids = rng.integers(0, tokenizer.vocab_size, rng.integers(0, 30))
        stream = StreamDecoder(tokenizer)
        assert "".join([stream.push(i) for i in ids]) + stream.flush() == tokenizer.decode(ids)


def test_character_split_over_ids_waits_for_its_last_byte():
    tokenizer = ByteTokenizer()
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in "🙂".encode()] == ["", "", "", "🙂"]
    assert stream.push(0xF0) == ""
    assert stream.flush() == "�"


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "run" / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    np.testing.assert_array_equal(loaded.encode(TEXT), tokenizer.encode(TEXT))
    assert loaded.to_json() == tokenizer.to_json()


def test_bpe_sizes():
    documents = [TEXT, "many more words that merge well, well, well " * 50]
    assert train_tokenizer("bpe:300", documents).vocab_size == 300
    assert train_tokenizer("bpe:257", documents).name == "bpe:257"
    default = train_tokenizer("bpe", documents)
    assert 257 < default.vocab_size <= 1024  # fewer where nothing is left to merge
    assert default.eos_id == default.vocab_size - 1
    assert len(default.encode(documents[1])) < len(documents[1]) / 3


def test_a_word_is_no_longer_than_training_bears():
    letters = "".join(np.random.default_rng(0).choice(list("ACGT"), 50_000))
    tokenizer = train_tokenizer("bpe:300", [letters])
    assert tokenizer.decode(tokenizer.encode(letters)) == letters
    longest = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
    assert 1 < longest < 10
    same = train_tokenizer("bpe", ["a" * 5000])  # as a single word it is merged into one token
    assert max(len(same.token_bytes(token)) for token in range(same.vocab_size)) == LONGEST_WORD


def test_words_that_are_short_enough_are_learned_as_ever():
    """The ids of a text do not depend on where words would be cut."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    documents = [TEXT, "x" * LONGEST_WORD + " ☃" * 30]
    model.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=349, initial_alphabet=alphabet, show_progress=False)
    )
    ours = train_tokenizer("bpe:350", documents)
    assert ours.to_json()["definition"] == json.loads(model.to_str())


def test_native_calls_leave_signals_to_the_main_thread():
    threads = []

    class Documents(list):
        def __iter__(self):
            threads.append(threading.current_thread())
            return super().__iter__()

    train_tokenizer("bpe:257", Documents([TEXT]))
    assert threads
    assert threading.main_thread() not in threads[-1:]


def test_char_alphabet_is_sorted_and_has_an_end_only_for_several_documents():
    one = train_tokenizer("char", ["cab"])
    assert one == CharTokenizer("abc")
    assert (one.vocab_size, one.eos_id) == (3, None)
    several = train_tokenizer("char", ["ca", "b"])
    assert (several.vocab_size, several.eos_id) == (4, 3)
    assert several.decode([0, 3, 1]) == "ab"


@pytest.mark.parametrize(("text", "character", "position"), [("abx", "'x'", 2), ("é", "'é'", 0), ("ab\n", r"'\n'", 2)])
def test_unknown_character_is_named(refused, text, character, position):
    with refused(f"character {character} at position {position}", "among the 3", "--tokenizer byte"):
        CharTokenizer("abc").encode(text)


def test_half_a_surrogate_pair_is_refused(tokenizer, refused):
    with refused("\\ud800", "at position 1", "leave it out"):
        tokenizer.encode("T\ud800")


def test_ids_outside_the_vocabulary_are_refused(tokenizer, refused):
    for wrong in (-1, tokenizer.vocab_size):
        with refused(f"token id {wrong} must be from 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([wrong])


@pytest.mark.parametrize("spec", ["words", "bpe:many", "byte:3", ""])
def test_unknown_spec_is_refused(refused, spec):
    with refused(f"tokenizer={spec!r} must be char, byte, bpe or bpe:N"):
        train_tokenizer(spec, [TEXT])


def test_impossible_training_is_refused(refused):
    with refused("bpe:256 must be at least 257", "try"):
        train_tokenizer("bpe:256", [TEXT])
    with refused("bpe:99999999999 must be at most 16777216", "try bpe:32000"):
        train_tokenizer("bpe:99999999999", [TEXT])
    with refused("there is none"):
        train_tokenizer("char", [])


def test_wrong_files_are_refused(tmp_path, refused):
    path = tmp_path / "tokenizer.json"
    with refused(str(path), "No such file"):
        load_tokenizer(path)
    for content in ("{", "[]", '{"kind": "word"}', '{"kind": "char"}', '{"kind": "bpe", "definition": {"a": 1}}'):
        path.write_text(content)
        with refused(str(path), "must be one that training wrote"):
            load_tokenizer(path)
    path.write_bytes(b"\xff\xfe")
    with refused(str(path), "must be one that training wrote"):
        load_tokenizer(path)
    with refused("kind must be"):
        tokenizer_from_json({})
