"""Tokenizers of other models: the library's ids, fixed bytes, texts that round-trip, and what is refused."""

import json

import numpy as np
import pytest
import tokenizers

from parallax.tokenizers.base import StreamDecoder
from parallax.tokenizers.hugging_face import HuggingFaceTokenizer, tokenizer_from_hf, tokenizer_to_hf
from parallax.tokenizers.plain import ByteTokenizer, CharTokenizer
from parallax.tokenizers.registry import load_tokenizer, save_tokenizer, train_tokenizer
from tests.parallax.interop.tokenizers import TEXT, byte_level, sentencepiece

KINDS = {"byte level": byte_level, "sentencepiece": sentencepiece}


@pytest.fixture(params=KINDS)
def made(request):
    """(tokenizer with a few more rows than ids, the library's own, id that begins a text, id that ends it)."""
    definition, begin, end, _ = KINDS[request.param]()
    library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    return HuggingFaceTokenizer(definition, library.get_vocab_size() + 5, [end]), library, begin, end


def random_text(rng, size):
    codes = rng.choice([rng.integers(0x20, 0x7F), rng.integers(0xD800), rng.integers(0xE000, 0x110000)], size)
    return "".join(map(chr, codes)) + " the end\n\n to be 12 "


def test_ids_are_those_of_the_library(made):
    ours, library, begin, _ = made
    for text in (TEXT, "", " To be", "be<|im_start|></s>the"):
        ids = ours.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == library.encode(text).ids
        assert ours.encode_part(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert ours.encode("To")[0] == begin


def test_any_text_round_trips(made):
    ours = made[0]
    rng = np.random.default_rng(1)
    for text in (TEXT, "", " ", "  be", "<|im_start|>", *(random_text(rng, size) for size in range(60))):
        assert ours.decode(ours.encode(text)) == text


def test_a_stream_goes_on_from_a_text(made):
    ours = made[0]
    whole, part = ours.encode("To be the best 🙂, the"), len(ours.encode("To be"))
    stream = StreamDecoder(ours)
    rest = "".join(stream.push(token) for token in whole[part:]) + stream.flush()
    assert rest == " the best 🙂, the" == ours.decode(whole[part:])


def test_ids_that_begin_or_end_a_text_or_stand_for_nothing_have_no_bytes(made):
    ours, library, begin, end = made
    assert ours.eos_id == end
    assert ours.end_ids == (end,)
    silent = [begin, end, *range(library.get_vocab_size(), ours.vocab_size)]
    assert [ours.token_bytes(token) for token in silent] == [b""] * len(silent)
    with pytest.raises(ValueError, match=f"token id {ours.vocab_size} must be from 0 to"):
        ours.token_bytes(ours.vocab_size)


def test_a_saved_one_is_the_same(made, tmp_path):
    ours = made[0]
    save_tokenizer(ours, tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.name, loaded.end_ids, loaded.to_json()) == (ours.name, ours.end_ids, ours.to_json())
    np.testing.assert_array_equal(loaded.encode(TEXT), ours.encode(TEXT))


def test_long_texts_are_not_cut():
    definition, *_ = byte_level()
    definition["truncation"] = {
        "max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"
    }  # fmt: skip
    ours = HuggingFaceTokenizer(definition, 300, [])
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.eos_id is None


def test_a_text_may_begin_without_an_id():
    definition, *_ = byte_level(begin=None)
    ours = HuggingFaceTokenizer(definition, 300, [0])
    assert ours.begin_ids == ()
    assert ours.decode(ours.encode(TEXT)) == TEXT


def broken(change, make=byte_level):
    definition, *_ = make()
    change(definition)
    return definition


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ({"a": 1}, "its tokenizer.json is damaged ("),
        (broken(lambda d: d.update(decoder=None)), "must spell any text by bytes (decoder none);"),
        (broken(lambda d: d.update(decoder={"type": "Fuse"})), "must spell any text by bytes (decoder Fuse);"),
        (broken(lambda d: d.update(post_processor=None), sentencepiece), "puts a space before a text and no id"),
    ],
)
def test_another_kind_is_refused(definition, message, refused):
    with refused(message, "; "):
        HuggingFaceTokenizer(definition, 400, [])


