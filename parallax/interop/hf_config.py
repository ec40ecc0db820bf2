"""The config.json of a Hugging Face folder as a TransformerConfig, and back.

Invariant: what comes in computes the same here, and what goes out the same there; a config that says what the other
side cannot compute is refused. What goes out would come in again as the same model: so its architecture is chosen.
"""

import dataclasses
from typing import Any

from parallax.config import TransformerConfig
from parallax.interop.families import FAMILIES, Family
from parallax.interop.hf_rope import EXACT_LIMIT, LIMIT, longest_from_hf, rope_from_hf, rope_to_hf
from parallax.interop.hf_values import Values, number, whole_number
from parallax.layers.rotary import frequencies, magnitude

SIZES = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}


def config_from_hf(values: Values) -> TransformerConfig:
    """The model that a config.json describes, with float32 as its compute dtype.

    Raises ValueError if the architecture is not known, a size is missing, or the model computes what this one cannot.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type={kind!r} in config.json is not one of {', '.join(FAMILIES)}; convert another model"
        )
    family = FAMILIES[kind]
    values = family.defaults | values
    _refuse_what_differs(values)
    sizes: Values = {ours: whole_number(values, theirs) for ours, theirs in SIZES.items()}
    own = family.read(values)
    if "rope_theta" not in own:
        theta, scaling = rope_from_hf(values)
        own = {"rope_theta": theta, "rope_scaling": scaling, "max_seq_len": longest_from_hf(values, scaling)} | own
    ungrouped = values.get("num_key_value_heads", 0) is None
    return TransformerConfig(
        **sizes,
        num_kv_heads=sizes["num_heads"] if ungrouped else whole_number(values, "num_key_value_heads"),
        head_dim=_head_dim(family, values, sizes),
        norm_eps=number(values, "rms_norm_eps", 1e-6),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        **own,
    )


def config_to_hf(config: TransformerConfig) -> Values:
    """The config.json of the plainest architecture that computes what `config` does.

    Raises ValueError if none does; the message names what keeps it from the nearest.
    """
    nearest: tuple[str, dict[str, Any]] | None = None
    for kind, family in FAMILIES.items():
        if family.write is None:
            continue
        values = _written(config, kind, family)
        lost = _differences(config, config_from_hf(values))
        if family.whole_heads and config.embed_dim % config.num_heads:
            lost["embed_dim"] = config.embed_dim
        if not lost:
            return values
        if nearest is None or len(lost) < len(nearest[1]):
            nearest = kind, lost
    kind, lost = nearest or ("", {})
    fields = ", ".join(f"{name}={value}" for name, value in lost.items())
    raise ValueError(
        f"{fields} is in no architecture of transformers beside the rest of this model, and {kind} is the nearest; "
        "train with what that has to export"
    )


def _written(config: TransformerConfig, kind: str, family: Family) -> Values:
    """The nearest that the family has to the config."""
    values: Values = {"architectures": [family.architecture], "model_type": kind}
    values |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    layer = config.layers[0]
    values |= {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.dropout_rate,
        LIMIT: config.max_seq_len,
        **rope_to_hf(layer.rope_theta, layer.rope_scaling),
        **(family.write(config) if family.write else {}),
    }
    if config_from_hf(values).max_seq_len != config.max_seq_len:
        values[EXACT_LIMIT] = config.max_seq_len
    return values


def _differences(config: TransformerConfig, other: TransformerConfig) -> dict[str, Any]:
    """The fields in which their layers compute differently, with their values in the first."""
    return {
        name: getattr(layer, name)
        for layer, others in zip(config.layers, other.layers, strict=True)
        for (name, own), value in zip(_computed(layer).items(), _computed(others).values(), strict=True)
        if own != value
    }


def _computed(layer: TransformerConfig) -> dict[str, Any]:
    """What its fields come to, without those that decide how it is computed and not what."""
    how = ("dropout_rate", "attention", "layer_loop", "remat", "dtype", "pattern", "first_layers")
    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer) if field.name not in how}
    if layer.feed_forward == "experts":
        losses = {"balance_loss": 0.0, "router_z_loss": 0.0}
        experts = dataclasses.replace(layer.experts, mlp_dim=layer.expert_dim, **losses)
        fields |= {"experts": experts, "mlp_dim": 0}
    else:
        fields["experts"] = None
    omega = frequencies(layer.head_dim, layer.rope_theta, layer.rope_scaling)
    return fields | {
        "attention_scale": layer.attention_scale or layer.head_dim**-0.5,
        "qk_norm_over": layer.qk_norm_over if layer.qk_norm else "head",
        "rope_scaling": (omega.tobytes(), magnitude(layer.rope_scaling)),
    }


def _refuse_what_differs(values: Values) -> None:
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish") and "hidden_activation" not in values:
        raise ValueError(
            f"hidden_act={activation!r} in config.json must be silu, which SwiGLU is made of; convert another model"
        )
    if values.get("mlp_bias"):
        raise ValueError("mlp_bias=true in config.json is not supported; convert a model without these biases")
    if values.get("quantization_config"):
        raise ValueError(
            "quantization_config in config.json: quantized weights are not read; take the bfloat16 or float32 model"
        )


def _head_dim(family: Family, values: Values, sizes: Values) -> int:
    if values.get("head_dim") is not None:
        return whole_number(values, "head_dim")
    if "head_dim" in family.defaults:
        return family.defaults["head_dim"]
    width, heads = sizes["embed_dim"], sizes["num_heads"]
    if heads < 1 or width % heads:
        raise ValueError(
            f"hidden_size={width} in config.json must be divisible by num_attention_heads={heads}, or head_dim given; "
            "restore the model's file"
        )
    return width // heads
