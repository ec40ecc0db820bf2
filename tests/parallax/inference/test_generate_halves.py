"""Where a first half of the answer attends to half of the cache, texts are those of a loop that always sees it all."""

import dataclasses

import numpy as np
import pytest

from parallax.inference import generate
from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.model import transformer
from parallax.model.cache import KVCache
from tests.parallax.inference.models import CONFIG, draw_params, prompt

LONG = dataclasses.replace(CONFIG, max_seq_len=256)
LENGTHS = (5, 1, 33, 60)
"""Padded to 64 tokens, with room for 160: the first half ends at 112, which the last row reaches first, after 52."""


def asked(**changes):
    """Four ragged prompts, one of them greedy."""
    request = Request(
        prompts=[prompt(length) for length in LENGTHS],
        settings=SamplingSettings.create(4, temperature=[0.0, 1.0, 0.7, 1.0]),
        seeds=range(4),
        max_tokens=80,
    )
    return dataclasses.replace(request, **changes)


def texts(request, in_halves, monkeypatch, config=LONG):
    """What each row becomes, and the sizes to which the cache grew."""
    sizes, grow = [], KVCache.grow

    def noted(cache, capacity):
        sizes.append(capacity)
        return grow(cache, capacity)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "IN_HALVES", in_halves)
        patch.setattr(KVCache, "grow", noted)
        found = Generator(config).generate(draw_params(config), request)
    return [tokens.tolist() for tokens in found], sizes


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 20}, {"dtype": "bfloat16"}], ids=str)
def test_halves_give_the_texts_of_the_whole_and_of_a_stream(changes, monkeypatch):
    config = dataclasses.replace(LONG, **changes)
    whole, sizes = texts(asked(), 4 * 96 + 1, monkeypatch, config)
    assert sizes == [160]
    assert texts(asked(), 4 * 96, monkeypatch, config) == (whole, [112, 160])
    assert [len(tokens) for tokens in whole] == [80] * 4
    streamed = [[] for _ in LENGTHS]
    for row, token in Generator(config).stream(draw_params(config), asked()):
        streamed[row].append(token)
    assert streamed == whole


def test_a_stack_is_never_there_twice(monkeypatch):
    monkeypatch.setattr(transformer, "UNSTACKED", 0)
    assert texts(asked(), 0, monkeypatch)[1] == [160]


def test_a_row_that_ended_in_the_first_half_stays_as_it_was(monkeypatch):
    free, _ = texts(asked(), 10**9, monkeypatch)
    stops = [np.array(free[0][20:24]), np.array(free[3][50:53])]
    ended, sizes = texts(asked(stops=stops), 0, monkeypatch)
    assert sizes == [112, 160]
    assert ended == texts(asked(stops=stops), 10**9, monkeypatch)[0]
    assert len(ended[0]) <= 24
    assert len(ended[3]) == 53  # rests beyond the first cache while others go on


def test_an_answer_of_the_first_half_alone(monkeypatch):
    few = asked(prompts=[prompt(3)] * 4, max_tokens=40)
    found, sizes = texts(few, 0, monkeypatch)
    assert sizes == [48, 64]
    assert found == texts(few, 10**9, monkeypatch)[0]
