"""Adapters of low rank: they begin as nothing, alone are learned, and merge into the matrices beside them."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from parallax.config import (
    ExpertsConfig,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
    config_from_dict,
    config_to_dict,
)
from parallax.layer_config import ADAPTED, LayerSpec, LoraConfig
from parallax.model.adapters import join, merge, take_adapters, take_base, without_adapters
from parallax.model.transformer import TransformerLM, init_params, parameters
from parallax.training.loss import make_loss
from parallax.training.optimizer import make_optimizer
from parallelism import reduction
from tests.parallax.inference.models import draw_params

BASE = TransformerConfig(
    vocab_size=16, embed_dim=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=12, max_seq_len=8,
    attention_bias=True, pattern=(LayerSpec(sliding_window=4), LayerSpec()), tie_embeddings=False,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 16, (2, 8)).astype(np.int32)


def with_lora(base=BASE, **lora):
    return dataclasses.replace(base, lora=LoraConfig(rank=2, **lora))


drawn = functools.cache(functools.partial(draw_params, scale=0.3))
"""Parameters whose adapters are not zero."""


@functools.cache
def beginning():
    """Adapters as they begin, beside matrices that are drawn."""
    begin = jax.jit(lambda key: take_adapters(init_params(with_lora(), key)))
    return join(take_base(drawn(with_lora())), begin(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, key=None):
    return TransformerLM.from_params(config, params)(TOKENS, dropout_key=key)[0]


def test_adapters_begin_as_nothing():
    base = take_base(beginning())
    np.testing.assert_array_equal(logits(with_lora(), beginning()), logits(BASE, base))


@pytest.mark.parametrize("lora", [{}, {"rslora": True, "alpha": 3.0, "targets": ("query", "down")}])
def test_merged_adapters_compute_the_same(lora):
    config = with_lora(**lora)
    params = drawn(config)
    merged = merge(config, params)
    assert without_adapters(config) == BASE
    assert jax.tree.structure(merged) == jax.tree.structure(take_base(params))
    # A matrix is rounded where its sum is, and its matmul where the two of its adapter are.
    np.testing.assert_allclose(logits(BASE, merged), logits(config, params), atol=2e-5, rtol=2e-5)
    assert np.abs(logits(BASE, take_base(params)) - logits(config, params)).max() > 0.01


def test_what_is_taken_apart_is_put_together_again():
    params = drawn(with_lora())
    base, adapters = take_base(params), take_adapters(params)
    assert jax.tree.structure(join(base, adapters)) == jax.tree.structure(params)
    assert len(jax.tree.leaves(base)) + len(jax.tree.leaves(adapters)) == len(jax.tree.leaves(params))
    assert take_adapters(base) == {}


def test_every_named_matrix_has_an_adapter_and_no_other():
    of = {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(take_adapters(parameters(with_lora())))}
    assert of == set(ADAPTED)
    chosen = take_adapters(parameters(with_lora(targets=("value",))))
    assert {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(chosen)} == {"value"}


def test_frozen_parameters_have_neither_gradient_nor_moments():
    config = with_lora(base_dtype="bfloat16")
    params, batch = drawn(config), {"inputs": TOKENS, "targets": TOKENS}
    loss_fn = make_loss(config, TrainConfig())
    _, _, grads = jax.eval_shape(reduction.mean()(loss_fn), params, batch, jax.random.key(0))
    assert jax.tree.structure(grads) != jax.tree.structure(params)
    assert jax.tree.structure(take_adapters(grads)) == jax.tree.structure(take_adapters(params))
    assert not jax.tree.leaves(take_base(grads))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(take_base(params))} == {"bfloat16"}
    state = jax.eval_shape(make_optimizer(OptimizerConfig(), parameters(config)).init, params)
    sizes = [leaf.size for leaf in jax.tree.leaves(take_adapters(params))]
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.dtype.name for leaf in moments} == {"float32"}
    assert sum(leaf.size for leaf in moments) == 2 * sum(sizes)


def test_gradients_of_adapters_are_those_among_all():
    """The same adapters beside matrices that are learned too have the same gradients."""
    config = with_lora(dataclasses.replace(BASE, pattern=()))
    params, batch = drawn(config), {"inputs": TOKENS, "targets": TOKENS}
    loss_fn = make_loss(config, TrainConfig())
    _, _, alone = jax.jit(reduction.mean()(loss_fn))(params, batch, jax.random.key(0))
    _, _, among = jax.jit(reduction.mean()(lambda *given: loss_fn(*given)))(params, batch, jax.random.key(0))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), take_adapters(alone), take_adapters(among)
    )


def test_dropout_is_of_what_adapters_read():
    config = with_lora(dropout=0.5)
    params, key = drawn(config), jax.random.key(3)
    dropped = logits(config, params, key)
    np.testing.assert_array_equal(dropped, logits(config, params, key))
    assert np.abs(dropped - logits(config, params)).max() > 0.01
    # B is zero, so that nothing of the base may be dropped.
    np.testing.assert_array_equal(logits(config, beginning(), key), logits(config, beginning()))


def test_experts_are_frozen_and_what_all_tokens_go_through_is_adapted():
    experts = ExpertsConfig(num_experts=4, mlp_dim=8, shared_mlp_dim=8)
    config = with_lora(dataclasses.replace(BASE, experts=experts, pattern=()))
    params = drawn(config)
    assert set(take_adapters(params)["blocks"]["mlp"]) == {"shared"}
    plain = without_adapters(config)
    np.testing.assert_allclose(logits(plain, merge(config, params)), logits(config, params), atol=2e-5, rtol=2e-5)


def test_a_target_that_experts_alone_have_is_refused():
    config = dataclasses.replace(BASE, experts=ExpertsConfig(num_experts=4, mlp_dim=8), pattern=())
    assert set(take_adapters(parameters(with_lora(config)))["blocks"]) == {"attention"}
    with pytest.raises(ValueError, match=r"lora\.targets has 'up', which is a matrix of experts alone here"):
        parameters(with_lora(config, targets=("query", "up")))


def test_a_config_comes_in_as_it_went_out():
    config = with_lora(targets=("query", "up"), rslora=True)
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("lora", "rule"),
    [
        ({"rank": -1}, "must not be negative"),
        ({"alpha": 32.0}, "lora.alpha needs adapters"),
        ({"rank": 1, "alpha": 0.0}, "must be finite and positive"),
        ({"rank": 1, "dropout": 1.0}, r"must be in \[0, 1\)"),
        ({"rank": 1, "targets": ("embed",)}, "is not one of query"),
    ],
)
def test_bad_values_are_refused(lora, rule):
    with pytest.raises(ValueError, match=rule):
        LoraConfig(**lora)
