"""The blocks of a model, one after another.

Invariant: the residual stream is only added to. Scanned over their stacked weights or gone through as a list, blocks
compute the same but for rounding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from parallax.axes import constrain
from parallax.config import TransformerConfig
from parallax.cpu import lists_layers
from parallax.layers.attention import Attention
from parallax.layers.cache import KVCache, LayerCache
from parallax.layers.dropout import dropout, split
from parallax.layers.feedforward import SwiGLU
from parallax.layers.normalization import RMSNorm


class TransformerBlock(nnx.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)): pre-norm (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout_rate
        self.attention_norm = RMSNorm(config.embed_dim, "embed", eps=config.norm_eps, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, "embed", eps=config.norm_eps, rngs=rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: LayerCache | None = None,
        dropout_keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """[B, T, D] to [B, T, D], and the cache with these tokens in it."""
        keys = (None, None, None) if dropout_keys_B is None else split(dropout_keys_B, 3).T
        attended, cache = self.attention(self.attention_norm(x_BTD), positions_BT, segments_BT, cache, keys[0])
        x_BTD = x_BTD + dropout(attended, self.dropout_rate, keys[1])
        x_BTD = x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD)), self.dropout_rate, keys[2])
        return constrain(x_BTD, "batch", "length", "act_embed"), cache


Params = dict[str, Any]

REMAT_POLICIES = {
    # All but gathered parameters: a device that kept them for the backward pass would hold the whole model (ZeRO-3).
    "none": lambda primitive, *_, **__: primitive.name != "all_gather",
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stacked_blocks(config: TransformerConfig, rngs: nnx.Rngs) -> TransformerBlock:
    """One block whose parameters have a leading dim N, "layers"."""

    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def stack(rngs: nnx.Rngs) -> TransformerBlock:
        return TransformerBlock(config, rngs=rngs)

    return stack(rngs.split(config.num_layers))


def listed_blocks(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.List:
    """N blocks."""
    return nnx.List([TransformerBlock(config, rngs=rngs) for _ in range(config.num_layers)])


class LayerStack:
    """What `stacked_blocks` or `listed_blocks` made, as a function of activations."""

    def __init__(self, config: TransformerConfig, blocks: TransformerBlock | nnx.List):
        self._config, self.listed = config, isinstance(blocks, nnx.List)
        if isinstance(blocks, nnx.List):
            graphs, self._weights = zip(*(nnx.split(block) for block in blocks), strict=True)
            self._graph = graphs[0]
        else:
            self._graph, self._weights = nnx.split(blocks)

    def fold(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None = None,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        dropout_keys_NB: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """[B, T, D] through all blocks, and the cache, laid out as they are, with these tokens in it."""

        def apply(weights: nnx.State, x_BTD: jax.Array, view: Any, keys_B: jax.Array | None):
            return nnx.merge(self._graph, weights)(x_BTD, positions_BT, segments_BT, view, keys_B)

        if self.listed:
            apply = jax.jit(apply)  # traced once

        def block(carry: tuple, layer: tuple) -> tuple[tuple, None]:
            (x_BTD, cache), (weights, number, keys_B) = carry, layer
            view = None if cache is None else cache.layer(number)
            x_BTD, view = apply(weights, x_BTD, view, keys_B)
            return (x_BTD, None if cache is None else cache.with_layer(number, view)), None

        carry, depth = (x_BTD, cache), self._config.num_layers
        if self.listed:
            for number in range(depth):
                keys_B = None if dropout_keys_NB is None else dropout_keys_NB[number]
                carry, _ = block(carry, (self._weights[number], number, keys_B))
            return carry
        if cache is None:
            block = jax.checkpoint(block, policy=REMAT_POLICIES[self._config.remat], prevent_cse=False)
        unroll = cache is None and self._config.layer_loop == "unroll"
        return jax.lax.scan(block, carry, (self._weights, jnp.arange(depth), dropout_keys_NB), unroll=unroll)[0]


def is_listed(params: Params) -> bool:
    """Whether parameters hold their blocks one by one, as `prepare` may leave them."""
    return 0 in params["blocks"]


def prepare(config: TransformerConfig, params: Params) -> Params:
    """Parameters as inference reads them fastest where they are placed; a model of them computes the same.

    On a CPU the blocks of a small model are copied out of their stack, once instead of at every token. Drop the
    parameters that were given, or their blocks are held twice.
    """
    if is_listed(params) or not lists_layers(config.num_layers, params):
        return params
    return params | {"blocks": _list_blocks(params["blocks"], config.num_layers)}


@functools.partial(jax.jit, static_argnums=1)
def _list_blocks(stacked: Params, num_layers: int) -> dict[int, Params]:
    return {number: jax.tree.map(lambda x, n=number: x[n], stacked) for number in range(num_layers)}
