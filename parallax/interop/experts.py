"""The experts of Mixtral, Qwen 3 MoE, OLMoE and gpt-oss: their part of a config.json, and their tensors.

Invariant: what tensors are called follows from what a config computes.
"""

from parallax.config import ExpertsConfig, TransformerConfig
from parallax.interop.hf_values import Values, flag, number, whole_number
from parallax.layers.moe import SLOPE

CLAMP = 7.0
"""The limit of gpt-oss's activation where a config.json gives none."""

Parts = tuple[tuple[int, ...], ...]

_VECTOR: Parts = ((0,),)
_MATRIX: Parts = ((1,), (0,))
_AS_HERE: Parts = ((0,), (1,), (2,))
Names = dict[str, tuple[str, Parts]]
_MIXTRAL: Names = {
    "router": ("block_sparse_moe.gate.weight", _MATRIX),
    "gate": ("block_sparse_moe.experts.{}.w1.weight", _MATRIX),
    "up": ("block_sparse_moe.experts.{}.w3.weight", _MATRIX),
    "down": ("block_sparse_moe.experts.{}.w2.weight", _MATRIX),
}
_QWEN3_MOE: Names = {
    "router": ("mlp.gate.weight", _MATRIX),
    "gate": ("mlp.experts.{}.gate_proj.weight", _MATRIX),
    "up": ("mlp.experts.{}.up_proj.weight", _MATRIX),
    "down": ("mlp.experts.{}.down_proj.weight", _MATRIX),
}
_GPT_OSS: Names = {
    "router": ("mlp.router.weight", _MATRIX),
    "router_bias": ("mlp.router.bias", _VECTOR),
    "gate": ("mlp.experts.gate_up_proj", _AS_HERE),
    "up": ("mlp.experts.gate_up_proj", _AS_HERE),
    "gate_bias": ("mlp.experts.gate_up_proj_bias", _AS_HERE[:2]),
    "up_bias": ("mlp.experts.gate_up_proj_bias", _AS_HERE[:2]),
    "down": ("mlp.experts.down_proj", _AS_HERE),
    "down_bias": ("mlp.experts.down_proj_bias", _AS_HERE[:2]),
}
"""By parameter: its tensor within a layer, and of which dims of one it is made. Gate and up of gpt-oss take turns."""


def expert_names(config: TransformerConfig) -> Names:
    """By the path of a parameter within its block, as `llama.NAMES`; OLMoE's are those of Qwen 3 MoE."""
    if not config.experts.num_experts:
        return {}
    names = _GPT_OSS if config.experts.bias else _QWEN3_MOE if config.qk_norm else _MIXTRAL
    return {f"mlp/{path}": (f"model.layers.{{}}.{name}", parts) for path, (name, parts) in names.items()}


def experts_from_hf(values: Values) -> ExpertsConfig:
    """The experts of a config.json.

    Losses of the router are left at 0: they change no logits, and transformers adds them only where it is asked for
    router logits. Raises ValueError if a number is missing, or the experts compute what these cannot.
    """
    kind = values["model_type"]
    all_layers = {"decoder_sparse_step": 1, "mlp_only_layers": []} if kind != "qwen3_moe" else {}
    for name, plain in {"clip_qkv": None, "swiglu_alpha": SLOPE, **all_layers}.items():
        found = values.get(name)
        if found is not None and found != plain:
            raise ValueError(
                f"{name}={found!r} in config.json is not supported, {plain!r} alone is; convert another model"
            )
    # transformers writes the one name or the other.
    count = "num_local_experts" if values.get("num_local_experts") is not None else "num_experts"
    return ExpertsConfig(
        num_experts=whole_number(values, count),
        experts_per_token=whole_number(values, "num_experts_per_tok"),
        mlp_dim=whole_number(values, "moe_intermediate_size") if kind == "qwen3_moe" else 0,
        renormalize=kind in ("mixtral", "gpt_oss") or flag(values, "norm_topk_prob"),
        bias=kind == "gpt_oss",
        clamp=_clamp(values) if kind == "gpt_oss" else 0.0,
    )


def experts_to_hf(config: TransformerConfig, kind: str) -> Values:
    """The entries of a config.json for the experts of a model_type."""
    experts = config.experts
    values: Values = {"num_experts_per_tok": experts.experts_per_token, "output_router_logits": False}
    if kind in ("mixtral", "gpt_oss"):
        values["num_local_experts"] = experts.num_experts
    else:
        values |= {"num_experts": experts.num_experts, "norm_topk_prob": experts.renormalize}
    if kind == "gpt_oss":
        # There is no other activation there, and 0 is a limit: a model without a clamp is refused for the difference.
        values |= {"swiglu_limit": experts.clamp or CLAMP, "swiglu_alpha": SLOPE}
    if kind == "qwen3_moe":
        dense = [number for number, layer in enumerate(config.layers) if layer.feed_forward == "dense"]
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": dense, "moe_intermediate_size": config.expert_dim}
    else:
        values["intermediate_size"] = config.expert_dim
    return values


def dense_layers(values: Values) -> list[bool]:
    """Which layers of a Qwen 3 MoE have one network for all tokens: those that it lists, and all but each `step`-th."""
    depth, only = whole_number(values, "num_hidden_layers"), values.get("mlp_only_layers") or []
    step = 1 if values.get("decoder_sparse_step") is None else whole_number(values, "decoder_sparse_step")
    if step < 1:
        raise ValueError(f"decoder_sparse_step={step} in config.json must be at least 1; restore the model's file")
    if not isinstance(only, list) or not all(type(each) is int for each in only):
        raise ValueError(f"mlp_only_layers={only!r} in config.json must be a list of numbers; restore the model's file")
    return [number in only or (number + 1) % step != 0 for number in range(depth)]


def _clamp(values: Values) -> float:
    limit = number(values, "swiglu_limit", CLAMP)
    if limit <= 0:
        raise ValueError(
            f"swiglu_limit={limit} in config.json must be positive, since transformers clamps to it whatever it is; "
            "restore the model's file"
        )
    return limit
