"""A config that exists is valid: every rule, what the presets weigh, to JSON and back, and what a file may not say."""

import dataclasses
import json
import re

import jax
import pytest

from parallax import config as configs
from parallax.config import (
    PRESETS,
    TINY_CONFIG,
    ExpertsConfig,
    LayerSpec,
    OptimizerConfig,
    RopeScaling,
    TrainConfig,
    TransformerConfig,
    config_from_dict,
    config_to_dict,
)
from parallax.model.transformer import init_params, parameters
from tests.configs import random_config

# (class, the values that break one rule, the field that the message must name)
BROKEN = [
    (OptimizerConfig, {"schedule_steps": 0}, "schedule_steps"),
    (RopeScaling, {"kind": "yarnish"}, "kind"),
    (RopeScaling, {"factor": 0.5}, "factor"),
    (RopeScaling, {"factor": float("nan")}, "factor"),
    (RopeScaling, {"low_freq_factor": 4.0}, "low_freq_factor"),
    (RopeScaling, {"original_max_seq_len": 0}, "original_max_seq_len"),
    (RopeScaling, {"beta_slow": 0.0}, "beta_slow"),
    (RopeScaling, {"beta_slow": 32.0}, "beta_slow"),
    (RopeScaling, {"attention_factor": -1.0}, "attention_factor"),
    (RopeScaling, {"attention_factor": float("nan")}, "attention_factor"),
    *[
        (TransformerConfig, {name: 0}, name)
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
    ],
    (TransformerConfig, {"embed_dim": -128}, "embed_dim"),
    (TransformerConfig, {"num_kv_heads": 3}, "num_kv_heads"),
    (TransformerConfig, {"num_heads": 6, "num_kv_heads": 5}, "num_kv_heads"),
    (TransformerConfig, {"num_heads": 4, "num_kv_heads": 8}, "num_kv_heads"),
    (TransformerConfig, {"head_dim": 31}, "head_dim"),
    (TransformerConfig, {"max_seq_len": 0}, "max_seq_len"),
    (TransformerConfig, {"dropout_rate": 1.0}, "dropout_rate"),
    (TransformerConfig, {"dropout_rate": -0.1}, "dropout_rate"),
    (TransformerConfig, {"dropout_rate": float("nan")}, "dropout_rate"),
    (TransformerConfig, {"rope_theta": 1.0}, "rope_theta"),
    (TransformerConfig, {"norm_eps": 0.0}, "norm_eps"),
    (TransformerConfig, {"sliding_window": -1}, "sliding_window"),
    (TransformerConfig, {"logit_softcap": -1.0}, "logit_softcap"),
    (TransformerConfig, {"logit_softcap": float("inf")}, "logit_softcap"),
    (TransformerConfig, {"layer_loop": "unroll", "remat": "full"}, "layer_loop"),
    (TransformerConfig, {"remat": "some"}, "remat"),
    (TransformerConfig, {"dtype": "float16"}, "dtype"),
    (OptimizerConfig, {"optimizer": "sgd"}, "optimizer"),
    (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate"),
    (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps"),
    (OptimizerConfig, {"final_rate": 1.5}, "final_rate"),
    (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay"),
    (OptimizerConfig, {"beta1": 1.0}, "beta1"),
    (OptimizerConfig, {"beta2": -0.5}, "beta2"),
    (OptimizerConfig, {"clip_norm": -1.0}, "clip_norm"),
    *[
        (TrainConfig, {name: 0}, name)
        for name in (
            *("steps", "batch_size", "seq_len", "log_interval"),
            *("eval_interval", "checkpoint_interval", "check_interval", "keep", "max_bad_steps"),
        )
    ],
    (TransformerConfig, {"attention": "blocks", "dropout_rate": 0.1}, "attention"),
    (TrainConfig, {"reduction": "sum"}, "reduction"),
    (TrainConfig, {"seed": -1}, "seed"),
    (TrainConfig, {"seed": 2**31}, "seed"),
    (TrainConfig, {"accumulate": -1}, "accumulate"),
    (TrainConfig, {"accumulate": 5}, "accumulate"),
    (TrainConfig, {"batch_size": 6, "accumulate": 4}, "accumulate"),
    (TrainConfig, {"label_smoothing": 1.0}, "label_smoothing"),
    (TrainConfig, {"z_loss": -1e-4}, "z_loss"),
]
SIZES = {  # name in parallax.config: millions of parameters, as published or as counted by hand
    "TINY_CONFIG": 0.42,
    "NANO_CONFIG": 0.80,
    "SMALL_CONFIG": 25.2,
    "BASE_CONFIG": 85.0,
    "LLAMA_1B_CONFIG": 1235.8,
    "LLAMA_8B_CONFIG": 8030.3,
    "GEMMA3_4B_CONFIG": 3880.1,
    "NANO_MOE_CONFIG": 2.44,
    "MIXTRAL_8X7B_CONFIG": 46_702.8,
    "QWEN3_30B_A3B_CONFIG": 30_532.1,
    "GPT_OSS_20B_CONFIG": 20_914.8,
}


def described(value):
    return f"{value!r}"[:60]


@pytest.mark.parametrize(("kind", "values", "field"), BROKEN, ids=described)
def test_broken_rule_is_named_with_its_value_and_a_remedy(kind, values, field):
    with pytest.raises(ValueError, match=rf"\b{field}=") as raised:
        kind(**values)
    message = str(raised.value)
    assert "\n" not in message
    assert f"{field}={values[field]}" in message or f"{field}={values[field]!r}" in message
    remedy = re.search(r"; try (\S+)( and \S+)?$|; 0 is off$|is not one of (\w+)", message)
    assert remedy, message
    advised = remedy[1] or remedy[3] or "0"
    number = re.fullmatch(r"[-+.e\d]+", advised)
    kind(**{**values, field: type(values[field])(advised) if number else advised})  # the remedy does help


def test_largest_and_smallest_legal_values_are_accepted():
    TransformerConfig(vocab_size=1, embed_dim=1, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, mlp_dim=1)
    TrainConfig(steps=1, batch_size=1, seq_len=1, seed=2**31 - 1, label_smoothing=0.0, z_loss=0.0)
    OptimizerConfig(warmup_steps=0, final_rate=0.0, weight_decay=0.0, beta1=0.0, beta2=0.0, clip_norm=0.0)


@pytest.mark.parametrize("kind", [RopeScaling, TransformerConfig, OptimizerConfig, TrainConfig])
def test_configs_are_frozen_and_hash_by_value(kind):
    config = kind()
    assert config == kind()
    assert hash(config) == hash(kind())
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, getattr(config, field))
    with pytest.raises(ValueError, match="nonsense"):
        kind(nonsense=1)


def test_replacing_a_field_checks_the_rules_again():
    with pytest.raises(ValueError, match="num_kv_heads=3"):
        dataclasses.replace(TransformerConfig(), num_kv_heads=3)


def test_different_configs_are_told_apart():
    distinct = [random_config(seed) for seed in range(20)]
    assert len(set(distinct)) == 20


@pytest.mark.parametrize("name", SIZES)
def test_preset_has_the_stated_size(name):
    millions = getattr(configs, name).num_params() / 1e6
    assert millions == pytest.approx(SIZES[name], rel=0.02)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("nano", 0.80), ("nano-moe", 0.82), ("mixtral-8x7b", 12_879.9), ("qwen3-30b-a3b", 3353.0), ("gpt-oss-20b", 4190)],
)
def test_a_token_meets_its_own_experts_alone(name, millions):
    assert PRESETS[name].num_params(active=True) / 1e6 == pytest.approx(millions, rel=0.01)


