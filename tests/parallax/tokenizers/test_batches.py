"""Documents in batches are `encode` and an end; what spells a special token is text."""

import numpy as np
import pytest

from parallax.tokenizers.batches import document_encoder
from parallax.tokenizers.hugging_face import HuggingFaceTokenizer, tokenizer_to_hf
from parallax.tokenizers.registry import train_tokenizer
from tests.parallax.interop.tokenizers import byte_level, sentencepiece

TEXTS = ["to be or not", "", "ü\n\n  be"]


@pytest.mark.parametrize("spec", ["char", "byte", "bpe:300"])
def test_documents_are_encoded_and_ended(spec):
    tokenizer = train_tokenizer(spec, TEXTS)
    found = document_encoder(tokenizer)(TEXTS)
    for text, ids in zip(TEXTS, found, strict=True):
        np.testing.assert_array_equal(ids, [*tokenizer.encode(text), tokenizer.eos_id])


def test_special_tokens_inside_a_document_are_text():
    ours = train_tokenizer("bpe:300", ["to be <|endoftext|> or not"])
    theirs = HuggingFaceTokenizer(tokenizer_to_hf(ours), 300, [ours.eos_id])
    text = "to be<|endoftext|>or"
    for tokenizer in (ours, theirs):
        (ids,) = document_encoder(tokenizer)([text])
        assert np.flatnonzero(ids == tokenizer.eos_id).tolist() == [len(ids) - 1]
        assert tokenizer.decode(ids) == text
    assert theirs.eos_id in theirs.encode(text)  # in a prompt it is meant


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_documents_begin_as_texts_do_and_markers_inside_are_text(make):
    definition, begin, end, _ = make()
    tokenizer = HuggingFaceTokenizer(definition, 400, [end])
    (ids,) = document_encoder(tokenizer)(["to be the"])
    np.testing.assert_array_equal(ids, [*tokenizer.encode("to be the"), end])
    text = "be </s><s><|begin_of_text|><|end_of_text|> the"
    (ids,) = document_encoder(tokenizer)([text])
    assert np.flatnonzero(np.isin(ids, [begin, end])).tolist() == [0, len(ids) - 1]
    assert tokenizer.decode(ids) == text
