"""Hugging Face folders of small models with random weights, made by transformers."""

import copy
import json

import numpy as np

from tests.parallax.interop.tokenizers import byte_level

FAMILIES = ("llama", "smollm", "mistral", "qwen2", "qwen3")


def random_values(family, seed):
    """The arguments of a small config of that family, every switch thrown at random."""
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    groups = int(rng.integers(1, 4))
    heads = groups * int(rng.integers(1, 4))
    head_dim = 2 * int(rng.integers(2, 9))
    values = {
        "vocab_size": 300 + int(rng.integers(0, 20)),
        "hidden_size": heads * 4 * int(rng.integers(2, 6)),
        "intermediate_size": int(rng.integers(20, 90)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 256,
        "rms_norm_eps": float(rng.choice([1e-5, 1e-6])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "rope_parameters": random_rope(rng),
    }
    if family in ("llama", "qwen3"):
        values |= {"head_dim": head_dim, "attention_bias": bool(rng.integers(2))}
    if family == "mistral":
        values |= {"head_dim": head_dim, "sliding_window": [None, 5, 40][rng.integers(3)]}
    if family in ("qwen2", "qwen3") and rng.integers(2):
        values |= {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
    if family == "smollm":
        values |= {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    return values


def random_rope(rng):
    theta = float(rng.choice([1e4, 5e5, 1e6]))
    longer = {"factor": float(rng.choice([2, 4, 8])), "original_max_position_embeddings": 32}
    return {
        "rope_theta": theta,
        **[
            {"rope_type": "default"},
            {"rope_type": "linear", "factor": longer["factor"]},
            {"rope_type": "llama3", **longer, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            {"rope_type": "yarn", **longer},
            {"rope_type": "yarn", **longer, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
            {"rope_type": "yarn", **longer, "mscale": 1.0, "mscale_all_dim": 0.5},
        ][rng.integers(6)],
    }


def make_model(family, values, seed, dtype="float32"):
    """A model of transformers in float32, whose weights are rounded to dtype."""
    import torch
    import transformers

    name = {"smollm": "Llama", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{name}Config")(
        **values, bos_token_id=None, eos_token_id=None, attn_implementation="eager"
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            fresh = 1 + 0.3 * noise if "norm" in name else 0.1 * noise
            weight.copy_(fresh.to(getattr(torch, dtype)))
    return model


def save(model, folder, dtype="float32", max_shard_size="50GB"):
    """Writes it as transformers does, with a tokenizer whose ids the model has."""
    import torch

    # A copy: the rotary frequencies, which are no weights, would be rounded too.
    rounded = copy.deepcopy(model).to(getattr(torch, dtype))
    rounded.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text(json.dumps(byte_level()[0]))
