"""PyTorch as a contender: the model in plain torch, eager and compiled, and that of `transformers`.

Invariant: a contender begins with the weights that Parallax wrote, sees the batches that Parallax sees, and gets
the fastest settings known: all cores, fused attention, fused AdamW.
"""

import importlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallax.config import TransformerConfig
from scripts.benchmarks.settings import (
    CHECKED_STEPS,
    LEARNING,
    MODELS,
    SEED,
    Measure,
    cores,
    prompts,
    read_setting,
    samples,
)

NEEDED = {"torch": ("torch",), "torch-compiled": ("torch",), "transformers": ("torch", "transformers")}
"""Packages of each contender."""


def require(contender: str) -> None:
    """Raises ValueError where this machine lacks what a contender of NEEDED runs with."""
    for package in NEEDED[contender]:
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"contender {contender} needs {package}, which is not installed; "
                'pip install -e ".[bench]", or leave it out of --contenders'
            )
    compiler = os.environ.get("CXX", "g++")  # as torch's inductor looks for it
    if contender == "torch-compiled" and shutil.which(compiler) is None:
        raise ValueError(
            f"contender {contender} needs the C++ compiler {compiler}, which is not installed; "
            "apt-get install g++, or leave it out of --contenders"
        )


def training(setting: str, model: str, weights: str) -> tuple[dict[str, Any], Measure]:
    """Trains by `{"units": steps}`, with the weights in that folder; batches cost no more than cutting them out."""
    torch = _torch()
    shape = read_setting(setting)
    parameters, logits = _load(model, shape.model, Path(weights))
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": LEARNING.weight_decay}
    vectors = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    betas = (LEARNING.beta1, LEARNING.beta2)
    optimizer = torch.optim.AdamW([matrices, vectors], lr=LEARNING.learning_rate, betas=betas, eps=1e-8, fused=True)
    text, done = samples(shape), 0

    def loss_of(inputs, targets):
        return torch.nn.functional.cross_entropy(logits(inputs).flatten(0, 1), targets.flatten())

    if model == "torch-compiled":
        loss_of = torch.compile(loss_of)

    def step() -> Any:
        nonlocal done
        batch = text.gather(text.draw(shape.batch_size, SEED, done))
        done += 1
        inputs, targets = (torch.from_numpy(batch[name]).long() for name in ("inputs", "targets"))
        loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, LEARNING.clip_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(request["units"]):
            step()
        return {"seconds": time.perf_counter() - start}

    start = time.perf_counter()
    losses = [step().item() for _ in range(CHECKED_STEPS)]
    ready = time.perf_counter() - start
    params = sum(parameter.numel() for parameter in parameters)
    return {"params": params, "losses": losses, "first_steps_seconds": ready}, measure


def decoding(
    model: str, batch_size: int, prompt_tokens: int, new_tokens: int, weights: str
) -> tuple[dict[str, Any], Measure]:
    """Greedy generation by transformers, with a cache; each of `{"units": requests}` is asked once for one token and
    once for all."""
    torch = _torch()
    llama = _load_llama(Path(weights)).eval()
    llama.generation_config.eos_token_id = None  # every row gets all of its tokens
    tokens = torch.from_numpy(prompts(MODELS[model], batch_size, prompt_tokens)).long()
    mask = torch.ones_like(tokens)

    def generate(count: int) -> Any:
        with torch.inference_mode():
            return llama.generate(
                tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, use_cache=True, pad_token_id=0
            )

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        first = whole = 0.0
        for _ in range(request["units"]):
            start = time.perf_counter()
            generate(1)
            middle = time.perf_counter()
            generate(new_tokens)
            first, whole = first + middle - start, whole + time.perf_counter() - middle
        units = request["units"]
        return {"seconds": first + whole, "first": first / units, "whole": whole / units}

    return {"tokens": generate(new_tokens)[:, prompt_tokens:].tolist()}, measure


def _torch() -> Any:
    torch = importlib.import_module("torch")
    torch.set_num_threads(cores())
    return torch


def _load(model: str, config: TransformerConfig, weights: Path) -> tuple[list[Any], Callable[[Any], Any]]:
    """Parameters, and the function of tokens [B, T] to logits [B, T, V], of a model that has these weights."""
    if model != "transformers":
        load = importlib.import_module("safetensors.torch").load_file
        return plain(config, load(weights / "model.safetensors"))
    llama = _load_llama(weights)
    return list(llama.parameters()), lambda tokens: llama(tokens, use_cache=False).logits


def _load_llama(weights: Path) -> Any:
    kind = importlib.import_module("transformers").AutoModelForCausalLM
    llama = kind.from_pretrained(weights, attn_implementation="sdpa")
    for parameter in llama.parameters():
        parameter.data = parameter.data.clone()  # out of the mapped file
    return llama


def plain(config: TransformerConfig, weights: dict[str, Any]) -> tuple[list[Any], Callable[[Any], Any]]:
    """The model in plain torch, as nanoGPT writes it: queries, keys and values by one matmul, fused attention."""
    torch = _torch()
    F = torch.nn.functional
    H, G, K, D = config.num_heads, config.num_kv_heads, config.head_dim, config.embed_dim

    def of_layer(n: int) -> dict[str, Any]:
        def of(name: str) -> Any:
            return weights[f"model.layers.{n}.{name}.weight"]

        tensors = {
            "qkv": torch.cat([of(f"self_attn.{name}_proj") for name in "qkv"]),
            "out": of("self_attn.o_proj"),
            **{name: of(f"mlp.{name}_proj") for name in ("gate", "up", "down")},
            "norm1": of("input_layernorm"),
            "norm2": of("post_attention_layernorm"),
        }
        return {name: parameter(tensor) for name, tensor in tensors.items()}

    def parameter(tensor: Any) -> Any:
        return tensor.clone().requires_grad_()  # out of the mapped file

    table, last = (parameter(weights[f"model.{name}.weight"]) for name in ("embed_tokens", "norm"))
    layers = [of_layer(n) for n in range(config.num_layers)]

    def norm(x, scale):
        return F.rms_norm(x, (D,), scale, config.norm_eps)

    def attend(x, w, cos, sin):
        B, T, _ = x.shape
        q, k, v = F.linear(x, w["qkv"]).view(B, T, H + 2 * G, K).transpose(1, 2).split((H, G, G), dim=1)
        q, k = _rotate(torch, q, cos, sin), _rotate(torch, k, cos, sin)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=G < H)
        return F.linear(heads.transpose(1, 2).reshape(B, T, H * K), w["out"])

    def logits(tokens):
        cos, sin = _angles(torch, config, tokens.shape[1])
        x = F.embedding(tokens, table)
        for w in layers:
            x = x + attend(norm(x, w["norm1"]), w, cos, sin)
            y = norm(x, w["norm2"])
            x = x + F.linear(F.silu(F.linear(y, w["gate"])) * F.linear(y, w["up"]), w["down"])
        return F.linear(norm(x, last), table)

    return [table, last, *(tensor for w in layers for tensor in w.values())], logits


def _angles(torch: Any, config: TransformerConfig, length: int) -> tuple[Any, Any]:
    """Cosines and sines of the rotary angles, [T, K]."""
    omega = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    angle = torch.outer(torch.arange(length), omega).repeat(1, 2)
    return angle.cos(), angle.sin()


def _rotate(torch: Any, x: Any, cos: Any, sin: Any) -> Any:
    """Turns the pairs (x_i, x_{i+K/2}) of [B, H, T, K]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
