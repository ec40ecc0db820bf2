"""A model at other sizes: narrower and less deep by one factor, so that one law holds for all of them.

Invariant: what is not a size stays, and with it the width of a head; the target is a member of its own family.
"""

import dataclasses
import functools

import jax

from parallax.config import TransformerConfig
from parallax.model.flops import forward_flops
from parallax.model.transformer import parameters
from parallax.parametrization import Parametrization

LEAST_LAYERS = 2


def at_share(target: TransformerConfig, share: float) -> TransformerConfig:
    """The target with all widths and its depth times this share, rounded to what a model can have.

    A head stays as wide as it is, so a width is that of whole heads where the target's is.
    """
    if share == 1:
        return target
    groups = max(1, round(target.num_kv_heads * share))
    heads = groups * max(1, round(target.num_heads * share / groups))
    a_head = target.embed_dim / target.num_heads
    width = round(a_head * heads)
    share = width / target.embed_dim
    experts = target.experts
    experts = dataclasses.replace(
        experts, mlp_dim=_part(experts.mlp_dim, share), shared_mlp_dim=_part(experts.shared_mlp_dim, share)
    )
    least = min(target.num_layers, max(LEAST_LAYERS, len(target.first_layers) + target.period))
    return dataclasses.replace(
        target,
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=groups,
        mlp_dim=_part(target.mlp_dim, share),
        num_layers=max(least, round(target.num_layers * share)),
        experts=experts,
    )


def _part(size: int, share: float) -> int:
    """A multiple of 8, and 0 of 0."""
    return max(8, 8 * round(size * share / 8)) if size else 0


def below(target: TransformerConfig, count: int, largest: float) -> list[TransformerConfig]:
    """So many sizes, the largest at this share of the target's width, each about √2 as wide as the one before it.

    Raises ValueError if the target is too small to have so many below it.
    """
    shares = [largest * 2 ** (-number / 2) for number in range(count)]
    found = {config.embed_dim: config for config in (at_share(target, share) for share in reversed(shares))}
    if len(found) < count:
        rule = f"{count} sizes below {target.num_heads} heads of {target.head_dim} must differ, and {len(found)} do"
        raise ValueError(f"{rule}; choose a larger --config, fewer --sizes or a larger --largest")
    return list(found.values())


def with_mup(config: TransformerConfig, base: TransformerConfig) -> TransformerConfig:
    """The config in µP whose base is another member of the family."""
    own = Parametrization(kind="mup", base_width=base.embed_dim, base_depth=base.num_layers)
    return dataclasses.replace(config, parametrization=own)


@functools.lru_cache(maxsize=256)
def size_of(config: TransformerConfig) -> int:
    """N: parameters that a token uses, embedding tables aside."""
    tables = sum(each.size for each in jax.tree.leaves(parameters(config)) if "vocab" in each.names)
    return config.num_params(active=True) - tables


@functools.lru_cache(maxsize=256)
def flops_of(config: TransformerConfig, seq_len: int) -> float:
    """Operations of training for a token, by our own count; the backward pass costs twice the forward pass."""
    return 3 * forward_flops(config, seq_len)
