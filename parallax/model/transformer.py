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

from parallax import mup
from parallax.axes import Parameter, describe, is_bound
from parallax.config import TransformerConfig
from parallax.layers.cache import KVCache
from parallax.layers.dropout import dropout, split
from parallax.layers.embedding import Embedding
from parallax.layers.lora import freeze
from parallax.layers.normalization import RMSNorm
from parallax.model.stack import Aux, LayerStack, Params, is_listed, listed_blocks, stacked_blocks


class TransformerLM(nnx.Module):
    """Embedding, N blocks stacked along a leading dim or listed, final norm, output embedding."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, listed: bool = False):
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        self.blocks = (listed_blocks if listed else stacked_blocks)(config, rngs)
        multiplier = mup.output_multiplier(config) if config.tie_embeddings else 1.0
        self.final_norm = RMSNorm(config.embed_dim, "embed", eps=config.norm_eps, rngs=rngs, multiplier=multiplier)
        if not config.tie_embeddings:
            self.output = Embedding(config, "output", rngs=rngs)
        if config.lora.rank:
            freeze(self, config.lora)

    @classmethod
    def from_params(cls, config: TransformerConfig, params: Params) -> "TransformerLM":
        """The model around parameters, prepared or not; build it inside the function that is traced.

        Raises ValueError for parameters of another config.
        """
        graph, abstract = _abstract(config, is_listed(params))
        _check_params(nnx.to_pure_dict(abstract), params)
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
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Token ids [B, T] to float32 logits [B, T, V], and the cache with these tokens in it.

        Args:
          tokens_BT: ids in [0, V). Another id, which no shape shows, makes its row NaN.
          positions: [B, T], or [1, T] for all rows; needed with a cache, by default 0 … T-1. One beyond the cache makes
            its row NaN too, and is not written.
          segments: [B, T]; tokens attend within their own segment.
          cache: earlier tokens, from `empty_cache`; a token is written to the slot of its position.
          dropout_key: one, or one a row [B], which alone decides what is dropped of it; without one nothing is.
          lengths: [B], where these are the first tokens of rows in a cache: those behind so many are padding, which
            would take the slots of a window from the tokens before it.

        Raises:
          ValueError: more tokens than max_seq_len or the cache has room for, a cache without positions, with segments
            or of another model, or shapes that do not belong together.
        """
        x_BTD, cache, _ = self.hidden(tokens_BT, positions, segments, cache, dropout_key, lengths)
        return self.unembed(x_BTD)[..., : self.config.vocab_size], cache

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
        dropout_key: jax.Array | None = None,
        lengths: jax.Array | None = None,
        table_WD: jax.Array | None = None,
        counted_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None, Aux]:
        """`__call__` up to the final norm: [B, T, D], so that a loss can take the logits a chunk at a time.

        With it comes what layers report of the tokens in `counted_BT`, by default all, as `LayerStack.fold` gives it.
        `table_WD` is the input embedding where it was read already.
        """
        self._check_shapes(tokens_BT, positions, segments, cache)
        known_BT = (tokens_BT >= 0) & (tokens_BT < self.config.vocab_size)
        if cache is not None and positions is not None:
            known_BT = known_BT & (positions >= 0) & (positions < cache.capacity)
        tokens_BT = jnp.where(known_BT, tokens_BT, self.config.table_rows)  # beyond the table is NaN
        keys = None
        if dropout_key is not None and (self.config.dropout_rate or self.config.lora.dropout):
            keys = self._layer_keys(dropout_key, tokens_BT.shape[0])
        x_BTD = self.embedding.embed(tokens_BT, table_WD)
        x_BTD = dropout(x_BTD, self.config.dropout_rate, None if keys is None else keys[-1])
        stack, layer_keys = LayerStack(self.config, self.blocks), None if keys is None else keys[:-1]
        x_BTD, cache, aux = stack.fold(x_BTD, cache, positions, segments, layer_keys, lengths, counted_BT)
        return self.final_norm(x_BTD), cache, aux

    def _layer_keys(self, key: jax.Array, num_rows: int) -> jax.Array:
        """[N + 1, B] from one key or one a row; the last are for what stands before the blocks."""
        keys_B = key if key.ndim else split(key, num_rows)
        return split(keys_B, self.config.num_layers + 1).T

    def _check_shapes(
        self, tokens_BT: jax.Array, positions: jax.Array | None, segments: jax.Array | None, cache: KVCache | None
    ) -> None:
        if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
            raise ValueError(
                f"tokens={tokens_BT.dtype}{list(tokens_BT.shape)} must be integers [B, T]; give ids, a row a text"
            )
        B, T = tokens_BT.shape
        most = self.config.max_seq_len
        if cache is None and most < T:
            raise ValueError(f"{T} tokens must not exceed max_seq_len={most}; give {most}, or set max_seq_len={T}")
        if positions is not None and positions.shape not in ((B, T), (1, T)):
            raise ValueError(f"positions={list(positions.shape)} must be {[B, T]} or {[1, T]}; give one a token")
        if segments is not None and segments.shape != (B, T):
            raise ValueError(f"segments={list(segments.shape)} must be {[B, T]}; give one a token")
        if cache is not None:
            self._check_cache(cache, B, T)
            if positions is None:
                raise ValueError("positions=None says not which slots of the cache to write; give positions [B, T]")
            if segments is not None:
                raise ValueError("a cache does not separate segments; give one document a row, without segments")

    def _check_cache(self, cache: KVCache, rows: int, length: int) -> None:
        own = jax.eval_shape(lambda: self.empty_cache(rows, cache.capacity, cache.ahead))
        given, own = (
            [(x.shape, str(x.dtype)) for x in jax.tree.leaves((each.keys, each.values))] for each in (cache, own)
        )
        if given != own:
            raise ValueError(
                f"cache of {len(given)} arrays {given[0]} must be of {len(own)} arrays {own[0]}; "
                f"make it with empty_cache({rows}, …) of this model"
            )
        if length > cache.capacity:
            raise ValueError(
                f"{length} tokens must not exceed the {cache.capacity} of the cache; make it larger, or give fewer"
            )

    def empty_cache(self, batch_size: int, capacity: int, ahead: int = 0) -> KVCache:
        """A cache for rows of up to `capacity` tokens, `ahead` of which may be taken back, laid out as the blocks."""
        return KVCache.create(self.config, batch_size, capacity, ahead, listed=isinstance(self.blocks, nnx.List))

    @property
    def head(self) -> Embedding:
        """The output embedding, which may be the input embedding."""
        return self.embedding if self.config.tie_embeddings else self.output

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to float32 logits [B, T, W], of which those from V on are masked."""
        return self.head.unembed(x_BTD)


def init_params(config: TransformerConfig, key: jax.Array) -> Params:
    """Fresh parameters, a nested dict of arrays, float32 unless frozen; layers share a leading dim N."""
    return nnx.to_pure_dict(nnx.state(TransformerLM(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def parameters(config: TransformerConfig) -> Params:
    """The tree of `init_params` with an `axes.Parameter` for each array; raises ValueError as `axes.describe`."""
    _, abstract = _abstract(config, False)

    def known(variable: nnx.Variable) -> Parameter:
        return mup.with_rates(config, describe(variable))

    return nnx.to_pure_dict(jax.tree.map(known, abstract, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def param_axes(config: TransformerConfig) -> Params:
    """The tree of `init_params` with a PartitionSpec of logical axis names for each array."""
    return jax.tree.map(lambda parameter: PartitionSpec(*parameter.names), parameters(config))


def _check_params(expected: Params, given: Params) -> None:
    """Raises ValueError where arrays are missing, left over or, if they are whole, of other shapes."""
    shapes, own = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (given, expected))
    )
    remedy = "give those that init_params makes of this config"
    if differing := sorted(shapes.keys() ^ own.keys()):
        raise ValueError(f"params {'lack' if differing[0] in own else 'hold'} {differing[0]}; {remedy}")
    for name, shape in own.items():
        if shapes[name] != shape and not is_bound():
            raise ValueError(f"params/{name} of {list(shapes[name])} must be {list(shape)}; {remedy}")


@functools.lru_cache(maxsize=8)
def _abstract(config: TransformerConfig, listed: bool) -> tuple[Any, nnx.State]:
    """Structure and abstract parameters of a model, without computing anything."""
    model = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0), listed=listed))
    return nnx.split(model)
