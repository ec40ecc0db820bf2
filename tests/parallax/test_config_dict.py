"""Configs to JSON and back, and what a file may not say."""

import json

import pytest

from parallax.config import PRESETS, TINY_CONFIG, OptimizerConfig, TrainConfig, TransformerConfig
from parallax.config_dict import config_from_dict, config_to_dict
from tests.configs import random_config


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
    ],
    ids=["unknown", "several", "nested", "rule"],
)
def test_what_a_file_may_not_say(values, message):
    with pytest.raises(ValueError, match=message) as raised:
        config_from_dict(values)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("config", [TrainConfig(reduction="exact", z_loss=0.0), OptimizerConfig(beta1=0.5)])
def test_settings_survive_json(config):
    assert type(config)(**json.loads(json.dumps(config_to_dict(config)))) == config
