"""Arithmetic of a config: the operations of its forward pass and of a training step, and the weights that these take.

Invariant: it is that of the model, as utilisation wants it, and not of how it is computed; nothing is allocated.
"""

import functools
from collections.abc import Callable

import jax

from parallax.config import TransformerConfig
from parallax.model.transformer import parameters


def forward_flops(config: TransformerConfig, seq_len: int) -> float:
    """Floating-point operations a token of one forward pass at this sequence length, in context of its own length.

    Two operations a weight of each matrix (the output table included, the input look-up not), and for each head
    2·2·K a visible key. Causal attention sees half of the keys on average (Kaplan et al. 2020, arXiv:2001.08361,
    table 1, counts all of them).
    """

    def seen(window: int) -> float:
        if not 0 < window < seq_len:
            return (seq_len + 1) / 2
        # The first `window` queries see 1 … window keys, the others see window.
        return window - window * (window - 1) / (2 * seq_len)

    a_layer = 2 * used_weights(config) + attention_flops(config, over_layers(config, seen))
    return config.num_layers * a_layer + head_flops(config)


def step_flops(config: TransformerConfig, batch_size: int, seq_len: int) -> float:
    """Floating-point operations of one training step: the backward pass costs two forward passes, one where frozen."""
    per_token = 3 * forward_flops(config, seq_len)
    if config.lora.rank:
        per_token -= 2 * config.num_layers * used_weights(config, frozen=True) + head_flops(config)
    return per_token * batch_size * seq_len


@functools.lru_cache(maxsize=64)
def block_weights(config: TransformerConfig, *, of_experts: bool = False) -> int:
    """Weights in the matrices of one block, or in its experts alone, on average."""
    matrices = [each for each in jax.tree.leaves(parameters(config)) if each.role == "hidden"]
    return sum(each.size for each in matrices if "experts" in each.names or not of_experts) // config.num_layers


@functools.lru_cache(maxsize=64)
def learned_share(config: TransformerConfig) -> float:
    """The share of all weights that have a gradient."""
    leaves = jax.tree.leaves(parameters(config))
    return sum(each.size for each in leaves if each.learned) / sum(each.size for each in leaves)


@functools.lru_cache(maxsize=64)
def used_weights(config: TransformerConfig, *, frozen: bool = False) -> float:
    """Weights that a token is multiplied with in one block, on average: the router's too, and its own experts' alone.

    With `frozen` those of them that are not learned.
    """
    share = config.experts.experts_per_token / max(1, config.experts.num_experts)
    matrices = [each for each in jax.tree.leaves(parameters(config)) if each.inputs and "vocab" not in each.names]
    matrices = [each for each in matrices if not (frozen and each.learned)]
    return sum(each.size * (share if "experts" in each.names else 1) for each in matrices) / config.num_layers


@functools.lru_cache(maxsize=64)
def table_sizes(config: TransformerConfig) -> tuple[int, ...]:
    """Weights of each table of embeddings; the last is the head."""
    return tuple(each.size for each in jax.tree.leaves(parameters(config)) if "vocab" in each.names)


def over_layers(config: TransformerConfig, keys: Callable[[int], float]) -> float:
    """The mean over layers of `keys`, which is a function of their window."""
    return sum(keys(layer.sliding_window) for layer in config.layers) / config.num_layers


def attention_flops(config: TransformerConfig, keys: float) -> float:
    """Operations a token of scores and weighted values, over that many keys."""
    return 4 * config.num_heads * config.head_dim * keys


@functools.lru_cache(maxsize=64)
def hidden_units(config: TransformerConfig, routed: float | None = None) -> float:
    """Hidden units of a layer, on average: of its one network, or of the shared one and `routed` experts.

    By default as many experts as a token goes to.
    """
    experts = config.experts
    of_experts = (experts.experts_per_token if routed is None else routed) * config.expert_dim + experts.shared_mlp_dim
    units = [of_experts if layer.feed_forward == "experts" else config.mlp_dim for layer in config.layers]
    return sum(units) / config.num_layers


def head_flops(config: TransformerConfig) -> int:
    """Operations a token of the logits."""
    return 2 * table_sizes(config)[-1]
