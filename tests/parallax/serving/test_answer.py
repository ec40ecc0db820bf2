"""The text of an answer, for any tokens and stops."""

import random

import pytest

from parallax.inference.batching import Token
from parallax.serving.answer import AnswerText, logprobs_json, spell
from parallax.tokenizers.hugging_face import HuggingFaceTokenizer
from parallax.tokenizers.plain import ByteTokenizer
from tests.parallax.interop.tokenizers import sentencepiece

TOKENIZER = ByteTokenizer()


def tokens_of(data: bytes) -> list[Token]:
    ends = [None] * (len(data) - 1) + ["length"]
    top = ((97, -1.0), (98, -2.0))
    return [Token(1, value, -1.5, top, False, end) for value, end in zip(data, ends, strict=True)]


def answer(data: bytes, stops=(), prompt=b"", echo=False):
    text = AnswerText(TOKENIZER, prompt, stops, echo=echo)
    pieces = []
    for token in tokens_of(data):
        pieces.append(text.push(token))
        if pieces[-1].finish:
            break
    return pieces


@pytest.mark.parametrize("seed", range(40))
def test_pieces_are_the_text_up_to_the_first_stop(seed):
    rng = random.Random(seed)
    data = "".join(rng.choice("abé☃") for _ in range(30)).encode()[: rng.randint(1, 40)]
    stops = ["".join(rng.choice("abé☃") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
    whole = data.decode("utf-8", "replace")
    # The stop that is complete first ends the text, and of those the one that began first.
    found = min((whole.find(stop) + len(stop), whole.find(stop)) for stop in [*stops, whole] if stop in whole)
    expected = whole[: found[1]] if any(stop in whole for stop in stops) else whole
    pieces = answer(data, stops)
    assert "".join(piece.text for piece in pieces) == expected
    marks = [mark for piece in pieces for mark in piece.marks]
    assert [mark.offset for mark in marks] == sorted(mark.offset for mark in marks)
    assert all(mark.offset <= len(expected) for mark in marks)


def test_a_token_comes_with_its_text():
    pieces = answer(b"ab\nab", stops=["\nabc"])
    assert [piece.text for piece in pieces] == ["a", "b", "", "", "\nab"]
    assert [len(piece.marks) for piece in pieces] == [1, 1, 0, 0, 3]


def test_a_stop_in_the_prompt_does_not_count():
    assert [piece.text for piece in answer(b"b", stops=["ab"], prompt=b"a", echo=True)] == ["ab"]


def test_a_character_begun_by_the_prompt_is_ended():
    snowman = "☃".encode()
    assert [piece.text for piece in answer(snowman[1:], prompt=snowman[:1])] == ["", "☃"]


def test_an_unfinished_character_is_shown_at_the_end():
    assert [piece.text for piece in answer("a☃".encode()[:3])] == ["a", "", "�"]


def test_the_token_itself_is_reported_beside_the_best():
    piece = answer(b"c")[0]
    logprobs = logprobs_json(piece.marks, TOKENIZER, 1)
    assert logprobs["top_logprobs"] == [{"a": -1.0, "c": -1.5}]
    assert logprobs["top_token_ids"] == [[97, 99]]
    assert logprobs["token_ids"] == [99]


def test_what_json_cannot_hold_is_a_number_in_its_place():
    impossible = Token(1, 99, -float("inf"), ((97, float("nan")),), False, "length")
    mark = AnswerText(TOKENIZER, b"a", (), echo=False).push(impossible).marks[0]
    logprobs = logprobs_json([mark], TOKENIZER, 1)
    assert logprobs["token_logprobs"] == [-9999.0]
    assert logprobs["top_logprobs"] == [{"a": -9999.0, "c": -9999.0}]


@pytest.mark.parametrize("prompt", ["To be", " To be", "☃", ""])
def test_the_prompt_comes_back_as_it_was_given(prompt):
    definition, _, end, _ = sentencepiece()
    tokenizer = HuggingFaceTokenizer(definition, 300, [end, 5])
    text = AnswerText(tokenizer, tokenizer.encode(prompt).tolist(), (), echo=True)
    assert text.push(Token(1, end, -1.0, (), False, "stop")).text == prompt
    assert [spell(token, tokenizer) for token in (end, 5)] == ["<|endoftext|>"] * 2
