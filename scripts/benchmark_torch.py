"""PyTorch as a contender in training: the same model in plain torch, and as `transformers` has it.

Invariant: a contender begins with the weights that Parallax wrote, sees the batches that Parallax sees, and gets
the fastest settings known: all cores, fused attention, fused AdamW.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from parallax.config import TransformerConfig
from scripts.benchmark_settings import CHECKED_STEPS, LEARNING, SEED, cores, read_setting, samples
from scripts.benchmark_worker import Measure

MODELS = ("torch", "torch-compiled", "transformers")


def need(package: str) -> Any:
    """A package of the extra `bench`.

    Raises:
      ValueError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f'{package} is not installed, and is measured against; pip install -e ".[bench]", or leave it out'
        )
    return importlib.import_module(package)


def training(setting: str, model: str, weights: str) -> tuple[dict[str, Any], Measure]:
    """Trains by `{"units": steps}`, with the weights in that file; batches cost no more than cutting them out."""
    torch = need("torch")
    torch.set_num_threads(cores())
    shape = read_setting(setting)
    parameters, logits = load(model, shape.model, weights)
    optimizer = _optimizer(torch, parameters)
    text, done = samples(shape), 0

    def step() -> Any:
        nonlocal done
        batch = text.gather(text.draw(shape.batch_size, SEED, done))
        done += 1
        targets = torch.from_numpy(batch["targets"]).long()
        given = logits(torch.from_numpy(batch["inputs"]).long())
        loss = torch.nn.functional.cross_entropy(given.flatten(0, 1), targets.flatten())
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


def _optimizer(torch: Any, parameters: list[Any]) -> Any:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": LEARNING.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (LEARNING.beta1, LEARNING.beta2)
    return torch.optim.AdamW(groups, lr=LEARNING.learning_rate, betas=betas, eps=1e-8, fused=True)


def load(model: str, config: TransformerConfig, weights: str) -> tuple[list[Any], Callable[[Any], Any]]:
    """Parameters, and the function of tokens [B, T] to logits [B, T, V], of a model that has these weights."""
    if model == "transformers":
        from scripts.benchmark_llama import load_llama

        llama = load_llama(config, weights)
        return list(llama.parameters()), lambda tokens: llama(tokens, use_cache=False).logits
    parameters, logits = plain(config, dict(np.load(weights)))
    return parameters, need("torch").compile(logits) if model == "torch-compiled" else logits


def plain(
    config: TransformerConfig, weights: dict[str, np.ndarray]
) -> tuple[list[Any], Callable[[Any], Any]]:
    """The model in plain torch, as nanoGPT writes it: queries, keys and values by one product, fused attention."""
    torch = need("torch")
    F = torch.nn.functional
    H, G, K, D = config.num_heads, config.num_kv_heads, config.head_dim, config.embed_dim

    def parameter(array: np.ndarray) -> Any:
        return torch.from_numpy(np.array(array, order="C")).requires_grad_()

    def block(n: int) -> dict[str, Any]:
        of = {name.removeprefix("blocks."): array[n] for name, array in weights.items() if "blocks." in name}
        projections = [of[f"attention.{name}"].reshape(D, -1).T for name in ("query", "key", "value")]
        matrices = {
            "qkv": np.concatenate(projections),
            "out": of["attention.out"].reshape(-1, D).T,
            **{name: of[f"mlp.{name}"].T for name in ("gate", "up", "down")},
            "norm1": of["attention_norm.scale"],
            "norm2": of["mlp_norm.scale"],
        }
        return {name: parameter(array) for name, array in matrices.items()}

    table, last = parameter(weights["embedding.table"]), parameter(weights["final_norm.scale"])
    blocks = [block(n) for n in range(config.num_layers)]

    def norm(x, scale):
        return F.rms_norm(x, (D,), scale, config.norm_eps)

    def attend(x, w, cos, sin):
        B, T, _ = x.shape
        q, k, v = F.linear(x, w["qkv"]).view(B, T, H + 2 * G, K).transpose(1, 2).split((H, G, G), dim=1)
        q, k = rotate(torch, q, cos, sin), rotate(torch, k, cos, sin)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=G < H)
        return F.linear(heads.transpose(1, 2).reshape(B, T, H * K), w["out"])

    def logits(tokens):
        cos, sin = angles(torch, config, tokens.shape[1])
        x = F.embedding(tokens, table)
        for w in blocks:
            x = x + attend(norm(x, w["norm1"]), w, cos, sin)
            y = norm(x, w["norm2"])
            x = x + F.linear(F.silu(F.linear(y, w["gate"])) * F.linear(y, w["up"]), w["down"])
        return F.linear(norm(x, last), table)

    return [table, last, *(p for w in blocks for p in w.values())], logits


def angles(torch: Any, config: TransformerConfig, length: int) -> tuple[Any, Any]:
    """Cosines and sines of the rotary angles, [T, K]."""
    omega = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    angle = torch.outer(torch.arange(length), omega).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(torch: Any, x: Any, cos: Any, sin: Any) -> Any:
    """Turns the pairs (x_i, x_{i+K/2}) of [B, H, T, K]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
