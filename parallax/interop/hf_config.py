"""The config.json of a Hugging Face folder as a TransformerConfig, and back.

Invariant: what comes in computes the same here, and what goes out the same there; a config that says what the other
side cannot compute is refused. Both spellings of the rotary embedding are read, `rope_theta` with `rope_scaling` and
the newer `rope_parameters`; the older, which all readers know, is written.
"""

import math
from typing import Any

from parallax.config import RopeScaling, TransformerConfig
from parallax.layers.rotary import magnitude

Values = dict[str, Any]

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
}

LIMIT = "max_position_embeddings"
FIRST_LIMIT = "original_max_position_embeddings"
EXACT_LIMIT = "max_seq_len"
"""In what is exported here, where LIMIT would be read as a length that is yet to be stretched."""

ROPE_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def config_from_hf(values: Values) -> TransformerConfig:
    """The model that a config.json describes, with float32 as its compute dtype.

    Raises ValueError if the architecture is not known, a size is missing, or the model computes what this one cannot.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"model_type={kind!r} in config.json is not one of {', '.join(ARCHITECTURES)}; convert another model"
        )
    _refuse_what_differs(values)
    sizes: Values = {ours: _whole_number(values, theirs) for ours, theirs in SIZES.items()}
    heads = sizes["num_heads"]
    # Each family has a size of its own where none is given; null means no groups in all of them.
    ungrouped = values.get("num_key_value_heads", None if kind == "llama" else 0) is None
    theta, scaling = rope_from_hf(values)
    biased = bool(values.get("attention_bias", False)) and kind in ("llama", "qwen3")
    return TransformerConfig(
        **sizes,
        max_seq_len=_longest(values, scaling),
        num_kv_heads=heads if ungrouped else _whole_number(values, "num_key_value_heads"),
        head_dim=_head_dim(kind, values, sizes),
        norm_eps=_number(values, "rms_norm_eps", 1e-6),
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

    Raises ValueError if none does; the message names the field.
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
        LIMIT: config.max_seq_len,
        **rope_to_hf(config.rope_theta, config.rope_scaling),
    }
    if _longest(values, config.rope_scaling) != config.max_seq_len:
        values[EXACT_LIMIT] = config.max_seq_len
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
        raise ValueError("mlp_bias=true in config.json is not supported; convert a model without these biases")
    if values.get("quantization_config"):
        raise ValueError(
            "quantization_config in config.json: quantized weights are not read; take the bfloat16 or float32 model"
        )


def _head_dim(kind: str, values: Values, sizes: Values) -> int:
    if values.get("head_dim") is not None:
        return _whole_number(values, "head_dim")
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
    window = _whole_number({"sliding_window": window}, "sliding_window")
    layers = sliding = _whole_number(values, "num_hidden_layers")
    if kind != "mistral" and values.get("layer_types"):  # as transformers reads them
        if not isinstance(values["layer_types"], list):
            raise ValueError("layer_types in config.json must be a list; restore the model's file")
        sliding = values["layer_types"].count("sliding_attention")
    elif kind != "mistral":
        first = _whole_number({"max_window_layers": 28} | values, "max_window_layers")
        sliding = max(0, layers - max(0, first))
    if 0 < sliding < layers:
        raise ValueError(
            f"sliding_window={window} in config.json holds for {sliding} of {layers} layers and must hold for all "
            "or none; convert another model, or one with use_sliding_window false"
        )
    return window if sliding else 0


def rope_from_hf(values: Values) -> tuple[float, RopeScaling]:
    """(theta, scaling) of a config.json.

    Raises ValueError if the scaling is of another kind, lacks a number, or turns a part of each head alone.
    """
    rope, values = _rope(values), _given(values)
    for name, value in rope.items():
        if isinstance(value, dict):
            raise ValueError(
                f"{name} in the rope of config.json is for some layers alone, and all must rotate alike; "
                "convert another model"
            )
    theta = _number({"rope_theta": 10_000.0} | values | rope, "rope_theta")
    partial = ({"partial_rotary_factor": 1} | values | rope)["partial_rotary_factor"]
    if partial != 1:
        raise ValueError(
            f"partial_rotary_factor={partial} in config.json must be 1, since whole heads are rotated; "
            "convert another model"
        )
    return theta, _scaling(rope, values)


def _longest(values: Values, scaling: RopeScaling) -> int:
    """Tokens up to which the model is meant to be used: the length before scaling times the factor.

    LIMIT is the length before scaling with linear, and with yarn at most a little more (Qwen 2.5 and 3). With llama3 it
    is the length after scaling, which may be less than the factor gives: Llama 3.2 states 131,072, and not 32 × 8192.
    """
    if values.get(EXACT_LIMIT) is not None:
        return _whole_number(values, EXACT_LIMIT)
    limit = _whole_number(values, LIMIT)
    first = _first_limit(_rope(values), _given(values)) if scaling.kind != "none" else limit
    if scaling.kind == "llama3" and limit > first:
        return limit
    return max(limit, int(first * scaling.factor))


def _rope(values: Values) -> Values:
    """As transformers reads it: the older spelling, where there is one, counts alone."""
    return _given(_mapping(values, "rope_scaling") or _mapping(values, "rope_parameters"))


def _first_limit(rope: Values, values: Values) -> int:
    """The length before scaling, as transformers reads it: beside the rope, in it, or what the model takes."""
    return _whole_number({FIRST_LIMIT: values.get(LIMIT)} | rope | values, FIRST_LIMIT)


def _scaling(rope: Values, values: Values) -> RopeScaling:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise ValueError(
            f"rope_type={kind!r} in config.json is not one of {', '.join(ROPE_KINDS)}; convert a model without it"
        )
    if kind == "default":
        return RopeScaling()
    fields: Values = {"kind": ROPE_KINDS[kind]}
    if kind in ("llama3", "yarn"):
        fields["original_max_seq_len"] = _first_limit(rope, values)
    if kind == "yarn" and "factor" not in rope:
        longest = _whole_number(values, LIMIT)
        rope = rope | {"factor": longest / max(1, fields["original_max_seq_len"])}
    fields["factor"] = _number(rope, "factor")
    if kind == "llama3":
        fields |= {name: _number(rope, name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        fields |= _yarn_fields(rope)
    return RopeScaling(**fields)


def _given(values: Values) -> Values:
    """Without what is null, which stands for what is missing."""
    return {name: value for name, value in values.items() if value is not None}


def rope_to_hf(theta: float, scaling: RopeScaling) -> Values:
    """The entries of a config.json."""
    if scaling.kind == "none":
        return {"rope_theta": theta, "rope_scaling": None}
    rope: Values = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        rope[FIRST_LIMIT] = scaling.original_max_seq_len
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        rope["attention_factor"] = magnitude(scaling)
    return {"rope_theta": theta, "rope_scaling": rope}


def _yarn_fields(rope: Values) -> dict[str, float]:
    if not rope.get("truncate", True):
        raise ValueError(
            "truncate=false of yarn in config.json is not supported; convert a model whose ramp has whole ends"
        )
    factor = _number(rope, "factor")
    above, below = (_number(rope, name, 0.0) for name in ("mscale", "mscale_all_dim"))
    attention = 0.0  # the paper's
    if above and below:

        def scaled(by: float) -> float:
            return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

        attention = scaled(above) / scaled(below)
    return {
        "beta_fast": _number(rope, "beta_fast", 32.0),
        "beta_slow": _number(rope, "beta_slow", 1.0),
        "attention_factor": _number(rope, "attention_factor", attention),
    }


def _whole_number(values: Values, name: str) -> int:
    """Raises ValueError where it is missing or another kind of value."""
    found = values.get(name)
    if type(found) is not int:
        raise ValueError(f"{name}={found!r} in config.json must be a whole number; restore the model's file")
    return found


def _number(values: Values, name: str, default: float | None = None) -> float:
    """The default where it is missing. Raises ValueError where there is none, or for another kind of value."""
    found = values.get(name, default)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise ValueError(f"{name}={found!r} in config.json must be a number; restore the model's file")
    return float(found)


def _mapping(values: Values, name: str) -> Values:
    """An empty one where it is missing or null. Raises ValueError for another kind of value."""
    found = values.get(name)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{name}={found!r} in config.json must be an object; restore the model's file")
    return found or {}
