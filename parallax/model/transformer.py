"""The decoder-only language model.

Invariant: a pure function of parameters, tokens and dropout key. NNX says what the parameters are; they live outside,
as a nested dict of arrays, and plain JAX transforms what is computed with them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from parallax.axes import describe
from parallax.config import TransformerConfig
from parallax.layers.dropout import dropout
from parallax.layers.embedding import Embedding
from parallax.layers.normalization import RMSNorm
from parallax.model.block import TransformerBlock
from parallax.model.cache import KVCache, LayerCache

Params = dict[str, Any]

Layers = tuple[nnx.State, ...]
"""The weights of N blocks, one by one."""
UNSTACKED = 12
"""Layers that a CPU takes one by one; more are scanned, since a longer program takes longer to compile."""

REMAT_POLICIES = {
    # All but gathered parameters: a device that kept them for the way back would hold the whole model (ZeRO-3).
    "none": lambda primitive, *_, **__: primitive.name != "all_gather",
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class TransformerLM(nnx.Module):
    """Embedding, N blocks stacked along a leading dim, final norm, output embedding."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs: nnx.Rngs) -> TransformerBlock:
            return TransformerBlock(config, rngs=rngs)

        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        self.blocks = stack(rngs.split(config.num_layers))
        self.final_norm = RMSNorm(config.embed_dim, "embed", eps=config.norm_eps, rngs=rngs)
        if not config.tie_embeddings:
            self.output = Embedding(config, "output", rngs=rngs)

    @classmethod
    def from_params(cls, config: TransformerConfig, params: Params) -> "TransformerLM":
        """The model around given parameters; build it inside the function that is traced."""
        graph, abstract = _abstract(config)
        state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy, since replacing works in place
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
        dropout_key: jax.Array | None = None,
        layers: Layers | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Token ids [B, T] to float32 logits [B, T, V], and the cache with these tokens in it.

        Args:
          tokens_BT: ids in [0, V).
          positions: [B, T], needed with a cache; by default 0 … T-1.
          segments: [B, T]; tokens attend within their own segment.
          cache: earlier tokens; a token is written to the slot of its position.
          dropout_key: without one nothing is dropped.
          layers: what `unstack` gave, with an unstacked cache.

        Raises:
          ValueError: a cache without positions, or with segments.
        """
        x_BTD, cache = self.hidden(tokens_BT, positions, segments, cache, dropout_key, layers=layers)
        return self.unembed(x_BTD)[..., : self.config.vocab_size], cache

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
        dropout_key: jax.Array | None = None,
        table_WD: jax.Array | None = None,
        layers: Layers | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """`__call__` up to the final norm: [B, T, D], so that a loss can take the logits a chunk at a time.

        `table_WD` is the input embedding where it was read already.
        """
        if cache is not None and positions is None:
            raise ValueError(
                "positions=None says not which slots of the cache to write; give positions [B, T]"
            )
        if cache is not None and segments is not None:
            raise ValueError(
                "segments cannot be told apart in a cache; give one document a row, without segments"
            )
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.num_layers + 1)
        x_BTD = self.embedding.embed(tokens_BT, table_WD)
        x_BTD = dropout(x_BTD, self.config.dropout_rate, None if keys is None else keys[-1])
        x_BTD, cache = self._apply_blocks(x_BTD, cache, layers, positions, segments, keys)
        return self.final_norm(x_BTD), cache

    def _apply_blocks(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None,
        layers: Layers | None,
        positions: jax.Array | None,
        segments: jax.Array | None,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None]:
        """All N of them: scanned, or one by one where their weights and cache are given so."""
        graph, stacked = nnx.split(self.blocks)
        unroll = cache is None and self.config.layer_loop == "unroll"

        def block(carry, layer):
            x_BTD, cache = carry
            weights, number, key = layer
            view = None if cache is None else LayerCache(keys=cache.keys, values=cache.values, layer=number)
            x_BTD, view = nnx.merge(graph, weights)(x_BTD, positions, segments, view, key)
            return (x_BTD, None if view is None else KVCache(keys=view.keys, values=view.values)), None

        if cache is None:
            block = jax.checkpoint(block, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        if layers is None or cache is None:
            stacks = (stacked, jnp.arange(self.config.num_layers), None if keys is None else keys[:-1])
            return jax.lax.scan(block, (x_BTD, cache), stacks, unroll=unroll)[0]
        block, caches = jax.jit(block), []  # traced once
        for weights, keys_BGSK, values_BGSK in zip(layers, cache.keys, cache.values, strict=True):
            own = KVCache(keys=keys_BGSK, values=values_BGSK)
            (x_BTD, own), _ = block((x_BTD, own), (weights, None, None))
            caches.append(own)
        return x_BTD, KVCache(keys=tuple(x.keys for x in caches), values=tuple(x.values for x in caches))

    @property
    def head(self) -> Embedding:
        """The output embedding, which may be the input embedding."""
        return self.embedding if self.config.tie_embeddings else self.output

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to float32 logits [B, T, W], of which those from V on are masked."""
        return self.head.unembed(x_BTD)


def init_params(config: TransformerConfig, key: jax.Array) -> Params:
    """Fresh parameters, a nested dict of float32 arrays; layers share a leading dim N."""
    return nnx.to_pure_dict(nnx.state(TransformerLM(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def unstack(config: TransformerConfig, params: Params) -> Layers | None:
    """Weights layer by layer, for many calls with an unstacked cache; or None, where the stack is better.

    A CPU copies a layer out of the stack before it multiplies with it, at every token anew. Other devices read it where
    it lies and have no memory for a copy, and a deep model would take long to compile.
    """
    if jax.default_backend() != "cpu" or config.num_layers > UNSTACKED:
        return None
    _, stacked = nnx.split(TransformerLM.from_params(config, params).blocks)
    return tuple(jax.tree.map(lambda x, n=n: x[n], stacked) for n in range(config.num_layers))


def parameters(config: TransformerConfig) -> Params:
    """The tree of `init_params` with an `axes.Parameter` for each array.

    Raises:
      ValueError: a parameter was not made by `axes.param`.
    """
    _, abstract = _abstract(config)
    return nnx.to_pure_dict(
        jax.tree.map(describe, abstract, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    )


def param_axes(config: TransformerConfig) -> Params:
    """The tree of `init_params` with a PartitionSpec of logical axis names for each array."""
    return jax.tree.map(lambda parameter: PartitionSpec(*parameter.names), parameters(config))


@functools.lru_cache(maxsize=8)
def _abstract(config: TransformerConfig) -> tuple[Any, nnx.State]:
    """Structure and abstract parameters of a model, without computing anything."""
    model = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))
    return nnx.split(model)
