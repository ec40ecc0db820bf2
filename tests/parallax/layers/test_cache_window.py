"""A layer with a window keeps no more tokens than that, and gives what one that keeps all gives."""

import functools

import jax
import numpy as np
import pytest

from parallax.config import LayerSpec
from parallax.inference.batching import Batcher
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.inference.speculative import BothParams, SpeculativeGenerator
from parallax.layers.cache import KVCache
from parallax.model.stack import prepare
from parallax.model.transformer import TransformerLM
from tests.parallax.inference.models import (
    CONFIG,
    VOCAB,
    by_generator,
    completion,
    draw_params,
    generator,
    ids,
    logprobs,
    run,
)

WINDOW, ROOM = 4, 40
LOCAL = LayerSpec(sliding_window=WINDOW)
CONFIGS = {
    "all local": CONFIG.replace(sliding_window=WINDOW),
    "local and global": CONFIG.replace(pattern=(LOCAL, LayerSpec())),
}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 24))
compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)  # float32 sums
every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@functools.cache
def step(config):
    def forward(params, tokens, positions, cache, lengths):
        return TransformerLM.from_params(config, params)(tokens, positions, cache=cache, lengths=lengths)

    return jax.jit(forward)


@functools.cache
def example(config):
    """Parameters, and the logits of the whole text."""
    params = draw_params(config)
    return params, np.asarray(jax.jit(lambda params: TransformerLM.from_params(config, params)(TOKENS)[0])(params))


@every
@pytest.mark.parametrize("listed", [False, True])
def test_memory_is_that_of_the_window(config, listed):
    shapes = jax.tree.leaves(KVCache.create(config, 2, 1000, listed=listed).keys)
    slots = sorted(x.shape[-2] for x in shapes for _ in range(1 if listed or x.ndim == 4 else x.shape[0]))
    windows = [layer.sliding_window for layer in config.layers]
    assert slots == sorted(window or 1000 for window in windows)
    assert {x.shape[-2] for x in jax.tree.leaves(KVCache.create(config, 2, 3, listed=listed))} == {3}


@every
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("parts", [(1,) * 24, (9, 1, 1, 9, 1, 1, 1, 1)], ids=len)
def test_tokens_in_parts_of_any_size_give_what_the_whole_text_gives(config, listed, parts):
    params, expected = example(config)
    params = prepare(config, params) if listed else params
    cache, start = KVCache.create(config, 2, ROOM, listed=listed), 0
    for size in parts:
        at = np.arange(start, start + size)
        logits, cache = step(config)(params, TOKENS[:, at], np.tile(at, (2, 1)), cache, None)
        compare(logits, expected[:, at])
        start += size


@every
def test_padding_takes_no_slot_of_a_window(config):
    params, expected = example(config)
    lengths, at = np.array([5, 13]), np.tile(np.arange(16), (2, 1))
    padded = np.where(at < lengths[:, None], TOKENS[:, :16], 0)
    logits, cache = step(config)(params, padded, at, KVCache.create(config, 2, ROOM), lengths)
    for row in range(2):
        compare(np.asarray(logits)[row, : lengths[row]], expected[row, : lengths[row]])
    for more in range(8):
        position = lengths + more
        logits, cache = step(config)(params, TOKENS[[0, 1], position][:, None], position[:, None], cache, None)
        compare(logits, expected[[0, 1], position][:, None])


@every
def test_tokens_that_are_taken_back_leave_nothing(config):
    """Proposals of other tokens are written first, up to as many as the cache allows."""
    params, expected = example(config)
    cache = KVCache.create(config, 2, ROOM, 3)
    logits, cache = step(config)(params, TOKENS[:, :7], np.tile(np.arange(7), (2, 1)), cache, None)
    for start in range(7, 20):
        at = np.tile(np.arange(start, start + 4), (2, 1))
        wrong = TOKENS[:, start : start + 4].copy()
        wrong[:, 1:] = (wrong[:, 1:] + 1) % VOCAB
        logits, cache = step(config)(params, wrong, at, cache, None)
        compare(np.asarray(logits)[:, 0], expected[:, start])


@every
def test_a_cache_may_grow_and_shrink_around_its_window(config):
    params, expected = example(config)
    cache, at = KVCache.create(config, 2, 3), np.tile(np.arange(3), (2, 1))
    _, cache = step(config)(params, TOKENS[:, :3], at, cache, np.array([3, 3]))
    for position, room in [(3, 8), (4, 8), (5, 8), (6, 20), (7, 8), (8, 20)]:
        cache = cache.resize(room)
        at = np.full((2, 1), position)
        logits, cache = step(config)(params, TOKENS[:, position][:, None], at, cache, None)
        compare(logits, expected[:, position : position + 1])


def test_generator_batcher_and_speculation_continue_past_the_window():
    config = CONFIGS["local and global"]
    params, _ = example(config)
    asked = [completion(number, max_tokens=20, temperature=0.0, repetition_penalty=1.0) for number in range(3)]
    texts = [by_generator(config, params, each) for each in asked]
    for each, text in zip(asked, texts, strict=True):
        whole = [*each.prompts[0].tolist(), *text]
        best = logprobs(config, params, whole).argmax(1)[len(each.prompts[0]) - 1 : -1]
        assert text == best.tolist()
    assert [*map(ids, run(Batcher(config, params, slots=2, capacity=64), asked))] == texts
    draft = draw_params(config, seed=1)
    both = SpeculativeGenerator(config, config, draft_tokens=3)
    assert [both.generate(BothParams(params, draft), each)[0].tolist() for each in asked] == texts


def test_rows_of_several_lengths_share_a_batch():
    config = CONFIGS["local and global"]
    params, _ = example(config)
    prompts, settings = [TOKENS[0, :n].astype(np.int32) for n in (3, 11)], SamplingSettings.create(2, temperature=0.0)
    together = Request(prompts=prompts, settings=settings, seeds=(0, 0), max_tokens=12)
    alone = [Request.one(prompt, max_tokens=12, temperature=0.0) for prompt in prompts]
    texts = [by_generator(config, params, each) for each in alone]
    assert [text.tolist() for text in generator(config).generate(params, together)] == texts
