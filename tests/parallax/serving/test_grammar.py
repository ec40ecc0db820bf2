"""Answers that are JSON whatever the model would rather say."""

import json
import random

import jsonschema_rs
import numpy as np
import pytest

from parallax.inference.batching import Batcher
from parallax.inference.request import Request
from parallax.serving.grammar import Grammars
from parallax.tokenizers.hugging_face import HuggingFaceTokenizer
from parallax.tokenizers.plain import ByteTokenizer, CharTokenizer
from tests.parallax.inference.models import CONFIG, by_generator, draw_params, ids, prompt, run
from tests.parallax.interop.tokenizers import byte_level

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Zürich", "Rome"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}


def tokenizers():
    definition, _, end, turn = byte_level()
    return [ByteTokenizer(), HuggingFaceTokenizer(definition, 320, [end, turn]), CharTokenizer(LETTERS)]


LETTERS = "".join(sorted({*'{}[]":,-.eEZürichRomaesztgnuflb0123456789 \\'}))


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda tokenizer: tokenizer.name)
@pytest.mark.parametrize("schema", [SCHEMA, None], ids=["a schema", "any object"])
def test_whatever_is_drawn_is_json(tokenizer, schema):
    make, rng, whole = Grammars(tokenizer).json(schema), random.Random(0), 0
    for _ in range(20):
        matcher, drawn, finish = make(), [], None
        while finish is None and len(drawn) < 200:
            words = matcher.allowed()
            assert words.shape == (-(-tokenizer.vocab_size // 32),)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")
            assert not bits[tokenizer.vocab_size :].any()
            drawn.append(rng.choice(np.flatnonzero(bits).tolist()))
            finish = matcher.take(drawn[-1])
        if finish:
            whole += 1
            assert finish == "stop"
            value = json.loads(tokenizer.decode(drawn))
            assert jsonschema_rs.is_valid(schema or {"type": "object"}, value)
    assert whole == 20 if schema else whole > 0


@pytest.mark.parametrize("schema", [{"type": "king"}, {"$ref": "http://127.0.0.1/x"}, {"not": {"type": "string"}}])
def test_a_schema_that_cannot_be_followed_is_refused(schema):
    with pytest.raises(ValueError, match=r"the schema cannot be followed .*; leave that out"):
        Grammars(ByteTokenizer()).json(schema)


def test_a_tokenizer_that_knows_no_brackets_is_refused():
    with pytest.raises(ValueError, match="spells no JSON"):
        Grammars(CharTokenizer("abc", has_eos=True)).json()


def test_a_tokenizer_that_knows_no_quotes_is_refused_texts():
    with pytest.raises(ValueError, match="spells no answer of this schema"):
        Grammars(CharTokenizer("{}", has_eos=True)).json({"type": "string"})


def test_others_in_the_batch_are_as_they_would_be_alone():
    tokenizer = ByteTokenizer()
    config = CONFIG.replace(vocab_size=257)
    params = draw_params(config)
    batcher = Batcher(config, params, slots=3, capacity=100, grammars=True)
    grammar = Grammars(tokenizer).json(SCHEMA)
    free = [Request.one(prompt(7, seed), max_tokens=20, seed=seed, temperature=seed / 2) for seed in range(2)]
    bound = Request.one(prompt(5), max_tokens=90, seed=5, temperature=3.0, grammar=grammar)
    *others, followed = run(batcher, [*free, bound])
    assert [ids(tokens) for tokens in others] == [by_generator(config, params, each) for each in free]
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(tokenizer.decode(ids(followed))))
    assert followed[-1].finish == "stop"
    short = Request.one(prompt(5), max_tokens=3, grammar=grammar)
    assert batcher.admit(0, short)[-1].token_id == ord("{")
    assert [token.finish for token in batcher.step() + batcher.step()] == [None, "length"]


def test_a_batcher_without_grammars_refuses_them():
    batcher = Batcher(CONFIG, draw_params(CONFIG), slots=1, capacity=32)
    with pytest.raises(ValueError, match="grammars=True"):
        batcher.check(Request.one(prompt(3), max_tokens=1, grammar=lambda: None))