def test_every_preset_has_a_lower_case_name():
    assert set(PRESETS) == {name.removesuffix("_CONFIG").replace("_", "-").lower() for name in SIZES}
    for name in SIZES:
        assert PRESETS[name.removesuffix("_CONFIG").replace("_", "-").lower()] is getattr(configs, name)


EXPERTS = [
    TransformerConfig(experts=ExpertsConfig(num_experts=3, mlp_dim=5, shared_mlp_dim=7, balance_bias_rate=0.1)),
    TransformerConfig(
        experts=ExpertsConfig(num_experts=4, bias=True, clamp=7.0), first_layers=(LayerSpec(feed_forward="dense"),)
    ),
]


@pytest.mark.parametrize("config", [*PRESETS.values(), *EXPERTS, *map(random_config, range(6))], ids=described)
def test_num_params_counts_the_tree(config):
    tree = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert jax.tree.map(lambda leaf: leaf.shape, tree) == jax.tree.map(lambda x: x.shape, parameters(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == config.num_params()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 4, "experts_per_token": 5}, r"experts_per_token=5 must not exceed num_experts=4; try 4"),
        ({"num_experts": -1}, "num_experts=-1 must not be negative; 0 is off"),
        ({"scores": "tanh"}, "experts.scores='tanh' is not one of softmax, sigmoid"),
        ({"scaling": 0.0}, "experts.scaling=0.0 must be positive; try 1"),
        ({"balance_loss": -0.1}, "experts.balance_loss=-0.1 must be finite and not negative; 0 is off"),
    ],
)
def test_experts_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ExpertsConfig(**values)


def test_layers_of_experts_need_some():
    with pytest.raises(ValueError, match=r"feed_forward=experts needs experts, and experts\.num_experts=0; try 8"):
        TransformerConfig(feed_forward="experts")


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 9, 65, 257, 32000])
def test_table_rows_are_the_next_multiple_of_eight(vocab_size):
    rows = TransformerConfig(vocab_size=vocab_size).table_rows
    assert rows % 8 == 0
    assert 0 <= rows - vocab_size < 8


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name):
    text = json.dumps(config_to_dict(PRESETS[name]))
    assert config_from_dict(json.loads(text)) == PRESETS[name]


@pytest.mark.parametrize("seed", range(10))
def test_random_config_survives_json(seed):
    config = random_config(seed)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_missing_fields_take_their_defaults():
    assert config_from_dict({}) == TransformerConfig()
    assert config_from_dict({"mlp_dim": 96}) == TINY_CONFIG


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"embed_dimm": 8}, "embed_dimm.*known are .*embed_dim"),
        ({"embed_dim": 8, "b": 1, "a": 2}, "a, b.*known are"),
        ({"rope_scaling": {"kind": "linear", "factr": 2.0}}, "factr.*known are .*factor"),
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"pattern": 5}, "pattern=5 must be a list of layers"),
        ({"first_layers": [5]}, "layer of a pattern must be an object, and is 5"),
        ({"experts": 5}, "experts must be an object, and is 5"),
    ],
    ids=["unknown", "several", "nested", "rule", "pattern", "layer", "experts"],
)
def test_what_a_file_may_not_say(values, message):
    with pytest.raises(ValueError, match=message) as raised:
        config_from_dict(values)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("config", [TrainConfig(reduction="exact", z_loss=0.0), OptimizerConfig(beta1=0.5)])
def test_settings_survive_json(config):
    assert type(config)(**json.loads(json.dumps(config_to_dict(config)))) == config
