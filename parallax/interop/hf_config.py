"""The config.json of a Hugging Face folder as a TransformerConfig, and back.

Invariant: what comes in computes the same here, and what goes out the same there; a config that says what the other
side cannot compute is refused.
"""

from parallax.config import TransformerConfig
from parallax.interop.hf_rope import rope_from_hf, rope_to_hf
from parallax.interop.hf_values import Values, number, whole_number

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""By model_type. SmolLM and SmolLM 2 are llama."""

SIZES = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
}


def config_from_hf(values: Values) -> TransformerConfig:
    """The model that a config.json describes, with float32 as its compute dtype.

    Raises:
      ValueError: the architecture is not known, a size is missing, or the model computes what this one cannot.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"model_type={kind!r} in config.json is not one of {', '.join(ARCHITECTURES)}; convert another model"
        )
    _refuse_what_differs(values)
    sizes: Values = {ours: whole_number(values, theirs) for ours, theirs in SIZES.items()}
    heads = sizes["num_heads"]
    # Each family has a size of its own where none is given; null means no groups in all of them.
    ungrouped = values.get("num_key_value_heads", None if kind == "llama" else 0) is None
    theta, scaling = rope_from_hf(values)
    biased = bool(values.get("attention_bias", False)) and kind in ("llama", "qwen3")
    return TransformerConfig(
        **sizes,
        num_kv_heads=heads if ungrouped else whole_number(values, "num_key_value_heads"),
        head_dim=_head_dim(kind, values, sizes),
        norm_eps=number(values, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=biased or kind == "qwen2",
        attention_out_bias=biased,
        qk_norm=kind == "qwen3",
        sliding_window=_window(kind, values),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
    )


def config_to_hf(config: TransformerConfig) -> Values:
    """The config.json of the plainest architecture that computes what `config` does.

    Raises:
      ValueError: none does; the message names the field.
    """
    if config.logit_softcap:
        raise ValueError(
            f"logit_softcap={config.logit_softcap} has no place in a Llama, Mistral or Qwen config; "
            "train with --model.logit-softcap 0 to export"
        )
    kind = _architecture(config)
    values: Values = {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
    values |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    values |= {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.dropout_rate,
        **rope_to_hf(config.rope_theta, config.rope_scaling),
    }
    if kind in ("llama", "qwen3"):
        values["attention_bias"] = config.attention_bias
    window = config.sliding_window or None
    if kind == "mistral":
        values["sliding_window"] = window
    if kind in ("qwen2", "qwen3"):  # all layers from max_window_layers on look back no further
        values |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    return values


def _architecture(config: TransformerConfig) -> str:
    biases = (config.attention_bias, config.attention_out_bias)
    if config.qk_norm and biases in ((False, False), (True, True)):
        return "qwen3"
    if not config.qk_norm and biases == (True, False):
        return "qwen2"
    # transformers lets a llama have no other width than whole heads of it.
    is_llama = not config.sliding_window and config.embed_dim % config.num_heads == 0
    if not config.qk_norm and biases[0] == biases[1] and is_llama:
        return "llama"
    if not config.qk_norm and biases == (False, False):
        return "mistral"
    raise ValueError(
        f"attention_bias={biases[0]}, attention_out_bias={biases[1]}, qk_norm={config.qk_norm}, sliding_window="
        f"{config.sliding_window} and {config.num_heads} heads over embed_dim={config.embed_dim} are together in no "
        "Llama, Mistral or Qwen; train with both biases off to export"
    )


def _refuse_what_differs(values: Values) -> None:
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act={activation!r} in config.json must be silu, which SwiGLU is made of; convert another model"
        )
    if values.get("mlp_bias"):
        raise ValueError(
            "mlp_bias=true in config.json is not supported; convert a model without these biases"
        )
    if values.get("quantization_config"):
        raise ValueError(
            "quantization_config in config.json: quantized weights are not read; take the bfloat16 or float32 model"
        )


def _head_dim(kind: str, values: Values, sizes: Values) -> int:
    if values.get("head_dim") is not None:
        return whole_number(values, "head_dim")
    if kind == "qwen3":
        return 128
    width, heads = sizes["embed_dim"], sizes["num_heads"]
    if heads < 1 or width % heads:
        raise ValueError(
            f"hidden_size={width} in config.json must be divisible by num_attention_heads={heads}, or head_dim given; "
            "restore the model's file"
        )
    return width // heads


def _window(kind: str, values: Values) -> int:
    """0, or how far back every layer looks."""
    if kind == "llama":
        return 0
    window = values.get("sliding_window", 4096)
    if window is None or (kind != "mistral" and not values.get("use_sliding_window", False)):
        return 0
    window = whole_number({"sliding_window": window}, "sliding_window")
    layers = sliding = whole_number(values, "num_hidden_layers")
    if kind != "mistral" and values.get("layer_types"):  # as transformers reads them
        if not isinstance(values["layer_types"], list):
            raise ValueError("layer_types in config.json must be a list; restore the model's file")
        sliding = values["layer_types"].count("sliding_attention")
    elif kind != "mistral":
        first = whole_number({"max_window_layers": 28} | values, "max_window_layers")
        sliding = max(0, layers - max(0, first))
    if 0 < sliding < layers:
        raise ValueError(
            f"sliding_window={window} in config.json holds for {sliding} of {layers} layers and must hold for all "
            "or none; convert another model, or one with use_sliding_window false"
        )
    return window if sliding else 0
