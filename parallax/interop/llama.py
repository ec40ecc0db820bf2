"""The tensors of Llama, Mistral and Qwen models, by their Hugging Face names.

Invariant: every parameter of a config is one tensor in all, or one a layer, and every such tensor is a parameter.
"""

from collections.abc import Mapping

from parallax.config import TransformerConfig
from parallax.interop.tensor import Tensor

VECTOR = ((0,),)
TABLE = ((0,), (1,))
MATRIX = ((1,), (0,))
INTO_HEADS = ((1, 2), (0,))
OUT_OF_HEADS = ((2,), (0, 1))
HEADS = ((0, 1),)


def tensors(config: TransformerConfig) -> list[Tensor]:
    """One entry for each parameter of the config. Tables have V rows, without their padding."""
    D = config.embed_dim
    top = [
        Tensor(("embedding", "table"), "model.embed_tokens.weight", (config.vocab_size, D), TABLE),
        *(
            Tensor(("blocks", *path.split("/")), f"model.layers.{{}}.{name}", shape, parts)
            for path, name, shape, parts in _of_a_layer(config)
        ),
        Tensor(("final_norm", "scale"), "model.norm.weight", (D,), VECTOR),
    ]
    if not config.tie_embeddings:
        top.append(Tensor(("output", "table"), "lm_head.weight", (config.vocab_size, D), TABLE))
    return top


def _of_a_layer(config: TransformerConfig) -> list[tuple[str, str, tuple, tuple]]:
    """(path here, name there, shape here, parts) of each tensor."""
    D, F, K = config.embed_dim, config.mlp_dim, config.head_dim
    heads = {"query": config.num_heads, "key": config.num_kv_heads, "value": config.num_kv_heads}
    found: list[tuple[str, str, tuple, tuple]] = [
        ("attention_norm/scale", "input_layernorm.weight", (D,), VECTOR)
    ]
    for name, count in heads.items():
        projection = f"self_attn.{name[0]}_proj"
        found.append((f"attention/{name}", f"{projection}.weight", (D, count, K), INTO_HEADS))
        if config.attention_bias:
            found.append((f"attention/{name}_bias", f"{projection}.bias", (count, K), HEADS))
    found.append(("attention/out", "self_attn.o_proj.weight", (config.num_heads, K, D), OUT_OF_HEADS))
    if config.attention_out_bias:
        found.append(("attention/out_bias", "self_attn.o_proj.bias", (D,), VECTOR))
    if config.qk_norm:
        found.append(("attention/query_norm/scale", "self_attn.q_norm.weight", (K,), VECTOR))
        found.append(("attention/key_norm/scale", "self_attn.k_norm.weight", (K,), VECTOR))
    return [
        *found,
        ("mlp_norm/scale", "post_attention_layernorm.weight", (D,), VECTOR),
        ("mlp/gate", "mlp.gate_proj.weight", (D, F), MATRIX),
        ("mlp/up", "mlp.up_proj.weight", (D, F), MATRIX),
        ("mlp/down", "mlp.down_proj.weight", (F, D), MATRIX),
    ]


def named(config: TransformerConfig) -> Mapping[str, tuple[Tensor, int | None]]:
    """Every tensor of the files by its full name, with its layer, in the order of a forward pass."""
    first, *rest = tensors(config)
    layered = {
        entry.name.format(layer): (entry, layer)
        for layer in range(config.num_layers)
        for entry in rest
        if entry.is_stacked
    }
    return {first.name: (first, None)} | layered | {e.name: (e, None) for e in rest if not e.is_stacked}
