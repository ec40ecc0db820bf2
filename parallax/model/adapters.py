"""The parameters of a model with adapters, taken apart and put together.

Invariant: what is frozen and what is learned are two trees without a leaf in common, and each is one of a checkpoint.
"""

import dataclasses

import jax
import jax.numpy as jnp

from parallax.config import TransformerConfig
from parallax.layer_config import LoraConfig
from parallax.layers.lora import ADAPTERS
from parallax.model.stack import Params, is_listed, list_blocks


def without_adapters(config: TransformerConfig) -> TransformerConfig:
    """The config of the base, which is also that of a model whose adapters are merged."""
    return dataclasses.replace(config, lora=LoraConfig())


def take_base(params: Params) -> Params:
    """The frozen parameters, as a model without adapters has them; arrays or whatever else stands for them."""
    kept = {name: take_base(each) if isinstance(each, dict) else each for name, each in params.items()}
    return {name: each for name, each in kept.items() if name != ADAPTERS}


def take_adapters(params: Params) -> Params:
    """The adapters alone, where they are in the tree."""
    found = {
        name: each if name == ADAPTERS else take_adapters(each)
        for name, each in params.items()
        if isinstance(each, dict)
    }
    return {name: each for name, each in found.items() if each}


def join(base: Params, adapters: Params) -> Params:
    """The tree that `take_base` and `take_adapters` took apart."""
    joined = {name: join(each, adapters[name]) if name in adapters else each for name, each in base.items()}
    return joined | {name: each for name, each in adapters.items() if name not in base}


def beside(config: TransformerConfig, base: Params, adapters: Params) -> Params:
    """`join` with a base that `prepare` may have left listed; its arrays are shared, not copied."""
    return join(base, {"blocks": list_blocks(config, adapters["blocks"])} if is_listed(base) else adapters)


def merge(config: TransformerConfig, params: Params) -> Params:
    """The parameters of `without_adapters(config)` that compute the same: W + s A B, rounded once to the dtype of W."""
    merged: Params = {name: merge(config, each) if isinstance(each, dict) else each for name, each in params.items()}
    for name, adapter in merged.pop(ADAPTERS, {}).items():
        merged[name] = _sum(merged[name], adapter["down"], adapter["up"], config.lora.scale)
    return merged


def _sum(weight: jax.Array, down: jax.Array, up: jax.Array, scale: float) -> jax.Array:
    """W + s A B of arrays with a leading dim of layers, computed in float32 at least."""
    wide = jnp.promote_types(weight.dtype, jnp.float32)

    def of_layer(weight: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
        low = jnp.tensordot(down.astype(wide), up.astype(wide), 1, precision=jax.lax.Precision.HIGHEST)
        return (weight.astype(wide) + scale * low).astype(weight.dtype)

    return jax.vmap(of_layer)(weight, down, up)
