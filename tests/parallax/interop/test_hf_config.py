"""config.json in and out: what is read of it, what is written, and what no model here computes."""

import dataclasses
import math

import pytest

from parallax.config import PRESETS, LayerSpec, RopeScaling, TransformerConfig
from parallax.interop.hf_config import config_from_hf, config_to_hf
from parallax.interop.hf_rope import rope_from_hf
from parallax.layers.rotary import magnitude
from tests.configs import random_config
from tests.parallax.interop.folders import SMALL

LLAMA_3_2_1B = {  # as it is published
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
GEMMA_3 = {**SMALL, "model_type": "gemma3_text"}
QWEN = {**SMALL, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9}
FULL, LOCAL = LayerSpec(), LayerSpec(sliding_window=9)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"type": "linear", "factor": 2.0}
EXPORTED = (
    *("dropout_rate", "attention", "remat", "dtype", "logit_softcap", "norms", "activation", "qk_norm_over"),
    *("attention_softcap", "attention_sinks", "embedding_scale", "pattern"),
)


def test_a_published_config_is_the_preset():
    expected = dataclasses.replace(PRESETS["llama-1b"], max_seq_len=131072)
    assert config_from_hf(LLAMA_3_2_1B) == expected


def test_what_llama_2_leaves_out_has_its_defaults():
    values = {name: SMALL[name] for name in SMALL if name not in ("head_dim", "num_key_value_heads")}
    config = config_from_hf(values)
    assert (config.head_dim, config.num_kv_heads, config.norm_eps, config.rope_theta) == (6, 8, 1e-6, 1e4)
    assert not config.tie_embeddings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "qwen2"}, {"attention_bias": True, "attention_out_bias": False, "qk_norm": False}),
        ({"model_type": "qwen3"}, {"attention_bias": False, "attention_out_bias": False, "qk_norm": True}),
        ({"attention_bias": True}, {"attention_bias": True, "attention_out_bias": True}),
        ({"model_type": "qwen3", "head_dim": None}, {"head_dim": 128}),
        ({"model_type": "mistral", "num_key_value_heads": None}, {"num_kv_heads": 8}),
        ({"model_type": "qwen3", "num_key_value_heads": None}, {"num_kv_heads": 8}),
        ({"model_type": "mistral"}, {"sliding_window": 4096}),
        ({"model_type": "mistral", "sliding_window": None}, {"sliding_window": 0}),
        ({"model_type": "mistral", "sliding_window": 7}, {"sliding_window": 7}),
        ({**QWEN, "max_window_layers": 0}, {"sliding_window": 9}),
        ({**QWEN, "max_window_layers": 3}, {"sliding_window": 0}),
        ({**QWEN, "max_window_layers": 1}, {"first_layers": (FULL,), "pattern": (LOCAL,)}),
        ({"model_type": "phi3"}, {"sliding_window": 0, "norm_eps": 1e-5}),
        ({"model_type": "olmo2"}, {"norms": "after", "qk_norm": True, "qk_norm_over": "heads", "norm_eps": 1e-5}),
        ({"model_type": "gemma2", "sliding_window": 9}, {"pattern": (LOCAL, FULL), "attention_softcap": 50.0}),
        ({**GEMMA_3, "sliding_window_pattern": 2}, {"qk_norm": True, "rope_theta": 1e6, "logit_softcap": 0.0}),
        ({**GEMMA_3, "query_pre_attn_scalar": 8}, {"attention_scale": 0.0, "embedding_scale": 48**0.5}),
        ({**QWEN, "use_sliding_window": False, "max_window_layers": 0}, {"sliding_window": 0}),
        ({**QWEN, "max_window_layers": 9, "layer_types": ["sliding_attention"] * 3}, {"sliding_window": 9}),
    ],
)
def test_what_an_architecture_means(changes, expected):
    config = config_from_hf({**SMALL, **changes})
    assert {name: getattr(config, name) for name in expected} == expected


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("limit", "rope", "expected"),
    [
        (4096, None, 4096),
        (4096, {"type": "linear", "factor": 2.0}, 8192),  # Vicuna 1.5
        (4096, {"type": "linear", "factor": 2.5}, 10240),
        (16384, {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        (32768, {**YARN, "original_max_position_embeddings": 32768}, 131072),  # Qwen 2.5
        (40960, {**YARN, "original_max_position_embeddings": 32768}, 131072),  # Qwen 3
        (163840, {**YARN, "factor": 40.0, "original_max_position_embeddings": 4096}, 163840),  # DeepSeek
        (200000, {**YARN, "original_max_position_embeddings": 32768}, 200000),
        (32768, {"type": "yarn", "factor": 4.0}, 131072),  # its first length is the one given
        (131072, {"type": "yarn", "factor": None, "original_max_position_embeddings": 32768}, 131072),
        (131072, {**LLAMA3, "original_max_position_embeddings": 8192}, 131072),  # Llama 3.1: 8 × 8192 is less,
        (131072, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, 131072),  # 3.2: and 32 is more
        (8192, {**LLAMA3, "original_max_position_embeddings": 8192}, 65536),
    ],
)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_a_model_reaches_what_its_scaling_is_for(limit, rope, expected, spelling):
    values = {**SMALL, "max_position_embeddings": limit, spelling: rope}
    config = config_from_hf(values)
    assert config.max_seq_len == expected
    assert config_from_hf(config_to_hf(config)).max_seq_len == expected


def test_the_first_length_may_stand_beside_the_rope():
    values = {**SMALL, "max_position_embeddings": 64, "rope_scaling": {**YARN, "original_max_position_embeddings": 16}}
    assert config_from_hf({**values, "original_max_position_embeddings": 32}).max_seq_len == 128


@pytest.mark.parametrize("seed", range(60))
def test_what_goes_out_comes_in_again(seed):
    plain = {name: getattr(TransformerConfig(), name) for name in EXPORTED}
    config = dataclasses.replace(random_config(seed), **plain)
    odd = config.embed_dim % config.num_heads
    if config.attention_out_bias != config.attention_bias or config.sliding_window or odd:
        config = dataclasses.replace(config, attention_bias=False, attention_out_bias=False)
    values = config_to_hf(config)
    assert config_from_hf(values) == dataclasses.replace(config, rope_scaling=_as_written(config.rope_scaling))


def _as_written(scaling: RopeScaling) -> RopeScaling:
    """What no scaling of its kind uses takes its default; yarn's factor is written out."""
    read = {"none": (), "linear": ("factor",), "llama3": ("factor", "original_max_seq_len")}
    if scaling.kind != "yarn":
        return RopeScaling(kind=scaling.kind, **{name: getattr(scaling, name) for name in read[scaling.kind]})
    return dataclasses.replace(scaling, attention_factor=magnitude(scaling))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma"},
            "model_type='gemma' in config.json is not one of llama, mistral, qwen2, qwen3, phi3, olmo2, ",
        ),
        ({"model_type": None}, "model_type=None in config.json is not one of"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' in config.json must be silu"),
        ({"mlp_bias": True}, "mlp_bias=true in config.json is not supported;"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not read; take"),
        ({"hidden_size": None}, "hidden_size=None in config.json must be a whole number;"),
        ({"model_type": "qwen2", "num_key_value_heads": "8"}, "num_key_value_heads='8' in config.json must"),
        ({"model_type": ["llama"]}, "model_type=['llama'] in config.json is not one of"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None in config.json must be a number;"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf in config.json must be a number;"),
        ({**QWEN, "layer_types": 3}, "layer_types in config.json must be a list;"),
        ({**QWEN, "sliding_window": "9"}, "sliding_window='9' in config.json must be a whole number;"),
        ({"head_dim": None, "hidden_size": 50}, "hidden_size=50 in config.json must be divisible by"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 must divide num_heads=8"),
        ({**QWEN, "layer_types": ["sliding_attention"]}, "layer_types in config.json must say sliding_attention or"),
        (
            {**QWEN, "layer_types": ["chunked_attention"] * 3},
            "layer_types in config.json must say sliding_attention or",
        ),
        ({"model_type": "phi3", "rope_scaling": LINEAR}, "rope_type='linear' of a phi3 in config.json is read as"),
        ({**GEMMA_3, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 of a gemma3_text"),
        ({**GEMMA_3, "use_bidirectional_attention": True}, "use_bidirectional_attention=true in config.json is not"),
        ({**GEMMA_3, "hidden_activation": "silu"}, "hidden_activation='silu' in config.json must be gelu_pytorch_tanh"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, message, refused):
    with refused(message, "; "):
        config_from_hf({**SMALL, **changes})


def test_a_family_without_a_number_of_groups_has_one_of_its_own():
    values = {name: SMALL[name] for name in SMALL if name != "num_key_value_heads"}
    with pytest.raises(ValueError, match=r"num_key_value_heads=None in config\.json must be a whole number;"):
        config_from_hf({**values, "model_type": "mistral"})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"logit_softcap": 30.0}, "logit_softcap=30.0"),
        ({"attention_out_bias": True}, "attention_out_bias=True"),
        ({"attention_bias": True, "qk_norm": True}, "qk_norm=True"),
        ({"attention_bias": True, "attention_out_bias": True, "sliding_window": 5}, "sliding_window=5"),
    ],
)
def test_what_no_architecture_has_is_not_exported(changes, field, refused):
    with refused(field, "; train with"):
        config_to_hf(TransformerConfig(**changes))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "llama"),
        ({"sliding_window": 5}, "mistral"),
        ({"embed_dim": 130}, "mistral"),  # transformers wants whole heads of a llama's width
        ({"attention_bias": True}, "qwen2"),
        ({"attention_bias": True, "attention_out_bias": True}, "llama"),
        ({"qk_norm": True}, "qwen3"),
    ],
)
def test_the_plainest_architecture_is_chosen(changes, kind):
    assert config_to_hf(TransformerConfig(**changes))["model_type"] == kind


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (1e4, RopeScaling())),
        ({"rope_theta": 5e5, "rope_scaling": None}, (5e5, RopeScaling())),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, (5e5, RopeScaling())),
        (  # as transformers: rope_scaling stands for all of rope_parameters
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_scaling": LINEAR},
            (1e4, RopeScaling(kind="linear", factor=2.0)),
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}},
            (1e6, RopeScaling(kind="linear", factor=2.0)),
        ),
        ({"rope_scaling": YARN}, (1e4, RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=32))),
        (
            {"rope_scaling": {**YARN, "truncate": False}},
            (1e4, RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=32, whole_ends=False)),
        ),
        (
            {"max_position_embeddings": 128, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            (1e4, RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=128)),
        ),
        (
            {"max_position_embeddings": 128, "rope_scaling": {**YARN, "factor": None}},
            (1e4, RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=32)),
        ),
        (
            {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.2}},
            (
                1e4,
                RopeScaling(
                    kind="yarn",
                    factor=4.0,
                    original_max_seq_len=32,
                    beta_fast=16.0,
                    beta_slow=2.0,
                    attention_factor=1.2,
                ),
            ),
        ),
    ],
)
def test_both_spellings_of_the_rope_are_read(values, expected):
    assert rope_from_hf(values) == expected


def test_the_factor_of_attention_follows_from_what_is_given():
    """Of deepseek's two scales, their quotient; else the paper's."""
    plain = rope_from_hf({"rope_scaling": YARN})[1]
    assert magnitude(plain) == pytest.approx(0.1 * math.log(4) + 1)
    _, scaling = rope_from_hf({"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}})
    assert magnitude(scaling) == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' in config.json is not"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor=None in config.json must be a number"),
        ({"rope_scaling": {**YARN, "rope_type": "llama3"}}, "low_freq_factor=None in config.json must be a number"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "original_max_position_embeddings=None in config.json must be a whole number",
        ),
        ({"rope_scaling": [8.0]}, "rope_scaling=[8.0] in config.json must be an object"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' in config.json must be a number"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "full_attention in the rope of config.json is for some layers alone",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 in config.json must be 1"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor=0.5 must be at least 1"),
    ],
)
def test_a_rope_that_is_not_known_is_refused(values, message, refused):
    with refused(message, "; "):
        rope_from_hf(values)
