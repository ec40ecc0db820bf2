"""Where layers stay in their stack, as on TPUs and in deep models, texts are those of layers one by one."""

import contextlib

import pytest

from parallax.inference.batching import Batcher, Completion
from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.inference.speculative import BothParams, SpeculativeGenerator
from parallax.model import transformer
from parallax.model.cache import KVCache
from tests.parallax.inference.models import CONFIG, draw_params, generator, prompt

REQUEST = Request(
    prompts=[prompt(length) for length in (5, 1, 33)],
    settings=SamplingSettings.create(3, temperature=[0.0, 1.0, 0.7]),
    seeds=range(3),
    max_tokens=30,
)
GREEDY = Request(
    prompts=REQUEST.prompts,
    settings=SamplingSettings.create(3, temperature=0.0),
    seeds=range(3),
    max_tokens=30,
)


@contextlib.contextmanager
def stacked():
    """Programs that are first called here keep their stacks."""
    caches, grow = [], KVCache.grow

    def noted(cache, capacity):
        caches.append(cache.keys)
        return grow(cache, capacity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "UNSTACKED", 0)
        patch.setattr(KVCache, "grow", noted)
        yield
    assert caches
    assert not any(isinstance(keys, tuple) for keys in caches)


def rows(tokens):
    texts = [[] for _ in REQUEST.prompts]
    for row, token in tokens:
        texts[row].append(token)
    return texts


def test_generator():
    params, own = draw_params(CONFIG), Generator(CONFIG)
    expected = [tokens.tolist() for tokens in generator(CONFIG).generate(params, REQUEST)]
    with stacked():
        assert [tokens.tolist() for tokens in own.generate(params, REQUEST)] == expected
        assert rows(own.stream(params, REQUEST, chunk=7)) == expected


def test_speculative_generator():
    params, own = draw_params(CONFIG), SpeculativeGenerator(CONFIG, CONFIG, draft_tokens=3)
    expected = [tokens.tolist() for tokens in generator(CONFIG).generate(params, GREEDY)]
    with stacked():
        streamed = rows(own.stream(BothParams(params, draw_params(CONFIG, 1)), GREEDY, chunk=7))
    assert streamed == expected


def test_batcher():
    params = draw_params(CONFIG)
    assert Batcher(CONFIG, params, slots=1)._layers is not None
    expected = [tokens.tolist() for tokens in generator(CONFIG).generate(params, GREEDY)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "UNSTACKED", 0)
        batcher = Batcher(CONFIG, params, slots=3, capacity=64)
        assert batcher._layers is None
        asked = [Completion(prompt=given, temperature=0.0, max_tokens=30) for given in GREEDY.prompts]
        tokens = [token for ticket, each in enumerate(asked) for token in batcher.admit(ticket, each)]
        while batcher.free < 3:
            tokens += batcher.step()
    assert rows((token.ticket, token.token_id) for token in tokens) == expected
