"""PEFT's folders of adapters: they come in as they went out, and what is not understood is named."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from parallax.config import ExpertsConfig, TransformerConfig
from parallax.interop.peft import CONFIG, WEIGHTS, read_adapters, write_adapters
from parallax.layer_config import LayerSpec, LoraConfig
from parallax.model.adapters import take_adapters, without_adapters
from parallax.model.transformer import init_params

PLAIN = TransformerConfig(
    vocab_size=16, embed_dim=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=12,
    pattern=(LayerSpec(sliding_window=4), LayerSpec()),
)  # fmt: skip
EXPERTS = dataclasses.replace(PLAIN, experts=ExpertsConfig(num_experts=4, mlp_dim=8), qk_norm=True, pattern=())


def written(folder, base, **lora):
    config = dataclasses.replace(base, lora=LoraConfig(rank=2, **lora))
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), take_adapters(shapes))
    write_adapters(adapters, config, folder)
    return config, adapters


@pytest.mark.parametrize("base", [PLAIN, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("lora", [{}, {"rslora": True, "alpha": 2.5, "dropout": 0.25, "targets": ("query", "out")}])
def test_adapters_come_in_as_they_went_out(tmp_path, base, lora):
    config, adapters = written(tmp_path, base, **lora)
    again, found = read_adapters(tmp_path, base)
    assert without_adapters(again) == base
    named = {name for path, _ in jax.tree_util.tree_leaves_with_path(adapters) for name in [path[-2].key]}
    assert set(again.lora.targets) == named
    assert again.lora.replace(targets=()) == config.lora.replace(targets=())
    jax.tree.map(np.testing.assert_array_equal, found, adapters)


def test_matrices_are_named_and_laid_out_as_of_linear_layers(tmp_path):
    from safetensors.numpy import load_file

    _, adapters = written(tmp_path, dataclasses.replace(PLAIN, pattern=()))
    there = load_file(tmp_path / WEIGHTS)
    prefix = "base_model.model.model.layers.1.self_attn"
    assert there[f"{prefix}.q_proj.lora_A.weight"].shape == (2, 8)
    assert there[f"{prefix}.k_proj.lora_B.weight"].shape == (8, 2)
    assert there[f"{prefix}.o_proj.lora_A.weight"].shape == (2, 16)
    out = adapters["blocks"]["attention"]["adapters"]["out"]
    product = there[f"{prefix}.o_proj.lora_B.weight"] @ there[f"{prefix}.o_proj.lora_A.weight"]
    ours = np.tensordot(out["down"][1], out["up"][1], 1).reshape(16, 8)
    np.testing.assert_allclose(product, ours.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"use_dora": True}, "use_dora=True .* must be False"),
        ({"peft_type": "IA3"}, "must be 'LORA'"),
        ({"rank_pattern": {"q_proj": 8}}, "must be empty"),
        ({"alora_invocation_tokens": [1, 2]}, "must be empty"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' .* changes the base too"),
        ({"r": "two"}, "r='two' .* must be a number"),
    ],
)
def test_what_computes_something_else_is_refused(tmp_path, change, rule):
    written(tmp_path, PLAIN)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=rule):
        read_adapters(tmp_path, PLAIN)


def test_adapters_of_another_base_are_refused(tmp_path):
    written(tmp_path, PLAIN)
    with pytest.raises(ValueError, match="is not of this base"):
        read_adapters(tmp_path, dataclasses.replace(PLAIN, embed_dim=16))
    with pytest.raises(ValueError, match=r"has an adapter for .*layers\.2"):
        read_adapters(tmp_path, dataclasses.replace(PLAIN, num_layers=2))
