"""What each architecture of transformers has of its own: fields of a TransformerConfig, entries of a config.json.

Invariant: an entry that a config.json leaves out has the value that transformers gives it.
"""

import dataclasses
from collections.abc import Callable, Sequence

from parallax.config import LayerSpec, TransformerConfig
from parallax.interop.experts import dense_layers, experts_from_hf, experts_to_hf
from parallax.interop.hf_rope import LIMIT, rope_from_hf, rope_to_hf
from parallax.interop.hf_values import Values, flag, number, whole_number

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture."""

    architecture: str
    """The class of transformers."""
    read: Callable[[Values], Values]
    """From a config.json the fields of a TransformerConfig that others have not, or find elsewhere."""
    write: Callable[[TransformerConfig], Values] | None
    """The entries that say so; None where another architecture says the same."""
    defaults: Values = dataclasses.field(default_factory=dict)
    """What stands for entries that are missing."""
    whole_heads: bool = True
    """Whether transformers takes no width but multiples of the number of heads."""


def _llama(values: Values) -> Values:
    biased = flag(values, "attention_bias")
    return {"attention_bias": biased, "attention_out_bias": biased}


def _mistral(values: Values) -> Values:
    return _windows(values, [True] * _depth(values))


def _qwen2(values: Values) -> Values:
    return {"attention_bias": True} | _qwen_windows(values)


def _qwen3(values: Values) -> Values:
    return {"qk_norm": True} | _llama(values) | _qwen_windows(values)


def _mixtral(values: Values) -> Values:
    return {"experts": experts_from_hf(values)} | _mistral(values)


def _qwen3_moe(values: Values) -> Values:
    windowed = _windows(values, [True] * _depth(values)) if flag(values, "use_sliding_window") else {}
    layers = _layers([LayerSpec(feed_forward="dense") if dense else LayerSpec() for dense in dense_layers(values)])
    return {"experts": experts_from_hf(values), "qk_norm": True} | _llama(values) | windowed | layers


def _olmoe(values: Values) -> Values:
    return {"experts": experts_from_hf(values), "qk_norm": True, "qk_norm_over": "heads"} | _llama(values)


def _gpt_oss(values: Values) -> Values:
    windows = _windows(values, _sliding(values, [number % 2 == 0 for number in range(_depth(values))]))
    return {"experts": experts_from_hf(values), "attention_sinks": True} | _llama(values) | windows


def _qwen_windows(values: Values) -> Values:
    if not values.get("use_sliding_window", False):
        return {}
    depth, first = _depth(values), whole_number(values, "max_window_layers")
    return _windows(values, _sliding(values, [number >= first for number in range(depth)]))


def _phi3(values: Values) -> Values:
    _, scaling = rope_from_hf(values)
    if scaling.kind != "none":
        raise ValueError(
            f"rope_type={scaling.kind!r} of a phi3 in config.json is read as longrope by transformers, which is not "
            "supported; convert a model without it"
        )
    return _windows(values, [True] * _depth(values))


def _olmo2(values: Values) -> Values:
    return {"norms": "after", "qk_norm": True, "qk_norm_over": "heads"} | _llama(values)


def _gemma2(values: Values) -> Values:
    depth = _depth(values)
    return _gemma(values) | _windows(values, _sliding(values, [number % 2 == 0 for number in range(depth)]))


def _gemma3(values: Values) -> Values:
    if values.get("attn_logit_softcapping"):
        raise ValueError(
            f"attn_logit_softcapping={values['attn_logit_softcapping']} of a gemma3_text in config.json is ignored by "
            "transformers, and by no other reader; convert a model where it is null"
        )
    period = whole_number(values, "sliding_window_pattern")
    sliding = _sliding(values, [(number + 1) % period != 0 for number in range(_depth(values))])
    (theta, scaling), local = _gemma3_rope(values, FULL), _gemma3_rope(values, SLIDING)
    # It says how long a text may be once its global layers are scaled.
    fields = {"rope_theta": theta, "rope_scaling": scaling, "max_seq_len": whole_number(values, LIMIT), "qk_norm": True}
    own = LayerSpec(rope_theta=local[0], rope_scaling=local[1])
    return _gemma(values) | fields | _windows(values, sliding, own)


def _gemma3_rope(values: Values, of: str):
    """(theta, scaling) of its global or of its local layers, in either spelling."""
    own = (values.get("rope_parameters") or {}).get(of) or {}
    if of == FULL:
        older = {"rope_theta": values.get("rope_theta") or 1e6, "rope_scaling": values.get("rope_scaling")}
    else:
        older = {"rope_theta": values.get("rope_local_base_freq") or 1e4}
    return rope_from_hf({LIMIT: values.get(LIMIT)} | older | ({"rope_parameters": own} if own else {}))


def _gemma(values: Values) -> Values:
    if values["hidden_activation"] != "gelu_pytorch_tanh":
        raise ValueError(
            f"hidden_activation={values['hidden_activation']!r} in config.json must be gelu_pytorch_tanh; "
            "convert another model"
        )
    if flag(values, "use_bidirectional_attention"):
        raise ValueError(
            "use_bidirectional_attention=true in config.json is not supported; convert a model that generates text"
        )
    scalar = number(values, "query_pre_attn_scalar")
    return {
        "norms": "both",
        "activation": "gelu_tanh",
        "embedding_scale": whole_number(values, "hidden_size") ** 0.5,
        "attention_scale": 0.0 if scalar == whole_number(values, "head_dim") else scalar**-0.5,
        "attention_softcap": number(values, "attn_logit_softcapping") if values["attn_logit_softcapping"] else 0.0,
        "logit_softcap": number(values, "final_logit_softcapping") if values["final_logit_softcapping"] else 0.0,
    } | _llama(values)


def _depth(values: Values) -> int:
    return whole_number(values, "num_hidden_layers")


def _sliding(values: Values, default: Sequence[bool]) -> list[bool]:
    """Which layers have the window."""
    types = values.get("layer_types")
    if types is None:
        return list(default)
    if not isinstance(types, list):
        raise ValueError("layer_types in config.json must be a list; restore the model's file")
    if len(types) != len(default) or not {SLIDING, FULL}.issuperset(map(str, types)):
        raise ValueError(
            f"layer_types in config.json must say {SLIDING} or {FULL} of each of {len(default)} layers; "
            "convert a model of these kinds of layers"
        )
    return [kind == SLIDING for kind in types]


def _windows(values: Values, sliding: Sequence[bool], own: LayerSpec = LayerSpec()) -> Values:
    """Fields for layers of which some have the window, and differ from the others in what is their `own` too."""
    if values.get("sliding_window") is None:
        return {}
    local = dataclasses.replace(own, sliding_window=whole_number(values, "sliding_window"))
    if not any(sliding):
        return {}
    if all(sliding):
        return local.given()
    return _layers([local if windowed else LayerSpec() for windowed in sliding])


def _layers(specs: Sequence[LayerSpec]) -> Values:
    """The first layers and the pattern that these layers are, as short as can be; neither where all are the model's."""
    depth = len(specs)
    first, period = next(
        (first, length - first)
        for length in range(1, depth + 1)
        for first in range(length)
        if all(specs[n] == specs[n + length - first] for n in range(first, depth + first - length))
    )
    found = {"first_layers": tuple(specs[:first]), "pattern": tuple(specs[first : first + period])}
    return found if any(spec.given() for spec in specs) else {}


