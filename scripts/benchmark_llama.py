"""LlamaForCausalLM of `transformers` as a contender: the weights of Parallax under its names, and its generation.

Invariant: it computes what Parallax computes, by its own code and with its own cache.
"""

import time
from typing import Any

import numpy as np

from parallax.config import TransformerConfig
from scripts.benchmark_settings import MODELS, cores, prompts
from scripts.benchmark_torch import need
from scripts.benchmark_worker import Measure


def decoding(
    model: str, batch_size: int, prompt_tokens: int, new_tokens: int, weights: str
) -> tuple[dict[str, Any], Measure]:
    """Greedy generation with a cache; each of `{"units": requests}` is asked once for one token and once for all."""
    torch = need("torch")
    torch.set_num_threads(cores())
    llama = load_llama(MODELS[model], weights).eval()
    llama.generation_config.eos_token_id = None  # every row gets all of its tokens
    tokens = torch.from_numpy(prompts(MODELS[model], batch_size, prompt_tokens)).long()
    mask = torch.ones_like(tokens)

    def generate(count: int) -> Any:
        with torch.inference_mode():
            return llama.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=count,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        first = whole = 0.0
        for _ in range(request["units"]):
            start = time.perf_counter()
            generate(1)
            middle = time.perf_counter()
            generate(new_tokens)
            first, whole = first + middle - start, whole + time.perf_counter() - middle
        return {
            "seconds": first + whole,
            "first": first / request["units"],
            "whole": whole / request["units"],
        }

    return {"tokens": generate(new_tokens)[:, prompt_tokens:].tolist()}, measure


def load_llama(config: TransformerConfig, weights: str) -> Any:
    """LlamaForCausalLM of `transformers` with these weights."""
    torch, transformers = need("torch"), need("transformers")
    D = config.embed_dim
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=D,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",
        )
    )
    of = dict(np.load(weights))
    named = {"model.embed_tokens.weight": of["embedding.table"], "model.norm.weight": of["final_norm.scale"]}
    for n in range(config.num_layers):
        layer = {
            **{
                f"self_attn.{x[0]}_proj": of[f"blocks.attention.{x}"][n].reshape(D, -1).T
                for x in ("query", "key", "value")
            },
            "self_attn.o_proj": of["blocks.attention.out"][n].reshape(-1, D).T,
            **{f"mlp.{x}_proj": of[f"blocks.mlp.{x}"][n].T for x in ("gate", "up", "down")},
            "input_layernorm": of["blocks.attention_norm.scale"][n],
            "post_attention_layernorm": of["blocks.mlp_norm.scale"][n],
        }
        named |= {f"model.layers.{n}.{name}.weight": array for name, array in layer.items()}
    tensors = {name: torch.from_numpy(np.array(array, order="C")) for name, array in named.items()}
    missing, unexpected = llama.load_state_dict(tensors, strict=False)
    wrong = {*missing, *unexpected} - {"lm_head.weight"}  # tied
    if wrong:
        raise ValueError(f"this version of transformers names weights otherwise: {', '.join(sorted(wrong))}")
    return llama
