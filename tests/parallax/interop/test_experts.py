"""Configs and tensors of mixtures of experts; test_experts_parity.py compares what they compute."""

import dataclasses

import numpy as np
import pytest

from parallax.config import PRESETS, ExpertsConfig, TransformerConfig
from parallax.interop.hf_config import config_from_hf, config_to_hf
from parallax.interop.llama import named, tensors

EXPERTS = ExpertsConfig(num_experts=3, mlp_dim=20)
SIZES = {"embed_dim": 12, "num_layers": 2, "num_heads": 3, "num_kv_heads": 1, "head_dim": 4, "mlp_dim": 32}
CONFIGS = {
    "mixtral": TransformerConfig(**SIZES, experts=EXPERTS),
    "qwen3_moe": TransformerConfig(**SIZES, qk_norm=True, experts=dataclasses.replace(EXPERTS, renormalize=False)),
    "olmoe": TransformerConfig(**SIZES, qk_norm=True, qk_norm_over="heads", experts=EXPERTS),
    "gpt_oss": TransformerConfig(
        **SIZES,
        attention_bias=True,
        attention_out_bias=True,
        attention_sinks=True,
        experts=dataclasses.replace(EXPERTS, bias=True, clamp=7.0),
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_goes_out_as_its_architecture_and_comes_in_again(kind):
    config = CONFIGS[kind]
    values = config_to_hf(config)
    assert values["model_type"] == kind
    again = config_from_hf(values)
    assert config_to_hf(again) == values
    assert again.num_params() == config.num_params()
    assert again.expert_dim == 20


@pytest.mark.parametrize(
    ("name", "kind"),
    [("nano-moe", "mixtral"), ("mixtral-8x7b", "mixtral"), ("qwen3-30b-a3b", "qwen3_moe"), ("gpt-oss-20b", "gpt_oss")],
)
def test_presets_have_an_architecture(name, kind):
    assert config_to_hf(PRESETS[name])["model_type"] == kind


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_expert_of_every_layer_has_its_tensors(kind):
    names = named(CONFIGS[kind])
    assert sum(np.prod(entry.shape_there) for entry, _ in names.values()) == CONFIGS[kind].num_params() - 7 * 12 * 1
    own = [name for name in names if name.startswith("model.layers.1.") and "expert" in name]
    assert len(own) == (4 if kind == "gpt_oss" else 9)


def test_gate_and_up_of_gpt_oss_take_turns():
    gate, up = (entry for entry in tensors(CONFIGS["gpt_oss"]) if entry.name.endswith("gate_up_proj"))
    there = np.arange(3 * 12 * 40, dtype=np.float32).reshape(3, 12, 40)
    bounds = (slice(1, 3), slice(0, 12), slice(0, 20))
    assert gate.find(bounds) == up.find(bounds) == (slice(1, 3), slice(0, 12), slice(0, 40))
    np.testing.assert_array_equal(gate.bring(there[1:3], bounds), there[1:3, :, ::2])
    np.testing.assert_array_equal(up.bring(there[1:3], bounds), there[1:3, :, 1::2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": "sigmoid"}, "scores='sigmoid'"),
        ({"shared_mlp_dim": 8}, "shared_mlp_dim=8"),
        ({"balance_bias_rate": 0.1}, "balance_bias_rate=0.1"),
    ],
)
def test_what_no_architecture_has_is_refused_by_name(changes, message):
    config = CONFIGS["mixtral"]
    with pytest.raises(ValueError, match=rf"{message}.* is in no architecture of transformers"):
        config_to_hf(dataclasses.replace(config, experts=dataclasses.replace(config.experts, **changes)))


def test_biases_without_the_clamp_are_refused_by_name():
    """gpt-oss alone has such biases, and transformers clamps to its limit, also to 0."""
    config = CONFIGS["gpt_oss"]
    with pytest.raises(ValueError, match=r"clamp=0.0.* is in no architecture of transformers .*gpt_oss is the nearest"):
        config_to_hf(dataclasses.replace(config, experts=dataclasses.replace(config.experts, clamp=0.0)))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 in config.json is not supported, None alone is"),
        ("olmoe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] in config.json is not supported"),
        ("qwen3_moe", {"mlp_only_layers": 0.5}, "mlp_only_layers=0.5 in config.json must be a list of numbers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 in config.json must be at least 1"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha=1.5 in config.json is not supported, 1.702 alone is"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "swiglu_limit=0.0 in config.json must be positive"),
        ("mixtral", {"num_experts_per_tok": None}, "num_experts_per_tok=None in config.json must be a whole number"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(config_to_hf(CONFIGS[kind]) | changes)


@pytest.mark.parametrize(
    ("changes", "dense", "first", "period"),
    [
        ({"mlp_only_layers": [0]}, [0], 1, 1),
        ({"decoder_sparse_step": 2}, [0, 2, 4], 0, 2),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, [0, 1, 2, 3, 4], 0, 6),
    ],
)
def test_some_layers_of_a_qwen_have_no_experts(changes, dense, first, period):
    """It comes out as the list, whatever it came in as, and the dense layers have the model's own width."""
    there = config_to_hf(CONFIGS["qwen3_moe"]) | {"num_hidden_layers": 6, "intermediate_size": 28} | changes
    config = config_from_hf(there)
    assert [number for number, layer in enumerate(config.layers) if layer.feed_forward == "dense"] == dense
    assert (len(config.first_layers), config.period) == (first, period)
    back = config_to_hf(dataclasses.replace(config, experts=dataclasses.replace(config.experts, balance_loss=0.1)))
    assert back == there | {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    names = named(config)
    own = {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert {name for name in names if ".0.mlp." in name} == own
    assert names["model.layers.0.mlp.gate_proj.weight"][0].shape_there == (28, 12)
