"""The rotary entries of a config.json, in both spellings."""

import math

import pytest

from parallax.interop.hf_rope import rope_from_hf
from parallax.layers.rotary import magnitude
from parallax.rope_scaling import RopeScaling

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

LINEAR = {"type": "linear", "factor": 2.0}


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
def test_both_spellings_are_read(values, expected):
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
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type='dynamic' in config.json is not",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor=None in config.json must be a number"),
        (
            {"rope_scaling": {**YARN, "rope_type": "llama3"}},
            "low_freq_factor=None in config.json must be a number",
        ),
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
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate=false of yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 in config.json must be 1"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor=0.5 must be at least 1"),
    ],
)
def test_what_is_not_known_is_refused(values, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the message is compared below)
        rope_from_hf(values)
    assert message in str(refused.value)
    assert "; " in str(refused.value)
