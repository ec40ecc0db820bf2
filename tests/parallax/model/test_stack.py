"""Blocks that were listed compute what their stack computes, with a cache and without."""

import functools

import jax
import numpy as np
import pytest

from parallax.model.stack import is_listed, prepare
from parallax.model.transformer import TransformerLM
from tests.parallax.inference.models import CONFIG, VOCAB, draw_params

B, T = 3, 4
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (B, T))
compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)  # float32 sums


@pytest.mark.parametrize("changes", [{"qk_norm": True, "attention_bias": True}, {"dtype": "bfloat16"}], ids=str)
def test_listed_equals_stacked(changes):
    config = CONFIG.replace(**changes)
    params = draw_params(config)

    @jax.jit
    def run(params):
        model, at = TransformerLM.from_params(config, params), np.arange(T, dtype=np.int32)[None]
        cached, cache = model(TOKENS, np.tile(at, (B, 1)), cache=model.empty_cache(B, 9))
        layers = [cache.layer(number).read() for number in range(config.num_layers)]
        return cached, layers, model(TOKENS)[0]

    assert is_listed(prepare(config, params))
    within = compare if config.dtype == "float32" else functools.partial(compare, rtol=0, atol=0.05)
    jax.tree.map(within, run(prepare(config, params)), run(params))


def test_listed_blocks_drop_as_their_stack_does():
    config = CONFIG.replace(dropout_rate=0.3)
    params = draw_params(config)
    run = jax.jit(lambda p: TransformerLM.from_params(config, p)(TOKENS, dropout_key=jax.random.key(0))[0])
    compare(run(prepare(config, params)), run(params))


def test_preparing_copies_blocks_alone_and_once():
    config, params = CONFIG, draw_params(CONFIG)
    listed, blocks = prepare(config, params), jax.device_get(params["blocks"])
    assert listed["embedding"]["table"] is params["embedding"]["table"]
    assert prepare(config, listed) is listed
    for number in range(config.num_layers):
        own = jax.tree.map(lambda x, n=number: x[n], blocks)
        jax.tree.map(np.testing.assert_array_equal, listed["blocks"][number], own)


def test_a_deep_model_keeps_its_stack():
    config = CONFIG.replace(num_layers=13)
    params = draw_params(config)
    assert prepare(config, params) is params