@pytest.mark.parametrize(("size", "ends", "token"), [(299, [], 299), (300, [300], 300), (300, [-1], -1)])
def test_ids_beyond_the_embedding_are_refused(size, ends, token):
    with pytest.raises(ValueError, match=f"its id {token} must be from 0 to {size - 1}, the rows of"):
        HuggingFaceTokenizer(byte_level()[0], size, ends)


@pytest.mark.parametrize(
    "ours",
    [CharTokenizer("\n Tbenot", has_eos=True), ByteTokenizer(), train_tokenizer("bpe:300", [TEXT])],
    ids=["char", "byte", "bpe"],
)
def test_our_own_have_a_tokenizer_json_with_the_same_ids(ours):
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_to_hf(ours)))
    for text in ("To be\nnot", "", "  oo  "):
        ids = ours.encode(text).tolist()
        assert library.encode(text).ids == ids
        assert library.decode(ids) == text
    assert library.token_to_id("<|endoftext|>") == ours.eos_id
    assert library.get_vocab_size() == ours.vocab_size


OURS = {
    "char": CharTokenizer("\n Tbenot☃🙂"),
    "char of documents": CharTokenizer("\n Tbenot", has_eos=True),
    "byte": ByteTokenizer(),
    "bpe": train_tokenizer("bpe:300", [TEXT]),
    "bpe without merges": train_tokenizer("bpe:257", [TEXT]),
}


@pytest.mark.parametrize("ours", OURS.values(), ids=OURS)
def test_our_own_come_back_as_they_were(ours):
    definition = json.loads(json.dumps(tokenizer_to_hf(ours)))
    back = tokenizer_from_hf(definition, ours.vocab_size, ours.end_ids)
    assert back.to_json() == ours.to_json()
    assert type(back) is type(ours)


def test_the_one_of_an_imported_model_comes_back_as_it_was(made):
    ours = made[0]
    back = tokenizer_from_hf(tokenizer_to_hf(ours), ours.vocab_size, ours.end_ids)
    assert back.to_json() == ours.to_json()


def test_another_end_or_size_makes_it_a_tokenizer_of_others():
    definition = tokenizer_to_hf(ByteTokenizer())
    assert tokenizer_from_hf(definition, 264, [256]).name == "hugging_face:264"
    assert tokenizer_from_hf(definition, 257, []).eos_id is None


def test_unknown_characters_are_refused_by_what_goes_out_too():
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_to_hf(CharTokenizer("aenv"))))
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        library.encode("naïve")


def test_a_text_that_spells_its_beginning_has_it_once(made):
    ours, library, begin, _ = made
    spelled = library.id_to_token(begin)
    for text in ("To be", "", " be\n"):
        np.testing.assert_array_equal(ours.encode(spelled + text), [begin, *ours.encode_part(text)])
        np.testing.assert_array_equal(ours.encode(spelled + text), ours.encode(text))
    assert ours.encode(f"To{spelled}").tolist().count(begin) == 2  # what stands inside is meant


def test_a_text_without_a_beginning_of_its_own_has_the_one_that_it_spells():
    definition, *_ = byte_level()
    definition["post_processor"] = None
    ours = HuggingFaceTokenizer(definition, 300, [1])
    assert ours.encode("<|begin_of_text|>To").tolist() == [0, *ours.encode("To")]
    assert ours.encode("").tolist() == []


def test_an_empty_text_is_what_the_model_begins_with(tmp_path):
    definition, *_ = byte_level(begin=None)
    ours = HuggingFaceTokenizer(definition, 300, [0], bos_id=1)
    save_tokenizer(ours, tmp_path / "tokenizer.json")
    for tokenizer in (ours, load_tokenizer(tmp_path / "tokenizer.json")):
        assert tokenizer.encode("").tolist() == [1]
        assert tokenizer.encode("To").tolist() == tokenizer.encode_part("To").tolist()
    begins, *_ = byte_level()
    assert HuggingFaceTokenizer(begins, 300, [1], bos_id=1).encode("").tolist() == [0]
    with pytest.raises(ValueError, match="its id 300 must be from 0 to 299"):
        HuggingFaceTokenizer(definition, 300, [0], bos_id=300)


def test_the_one_of_an_imported_model_goes_out_as_it_came(made):
    definition = made[0].to_json()["definition"]
    assert tokenizer_to_hf(made[0]) == definition
