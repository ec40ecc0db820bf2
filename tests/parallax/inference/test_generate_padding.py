"""Table rows that stand for no token are never drawn, whatever they hold."""

import functools

import jax
import numpy as np
import pytest

from parallax.config import TransformerConfig
from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.model.transformer import init_params

V, W, TOKENS = 3, 8, 40
SETTINGS = [  # those that let in, or push, the least likely token
    {},
    {"temperature": 0.0},
    {"temperature": 1e6},
    {"temperature": 1e6, "top_k": W},
    {"temperature": 1e6, "top_k": 2**31 - 1, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1e6, "min_p": 1e-30, "top_p": 0.999999},
    {"temperature": 0.0, "repetition_penalty": 1e6},
    {"temperature": 1e6, "repetition_penalty": 1e-6},
]
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@functools.cache
def model(tied):
    config = TransformerConfig(
        vocab_size=V, embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8,
        tie_embeddings=tied,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return config, jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


def with_rows_beyond(params, scale):
    """The parameters with large numbers of both signs in all table rows from V on."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        if path[-1].key != "table":
            return leaf
        assert leaf.shape[0] == W
        return np.concatenate([leaf[:V], scale * rng.normal(size=leaf[V:].shape).astype(np.float32)])

    return jax.tree_util.tree_map_with_path(fill, params)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_no_setting_draws_an_id_without_a_token(tied):
    config, params = model(tied)
    values = {name: [each.get(name, value) for each in SETTINGS] for name, value in DEFAULTS.items()}
    request = Request(
        prompts=[np.array([row % V], np.int32) for row in range(len(SETTINGS))],
        settings=SamplingSettings.create(len(SETTINGS), **values),
        seeds=range(len(SETTINGS)),
        max_tokens=TOKENS,
    )
    generator = Generator(config)
    empty, large = (
        [tokens.tolist() for tokens in generator.generate(with_rows_beyond(params, scale), request)]
        for scale in (0.0, 1e6)
    )
    assert empty == large
    for row, tokens in zip(SETTINGS, large, strict=True):
        assert len(tokens) == TOKENS
        assert set(tokens) <= set(range(V)), row
    assert set(large[2]) == set(range(V)), "hot enough that every token is drawn"
