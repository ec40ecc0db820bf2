"""The blocks of a model, one after another.

Invariant: the residual stream is only added to. Scanned over their stacked weights or gone through as a list, blocks
compute the same but for rounding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parallax import mup
from parallax.axes import constrain
from parallax.config import TransformerConfig
from parallax.cpu import lists_layers
from parallax.layers.attention import Attention
from parallax.layers.cache import KVCache, LayerCache
from parallax.layers.dropout import dropout, split
from parallax.layers.feedforward import GatedFeedForward
from parallax.layers.moe import Experts
from parallax.layers.normalization import RMSNorm
from parallax.pattern import Stack, loops, stacks

Aux = dict[str, jax.Array]
"""What a block reports beside its result: float32 arrays by name, or nothing."""


def feed_forward(config: TransformerConfig, *, rngs: nnx.Rngs) -> GatedFeedForward | Experts:
    """The feed-forward of a layer, which takes [B, T, D] to [B, T, D] and what it reports of the counted tokens."""
    return (Experts if config.feed_forward == "experts" else GatedFeedForward)(config, rngs=rngs)


class TransformerBlock(nnx.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)): pre-norm (Xiong et al. 2020, arXiv:2002.04745).

    Or x + norm(attention(x)), as OLMo 2 (arXiv:2501.00656, section 3.2), or both norms, as Gemma 2 (arXiv:2408.00118).
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout_rate
        norm = functools.partial(RMSNorm, config.embed_dim, "embed", eps=config.norm_eps, rngs=rngs)
        before, after = config.norms != "after", config.norms != "before"
        self.attention_norm = norm() if before else None
        self.attention = Attention(config, rngs=rngs)
        added = functools.partial(norm, multiplier=mup.branch_multiplier(config))
        self.attention_post_norm = added() if after else None
        self.mlp_norm = norm() if before else None
        self.mlp = feed_forward(config, rngs=rngs)
        self.mlp_post_norm = added() if after else None

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: LayerCache | None = None,
        dropout_keys_B: jax.Array | None = None,
        lengths_B: jax.Array | None = None,
        counted_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None, Aux]:
        """[B, T, D] to [B, T, D], the cache with these tokens in it, and what the feed-forward reports."""
        keys = (None, None, None) if dropout_keys_B is None else split(dropout_keys_B, 3).T
        normed_BTD = _normed(self.attention_norm, x_BTD)
        attended_BTD, cache = self.attention(normed_BTD, positions_BT, segments_BT, cache, keys[0], lengths_B)
        x_BTD = x_BTD + dropout(_normed(self.attention_post_norm, attended_BTD), self.dropout_rate, keys[1])
        fed_BTD, aux = self.mlp(_normed(self.mlp_norm, x_BTD), counted_BT, dropout_keys_B)
        x_BTD = x_BTD + dropout(_normed(self.mlp_post_norm, fed_BTD), self.dropout_rate, keys[2])
        return constrain(x_BTD, "batch", "length", "act_embed"), cache, aux


def _normed(norm: RMSNorm | None, x_BTD: jax.Array) -> jax.Array:
    return x_BTD if norm is None else norm(x_BTD)


Params = dict[str, Any]

REMAT_POLICIES = {
    # All but gathered parameters: a device that kept them for the backward pass would hold the whole model (ZeRO-3).
    "none": lambda primitive, *_, **__: primitive.name != "all_gather",
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stacked_blocks(config: TransformerConfig, rngs: nnx.Rngs) -> TransformerBlock | nnx.Dict:
    """A block for each stack, whose parameters have a leading dim, "layers"; by name where there are several stacks."""
    of_layers = rngs.split(config.num_layers)

    def made(stack: Stack) -> TransformerBlock:
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def block(rngs: nnx.Rngs) -> TransformerBlock:
            return TransformerBlock(stack.config, rngs=rngs)

        return block(of_layers if not stack.name else _taken(of_layers, stack.numbers))

    first, *others = stacks(config)
    return nnx.Dict({stack.name: made(stack) for stack in (first, *others)}) if others else made(first)


def _taken(rngs: nnx.Rngs, numbers: range) -> nnx.Rngs:
    """Those of some layers, so that a layer begins with the same weights however layers are stacked."""
    graph, state = nnx.split(rngs)
    return nnx.merge(graph, jax.tree.map(lambda x: x[numbers.start : numbers.stop : numbers.step], state))


def listed_blocks(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.List:
    """N blocks."""
    return nnx.List([TransformerBlock(layer, rngs=rngs) for layer in config.layers])


class LayerStack:
    """What `stacked_blocks` or `listed_blocks` made, as a function of activations."""

    def __init__(self, config: TransformerConfig, blocks: TransformerBlock | nnx.Dict | nnx.List):
        self._config, self.listed = config, isinstance(blocks, nnx.List)
        if isinstance(blocks, nnx.List):
            parts = list(zip(range(config.num_layers), config.layers, blocks, strict=True))
        else:
            parts = [(stack.name, stack.config, stack.of(blocks)) for stack in stacks(config)]
        self._weights: dict[int | str, nnx.State] = {}
        self._graphs: dict[TransformerConfig, Any] = {}
        for part, layer, block in parts:
            self._graphs[layer], self._weights[part] = nnx.split(block)

    def fold(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None = None,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        dropout_keys_NB: jax.Array | None = None,
        lengths_B: jax.Array | None = None,
        counted_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None, Aux]:
        """[B, T, D] through all blocks, and the cache, laid out as they are, with these tokens in it.

        `lengths_B` is for `LayerCache.extend`. What blocks report comes with a leading dim for those layers that report
        it, in their order.
        """

        def apply(config: TransformerConfig, weights: nnx.State, x_BTD: jax.Array, view: Any, keys_B: jax.Array | None):
            return nnx.merge(self._graphs[config], weights)(
                *(x_BTD, positions_BT, segments_BT, view, keys_B, lengths_B, counted_BT)
            )

        if self.listed:
            apply = jax.jit(apply, static_argnums=0)  # layers of one config are traced once

        def block(stack: Stack, carry: tuple, layer: tuple) -> tuple[tuple, Aux]:
            (x_BTD, cache), (weights, number, keys_B) = carry, layer
            view = None if cache is None else cache.layer(number, stack.name)
            x_BTD, view, aux = apply(stack.config, weights, x_BTD, view, keys_B)
            return (x_BTD, None if cache is None else cache.with_layer(number, view, stack.name)), aux

        def keys_of(numbers: range) -> jax.Array | None:
            return None if dropout_keys_NB is None else dropout_keys_NB[numbers.start : numbers.stop : numbers.step]

        carry, reports = (x_BTD, cache), []
        if self.listed:
            for number, config in enumerate(self._config.layers):
                alone = Stack("", config, range(number, number + 1))
                keys_1B = keys_of(alone.numbers)
                layer = self._weights[number], number, None if keys_1B is None else keys_1B[0]
                carry, aux = block(alone, carry, layer)
                reports.append((alone.numbers, jax.tree.map(lambda x: x[None], aux)))
            x_BTD, cache = carry
            return x_BTD, cache, _in_order(reports)
        if cache is None:
            policy = REMAT_POLICIES[self._config.remat]
            block = jax.checkpoint(block, policy=policy, prevent_cse=False, static_argnums=0)
        unroll = cache is None and self._config.layer_loop == "unroll"
        for loop in loops(self._config):

            def turn(carry: tuple, layers: tuple, loop: tuple[Stack, ...] = loop) -> tuple[tuple, list[Aux]]:
                found = []
                for stack, layer in zip(loop, layers, strict=True):
                    carry, aux = block(stack, carry, layer)
                    found.append(aux)
                return carry, found

            turns = tuple((self._weights[s.name], jnp.arange(len(s.numbers)), keys_of(s.numbers)) for s in loop)
            carry, found = jax.lax.scan(turn, carry, turns, unroll=unroll)
            reports += [(stack.numbers, aux) for stack, aux in zip(loop, found, strict=True)]
        x_BTD, cache = carry
        return x_BTD, cache, _in_order(reports)


def _in_order(reports: list[tuple[range, Aux]]) -> Aux:
    """What the layers of each range report, as one array a name in the order of the layers."""
    joined = {}
    for name in {name: None for _, aux in reports for name in aux}:
        ranges, arrays = zip(*((numbers, aux[name]) for numbers, aux in reports if name in aux), strict=True)
        order = np.argsort(np.concatenate(ranges))
        joined[name] = arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)[order]
    return joined


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
    return params | {"blocks": list_blocks(config, params["blocks"])}


@functools.partial(jax.jit, static_argnums=0)
def list_blocks(config: TransformerConfig, blocks: Params) -> dict[int, Params]:
    """Stacked blocks, or of each stack some parameters or none, one by one."""
    return {
        number: jax.tree.map(lambda x, n=n: x[n], stack.of(blocks))
        for stack in stacks(config)
        if not stack.name or stack.name in blocks
        for n, number in enumerate(stack.numbers)
    }
