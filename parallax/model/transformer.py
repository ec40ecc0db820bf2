"""The decoder-only language model.

Invariant: a pure function of parameters, tokens and dropout key. NNX says what the parameters are; they live outside,
as a nested dict of arrays, and plain JAX transforms what is computed with them.
"""

import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from parallax.axes import describe
from parallax.config import TransformerConfig
from parallax.layers.cache import KVCache
from parallax.layers.dropout import dropout, split
from parallax.layers.embedding import Embedding
from parallax.layers.normalization import RMSNorm
from parallax.model.stack import LayerStack, Params, is_listed, listed_blocks, stacked_blocks


class TransformerLM(nnx.Module):
    """Embedding, N blocks stacked along a leading dim or listed, final norm, output embedding."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, listed: bool = False):
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        self.blocks = (listed_blocks if listed else stacked_blocks)(config, rngs)
        self.final_norm = RMSNorm(config.embed_dim, "embed", eps=config.norm_eps, rngs=rngs)
        if not config.tie_embeddings:
            self.output = Embedding(config, "output", rngs=rngs)

    @classmethod
    def from_params(cls, config: TransformerConfig, params: Params) -> "TransformerLM":
        """The model around parameters, prepared or not; build it inside the function that is traced."""
        graph, abstract = _abstract(config, is_listed(params))
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
    ) -> tuple[jax.Array, KVCache | None]:
        """Token ids [B, T] to float32 logits [B, T, V], and the cache with these tokens in it.

        Args:
          tokens_BT: ids in [0, V).
          positions: [B, T], needed with a cache; by default 0 … T-1.
          segments: [B, T]; tokens attend within their own segment.
          cache: earlier tokens, from `empty_cache`; a token is written to the slot of its position.
          dropout_key: one, or one a row [B], which alone decides what is dropped of it; without one nothing is.

        Raises:
          ValueError: a cache without positions, or with segments.
        """
        x_BTD, cache = self.hidden(tokens_BT, positions, segments, cache, dropout_key)
        return self.unembed(x_BTD)[..., : self.config.vocab_size], cache

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
        dropout_key: jax.Array | None = None,
        table_WD: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """`__call__` up to the final norm: [B, T, D], so that a loss can take the logits a chunk at a time.

        `table_WD` is the input embedding where it was read already.
        """
        if cache is not None and positions is None:
            raise ValueError("positions=None says not which slots of the cache to write; give positions [B, T]")
        if cache is not None and segments is not None:
            raise ValueError("a cache does not separate segments; give one document a row, without segments")
        keys = None
        if dropout_key is not None and self.config.dropout_rate:
            keys = self._layer_keys(dropout_key, tokens_BT.shape[0])
        x_BTD = self.embedding.embed(tokens_BT, table_WD)
        x_BTD = dropout(x_BTD, self.config.dropout_rate, None if keys is None else keys[-1])
        stack, layer_keys = LayerStack(self.config, self.blocks), None if keys is None else keys[:-1]
        x_BTD, cache = stack.fold(x_BTD, cache, positions, segments, layer_keys)
        return self.final_norm(x_BTD), cache

    def _layer_keys(self, key: jax.Array, num_rows: int) -> jax.Array:
        """[N + 1, B] from one key or one a row; the last are for what stands before the blocks."""
        keys_B = key if key.ndim else split(key, num_rows)
        return split(keys_B, self.config.num_layers + 1).T

    def empty_cache(self, batch_size: int, capacity: int) -> KVCache:
        """A cache for rows of up to `capacity` tokens, laid out as the blocks are."""
        return KVCache.create(self.config, batch_size, capacity, listed=isinstance(self.blocks, nnx.List))

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


def parameters(config: TransformerConfig) -> Params:
    """The tree of `init_params` with an `axes.Parameter` for each array; raises ValueError as `axes.describe`."""
    _, abstract = _abstract(config, False)
    return nnx.to_pure_dict(jax.tree.map(describe, abstract, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def param_axes(config: TransformerConfig) -> Params:
    """The tree of `init_params` with a PartitionSpec of logical axis names for each array."""
    return jax.tree.map(lambda parameter: PartitionSpec(*parameter.names), parameters(config))


@functools.lru_cache(maxsize=8)
def _abstract(config: TransformerConfig, listed: bool) -> tuple[Any, nnx.State]:
    """Structure and abstract parameters of a model, without computing anything."""
    model = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0), listed=listed))
    return nnx.split(model)