def _biases(config: TransformerConfig) -> Values:
    return {"attention_bias": config.attention_bias}


def _window_of(config: TransformerConfig) -> int | None:
    """The widest window of its layers, or None; no single window stands for layers that differ."""
    return max(layer.sliding_window for layer in config.layers) or None


def _layer_types(config: TransformerConfig) -> list[str]:
    return [SLIDING if layer.sliding_window else FULL for layer in config.layers]


def _write_mistral(config: TransformerConfig) -> Values:
    return {"sliding_window": _window_of(config)}


def _write_mixtral(config: TransformerConfig) -> Values:
    return experts_to_hf(config, "mixtral") | _write_mistral(config)


def _write_qwen3_moe(config: TransformerConfig) -> Values:
    window = _window_of(config)
    windows = {"use_sliding_window": window is not None, "sliding_window": window}
    return experts_to_hf(config, "qwen3_moe") | _biases(config) | windows


def _write_gpt_oss(config: TransformerConfig) -> Values:
    windows = {"sliding_window": _window_of(config), "layer_types": _layer_types(config)}
    return experts_to_hf(config, "gpt_oss") | _biases(config) | windows


def _write_qwen2(config: TransformerConfig) -> Values:
    window, types = _window_of(config), _layer_types(config)
    # All layers from max_window_layers on look back no further, unless each says for itself.
    values = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    return values | ({"layer_types": types} if len(set(types)) > 1 else {})


def _write_gemma(config: TransformerConfig) -> Values:
    scale = config.attention_scale
    return _biases(config) | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scale**-2) if scale else config.head_dim,
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
        "sliding_window": _window_of(config) or 4096,
        "layer_types": _layer_types(config),
    }


def _write_gemma3(config: TransformerConfig) -> Values:
    far, near = ([layer for layer in config.layers if bool(layer.sliding_window) == local] for local in (False, True))
    rope = rope_to_hf(far[0].rope_theta, far[0].rope_scaling) if far else {}
    local = {"rope_local_base_freq": near[0].rope_theta} if near else {}
    return _write_gemma(config) | {"attn_logit_softcapping": None} | rope | local


_WINDOW = {"sliding_window": 4096}
_QWEN = _WINDOW | {"max_window_layers": 28}
_GEMMA = _WINDOW | {
    "head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip
_GEMMA_2 = _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GPT_OSS = {"head_dim": 64, "rms_norm_eps": 1e-5, "attention_bias": True, "sliding_window": 128}
_UNGROUPED = {"num_key_value_heads": None}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, _biases, _UNGROUPED),
    "mistral": Family("MistralForCausalLM", _mistral, _write_mistral, _WINDOW, whole_heads=False),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _write_qwen2, _QWEN, whole_heads=False),
    "qwen3": Family(
        "Qwen3ForCausalLM", _qwen3, lambda config: _biases(config) | _write_qwen2(config), _QWEN | {"head_dim": 128},
        whole_heads=False,
    ),
    "phi3": Family("Phi3ForCausalLM", _phi3, None, _UNGROUPED | {"rms_norm_eps": 1e-5, "sliding_window": None}),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, _biases, _UNGROUPED | {"rms_norm_eps": 1e-5}, whole_heads=False),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, _write_gemma, _GEMMA_2),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3, _write_gemma3, _GEMMA | {"sliding_window_pattern": 6}),
    "mixtral": Family("MixtralForCausalLM", _mixtral, _write_mixtral, {"rms_norm_eps": 1e-5}, whole_heads=False),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, _write_qwen3_moe, whole_heads=False),
    "olmoe": Family(
        "OlmoeForCausalLM", _olmoe, lambda config: experts_to_hf(config, "olmoe") | _biases(config),
        _UNGROUPED | {"rms_norm_eps": 1e-5},
    ),
    "gpt_oss": Family("GptOssForCausalLM", _gpt_oss, _write_gpt_oss, _GPT_OSS, whole_heads=False),
}  # fmt: skip
"""By model_type, the plainest first. SmolLM and SmolLM 2 are llama; Phi 4 is phi3."""
