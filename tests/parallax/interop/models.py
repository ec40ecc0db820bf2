"""Hugging Face folders of small models with random weights, made by transformers."""

import copy
import json

import numpy as np

from tests.parallax.interop.tokenizers import byte_level

FAMILIES = ("llama", "smollm", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3")
CLASSES = {
    "smollm": ("Llama", "Llama"),
    "gemma3_text": ("Gemma3Text", "Gemma3"),
    "qwen3_moe": ("Qwen3Moe", "Qwen3Moe"),
    "gpt_oss": ("GptOss", "GptOss"),
}
"""How those of the config and of the model begin, where that is not the family's name with a capital."""


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
        "num_hidden_layers": int(rng.integers(1, 4)),
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
        if rng.integers(2):
            values |= {"layer_types": random_layers(rng, values["num_hidden_layers"])}
    if family == "olmo2":
        values |= {"attention_bias": bool(rng.integers(2)), "num_key_value_heads": [groups, None][rng.integers(2)]}
    if family == "phi3":
        values |= {
            "rope_parameters": {"rope_type": "default", "rope_theta": 2e4},
            "sliding_window": [None, 9][seed % 2],
        }
    if family in ("gemma2", "gemma3_text"):
        values |= {
            "num_hidden_layers": int(rng.integers(2, 5)),
            "head_dim": head_dim,
            "query_pre_attn_scalar": [head_dim, 24][rng.integers(2)],
            "sliding_window": int(rng.integers(3, 30)),
            "attention_bias": bool(rng.integers(2)),
            "final_logit_softcapping": [None, 5.0][rng.integers(2)],
            "layer_types": random_layers(rng, 7) if seed == 1 else None,
        }
        values["layer_types"] = values["layer_types"] and values["layer_types"][: values["num_hidden_layers"]]
    if family == "gemma2":
        values |= {"attn_logit_softcapping": [None, 2.0][rng.integers(2)]}
    if family == "gemma3_text":
        values["rope_parameters"] = {
            "full_attention": random_rope(rng),
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
        values |= {} if values["layer_types"] else {"sliding_window_pattern": int(rng.integers(2, 4))}
    if family == "smollm":
        values |= {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    return values


def random_layers(rng, depth):
    return [str(kind) for kind in rng.choice(["sliding_attention", "full_attention"], depth)]


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
            {"rope_type": "yarn", **longer, "truncate": False},
        ][rng.integers(7)],
    }


def make_model(family, values, seed, dtype="float32", **settings):
    """A model of transformers in float32, whose weights are rounded to dtype."""
    import torch
    import transformers

    torch.set_num_threads(1)  # in matrices of this size more of them wait for one another, and burn a third of the time
    of_config, of_model = CLASSES.get(family, (family.capitalize(),) * 2)
    config = getattr(transformers, f"{of_config}Config")(
        **values, bos_token_id=None, eos_token_id=None, pad_token_id=None, attn_implementation="eager", **settings
    )
    model = getattr(transformers, f"{of_model}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            one = 0 if family.startswith("gemma") else 1  # which Gemma adds by itself
            fresh = one + 0.3 * noise if "norm" in name else 0.1 * noise
            weight.copy_(fresh.to(getattr(torch, dtype)))
    return model


def save(model, folder, dtype="float32", max_shard_size="50GB"):
    """Writes it as transformers does, with a tokenizer whose ids the model has."""
    import torch

    # A copy: the rotary frequencies, which are no weights, would be rounded too.
    rounded = copy.deepcopy(model).to(getattr(torch, dtype))
    rounded.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text(json.dumps(byte_level()[0]))
