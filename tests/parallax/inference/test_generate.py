"""Cached generation against full recomputation, and what a row may and may not depend on."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from parallax.config import TransformerConfig
from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.model.stack import prepare
from parallax.model.transformer import TransformerLM
from tests.parallax.inference.models import CONFIG, SETTINGS, VOCAB, draw_params, ended, nothing_compiled, prompt

VARIANTS = {
    "tied": {"tie_embeddings": True, "num_kv_heads": 4},
    "grouped": {},
    "window": {"sliding_window": 5, "num_kv_heads": 1},
    "window, bfloat16": {"sliding_window": 5, "num_kv_heads": 1, "dtype": "bfloat16"},
}
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
MIXED = {name: [setting.get(name, value) for setting in SETTINGS] for name, value in DEFAULTS.items()}


@functools.cache
def model(variant="grouped", max_seq_len=512):
    """A config, parameters and a generator; untied logits spread over a few units."""
    config = CONFIG.replace(max_seq_len=max_seq_len, **VARIANTS[variant])
    params = prepare(config, draw_params(config))
    return config, params, Generator(config)


def request(rows=8, max_tokens=24, **changes):
    """Ragged prompts with mixed settings, one of each a row."""
    lengths = (5, 1, 9, 3, 17, 2, 12, 7)[:rows]
    settings = SamplingSettings.create(rows, **{name: values[:rows] for name, values in MIXED.items()})
    request = {"prompts": [prompt(length) for length in lengths], "settings": settings, "seeds": range(100, 100 + rows)}
    return Request(**request | {"max_tokens": max_tokens} | changes)


def draw(logits_V, seen, position, seed, setting):
    """One token by the definitions, in numpy and in the order of the documentation."""
    logits = np.array(logits_V, np.float64)
    logits[seen] = (
        np.where(logits[seen] > 0, 1 / setting["repetition_penalty"], setting["repetition_penalty"]) * logits[seen]
    )
    if setting["temperature"] == 0:
        return int(np.argmax(logits))
    logits /= setting["temperature"]
    allowed = np.argsort(-logits, kind="stable")[: setting["top_k"] or None]
    weights = np.exp(logits[allowed] - logits.max())
    mass = np.cumsum(weights / weights.sum())
    if setting["top_p"] < 1:
        allowed = allowed[: int(np.argmax(mass >= setting["top_p"])) + 1]
    allowed = [token for token in allowed if np.exp(logits[token] - logits.max()) >= setting["min_p"]]
    noise = np.asarray(jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (VOCAB,)))
    return int(max(allowed, key=lambda token: logits[token] + noise[token]))


def by_full_recomputation(config, params, request):
    """The tokens of a request, the whole text through the model again for each."""
    full = jax.jit(lambda params, tokens_BT: TransformerLM.from_params(config, params)(tokens_BT)[0])
    texts = [prompt.tolist() for prompt in request.prompts]
    for _ in range(request.max_tokens):
        padded = np.zeros((len(texts), min(64, config.max_seq_len)), np.int32)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = text
        logits_BTV = np.asarray(full(params, padded))
        for row, text in enumerate(texts):
            setting = {name: values[row] for name, values in MIXED.items()}
            last_V, seen = logits_BTV[row, len(text) - 1], sorted(set(text))
            text.append(draw(last_V, seen, len(text), request.seeds[row], setting))
    return [text[len(prompt) :] for text, prompt in zip(texts, request.prompts, strict=True)]


@pytest.mark.parametrize(("variant", "max_seq_len"), [("tied", 41), ("grouped", 512), ("window", 512)])
def test_tokens_equal_full_recomputation_under_every_setting(variant, max_seq_len):
    """Up to the last position of the model where that is 41; so a row depends on its own prompt and seed alone."""
    config, params, generator = model(variant, max_seq_len)
    expected = by_full_recomputation(config, params, request())
    assert [tokens.tolist() for tokens in generator.generate(params, request())] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(SETTINGS)


@pytest.mark.parametrize(("variant", "chunk"), [("grouped", 1), ("window", 5)])
def test_a_stream_is_the_whole(variant, chunk):
    _, params, generator = model(variant)
    eos_id = int(generator.generate(params, request())[2][9])  # some rows end early
    whole = generator.generate(params, request(eos_id=eos_id))
    streamed = [[] for _ in whole]
    for row, token in generator.stream(params, request(eos_id=eos_id), chunk=chunk):
        streamed[row].append(token)
    assert streamed == [tokens.tolist() for tokens in whole]
    assert len({len(tokens) for tokens in streamed}) > 1


def test_a_stream_gives_the_first_tokens_before_it_computes_the_rest():
    _, params, generator = model()
    stream = generator.stream(params, request())
    assert [next(stream)[0] for _ in range(8)] == list(range(8))
    assert {next(stream)[0] for _ in range(8)} == {0}


@pytest.mark.parametrize(("longest", "max_tokens"), [(65, 1), (65, 20)])
def test_a_prompt_that_is_padded_to_more_than_it_becomes(longest, max_tokens):
    _, params, generator = model()
    asked = request(1, max_tokens, prompts=[prompt(longest)])
    (tokens,) = generator.generate(params, asked)
    assert [token for _, token in generator.stream(params, asked)] == tokens.tolist()
    assert len(tokens) == max_tokens


def test_tokens_after_the_first_call_compile_nothing(caplog):
    _, params, _ = model()
    generator = Generator(model()[0])
    small = request()
    whole = Request(
        prompts=[prompt(length, 5) for length in (30, 4, 8, 1, 22, 6, 32, 13)],
        settings=SamplingSettings.create(8, temperature=0.9, top_k=[0, 1, 2, 3, 4, 5, 6, 7], min_p=0.01),
        seeds=[2**32 - 1, 0, 1, 2, 3, 4, 5, 6],
        max_tokens=32,
        stops=[np.array([1, 2, 3]), np.array([4] * 10)],
        eos_id=7,
    )
    with jax.log_compiles(True):
        generator.generate(params, small)
        list(generator.stream(params, small))
    assert [record for record in caplog.records if "Compiling" in record.message]
    caplog.clear()
    with nothing_compiled(caplog):
        generated = generator.generate(params, whole)
        streamed = list(generator.stream(params, whole))
    assert sum(map(len, generated)) == len(streamed)


def test_eos_and_stops_end_a_row_where_they_first_occur():
    _, params, generator = model()
    free = [tokens.tolist() for tokens in generator.generate(params, request())]
    stops = [free[3][6:8], free[5][4:5], free[6][10:14]]
    eos_id = free[7][0]  # the token that prefill gives

    stopped = generator.generate(params, request(stops=[np.array(stop) for stop in stops], eos_id=eos_id))
    assert [tokens.tolist() for tokens in stopped] == [ended(tokens, stops, eos_id)[0] for tokens in free]
    assert len(stopped[7]) == 1
    assert len(set(map(len, stopped))) > 3


@pytest.mark.parametrize(("variant", "rows"), [("grouped", 24), ("window, bfloat16", 3)])
def test_a_stack_of_layers_gives_the_texts_of_listed_ones(variant, rows):
    """With 24 rows the listed layers attend to a smaller cache at first, which row 3 outgrows before the others."""
    config, params, generator = model(variant)
    asked = Request(
        prompts=[prompt((5, 1, 33, 60)[row % 4], row) for row in range(rows)],
        settings=SamplingSettings.create(rows, temperature=([0.0, 1.0, 0.7, 1.0] * 6)[:rows]),
        seeds=range(rows),
        max_tokens=80,
    )
    free = [tokens.tolist() for tokens in generator.generate(params, asked)]
    stops = [np.array(free[0][20:24]), np.array(free[2][50:53])]
    for request in (asked, dataclasses.replace(asked, stops=stops)):
        listed = [tokens.tolist() for tokens in generator.generate(params, request)]
        stacked = [tokens.tolist() for tokens in generator.generate(draw_params(config), request)]
        assert stacked == listed
    assert len(listed[0]) <= 24
    assert len(listed[2]) <= 53 < len(free[2])


BEYOND = [  # settings that let in, or push, the least likely token
    {},
    {"temperature": 0.0},
    {"temperature": 1e6},
    {"temperature": 1e6, "top_k": 8},
    {"temperature": 1e6, "top_k": 2**31 - 1},
    {"temperature": 1e6, "min_p": 1e-30, "top_p": 0.999999},
    {"temperature": 0.0, "repetition_penalty": 1e6},
    {"temperature": 1e6, "repetition_penalty": 1e-6},
]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_no_setting_draws_a_table_row_without_a_token(tied):
    config = TransformerConfig(
        vocab_size=3, embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8,
        tie_embeddings=tied,
    )  # fmt: skip
    values = {name: [each.get(name, value) for each in BEYOND] for name, value in DEFAULTS.items()}
    asked = Request(
        prompts=[np.array([row % 3], np.int32) for row in range(len(BEYOND))],
        settings=SamplingSettings.create(len(BEYOND), **values),
        seeds=range(len(BEYOND)),
        max_tokens=40,
    )
    own = Generator(config)

    def texts(scale):
        """With large numbers of both signs in all table rows from V on."""
        params, rng = draw_params(config, scale=0.5), np.random.default_rng(1)
        for table in [params["embedding"], *([] if tied else [params["output"]])]:
            table["table"] = table["table"].at[3:].set(scale * rng.normal(size=(5, 8)))
        return [tokens.tolist() for tokens in own.generate(params, asked)]

    empty, large = texts(0.0), texts(1e6)
    assert empty == large
    for setting, tokens in zip(BEYOND, large, strict=True):
        assert len(tokens) == 40
        assert set(tokens) <= {0, 1, 2}, setting
    assert set(large[2]) == {0, 1, 2}, "hot enough that every token is drawn"
