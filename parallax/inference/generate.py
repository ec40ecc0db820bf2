"""Continue prompts: prefill, then token after token, in one compiled function.

Invariant: what a row becomes depends on its own prompt, settings and seed alone. The token at position p is
drawn with fold_in(key(seed), p), so neighbours, padding and where a stream pauses change nothing.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np

from parallax.config import TransformerConfig
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings, sample
from parallax.inference.stopping import ends_with_stop
from parallax.model.cache import KVCache
from parallax.model.transformer import Layers, Params, TransformerLM, unstack

IN_HALVES = 2048
"""From so many tokens on, rows × room for answers, a CPU attends to a smaller cache in the first half of the answers.
NANO with 16 prompts and 128 tokens each takes 0.87 of the time; a second loop takes 0.4 s to compile."""


@chex.dataclass(frozen=True)
class Generation:
    """B rows under way. The cache holds a row's tokens before its last, which is fed to draw the next."""

    cache: KVCache  # unstacked where `unstack` gives layers; room for S tokens, or fewer at first
    tokens: jax.Array  # int32 [B, S]: the prompt, then what was generated
    lengths: jax.Array  # int32 [B]: tokens so far
    prompt_lengths: jax.Array  # int32 [B]
    done: jax.Array  # bool [B]: ended by eos or by a stop
    seen: jax.Array  # bool [B, V]: which tokens the row holds, for the repetition penalty
    keys: jax.Array  # [B] typed keys
    settings: SamplingSettings
    stops: jax.Array  # int32 [R, L] from pack_stops
    eos_id: jax.Array  # int32 []: -1 for none


def prefill(
    config: TransformerConfig,
    params: Params,
    layers: Layers | None,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
    settings: SamplingSettings,
    seeds_B: jax.Array,
    stops_RL: jax.Array,
    eos_id: jax.Array,
    *,
    capacity: int,
    room: int | None = None,
) -> Generation:
    """Reads prompts, right-padded to P tokens, into a cache.

    Padding needs no mask: its keys lie in the slots of their positions, later than any query of the prompt,
    and the next tokens overwrite them before anything sees them.

    Args:
      layers: what `unstack` makes of the parameters.
      tokens_BP: int32 [B, P].
      lengths_B: int32 [B], each from 1 to P.
      seeds_B: uint32 [B].
      capacity: S ≥ P, the most tokens a row can hold; static.
      room: of the cache, from P to S; by default S.
    """
    B, P = tokens_BP.shape
    positions_BP = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[None, :], (B, P))
    model = TransformerLM.from_params(config, params)
    cache = KVCache.create(config, B, P, unstacked=layers is not None)
    _, cache = model.hidden(tokens_BP, positions_BP, cache=cache, layers=layers)
    # Padding marks a token beyond the vocabulary, which is dropped.
    ids_BP = jnp.where(positions_BP < lengths_B[:, None], tokens_BP, config.vocab_size)
    seen_BV = (
        jnp.zeros((B, config.vocab_size), bool).at[jnp.arange(B)[:, None], ids_BP].set(True, mode="drop")
    )
    return Generation(
        cache=cast(KVCache, cache).grow(room or capacity),
        tokens=jnp.pad(tokens_BP, ((0, 0), (0, capacity - P))),
        lengths=lengths_B,
        prompt_lengths=lengths_B,
        done=jnp.zeros(B, bool),
        seen=seen_BV,
        keys=jax.vmap(jax.random.key)(seeds_B),
        settings=settings,
        stops=stops_RL,
        eos_id=eos_id,
    )


def start(config: TransformerConfig, params: Params, *request_and_limit: Any, capacity: int) -> Generation:
    """`prefill`, given the arrays of a request, then `extend` to a limit, int32 []."""
    *request, limit = request_and_limit
    layers = unstack(config, params)
    return extend(config, params, layers, prefill(config, params, layers, *request, capacity=capacity), limit)


def whole(
    config: TransformerConfig, params: Params, *request_and_limit: Any, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """What `start` comes to: tokens [B, S] and lengths [B]."""
    *request, limit = request_and_limit
    (B, P), layers = request[0].shape, unstack(config, params)
    # To grow takes both caches at once, for which other devices have no memory.
    halved = layers is not None and B * (capacity - P) >= IN_HALVES
    room = (P + capacity) // 2 if halved else capacity
    generation = prefill(config, params, layers, *request, capacity=capacity, room=room)
    generation = extend(config, params, layers, generation, limit)
    if room < capacity:
        generation = dataclasses.replace(generation, cache=generation.cache.grow(capacity))
        generation = extend(config, params, layers, generation, limit)
    return generation.tokens, generation.lengths


def extend(
    config: TransformerConfig,
    params: Params,
    layers: Layers | None,
    generation: Generation,
    limit: jax.Array,
) -> Generation:
    """Goes on until each row is done or has `limit` generated tokens, those of earlier calls included.

    It ends earlier where a row that is to go on has outgrown the cache, which then must `grow`.
    """

    def unfinished(generation: Generation) -> jax.Array:
        active_B, room = _active(generation, limit), generation.cache.capacity
        if room >= generation.tokens.shape[1]:
            return jnp.any(active_B)
        return jnp.any(active_B) & ~jnp.any(active_B & (generation.lengths > room))

    def step(generation: Generation) -> Generation:
        # A last token that was fed before, by the prefill or in a row at rest, writes the same keys and values; what a
        # row at rest writes beyond the cache is dropped.
        model = TransformerLM.from_params(config, params)
        positions_B1 = generation.lengths[:, None] - 1
        last_B1 = jnp.take_along_axis(generation.tokens, positions_B1, axis=1)
        logits_B1V, cache = model(last_B1, positions_B1, cache=generation.cache, layers=layers)
        return _append(
            dataclasses.replace(generation, cache=cache), logits_B1V[:, 0], _active(generation, limit)
        )

    return jax.lax.while_loop(unfinished, step, generation)


def _active(generation: Generation, limit: jax.Array) -> jax.Array:
    """Which rows take another token, bool [B]."""
    room = jnp.minimum(generation.prompt_lengths + limit, generation.tokens.shape[1])
    return ~generation.done & (generation.lengths < room)


def _append(generation: Generation, logits_BV: jax.Array, active_B: jax.Array) -> Generation:
    """Draws the next token of each active row."""
    rows, S, V = jnp.arange(len(active_B)), generation.tokens.shape[1], logits_BV.shape[1]
    token_B = sample(logits_BV, generation.settings, generation.seen, generation.keys, generation.lengths)
    # A row at rest writes beyond the end, which is dropped.
    slot_B, mark_B = jnp.where(active_B, generation.lengths, S), jnp.where(active_B, token_B, V)
    tokens = generation.tokens.at[rows, slot_B].set(token_B, mode="drop")
    lengths = generation.lengths + active_B
    stopped_B = ends_with_stop(tokens, generation.prompt_lengths, lengths, generation.stops)
    return dataclasses.replace(
        generation,
        tokens=tokens,
        lengths=lengths,
        seen=generation.seen.at[rows, mark_B].set(True, mode="drop"),
        done=generation.done | (active_B & (stopped_B | (token_B == generation.eos_id))),
    )


class Generator:
    """The compiled functions of one model shape.

    One compilation serves all requests with as many rows whose longest prompt, and that plus max_tokens, `Request`
    rounds up to the same sizes. Tokens come back as drawn: a row ends with its eos or stop.
    """

    def __init__(self, config: TransformerConfig):
        self.config = config
        self._whole = jax.jit(functools.partial(whole, config), static_argnames="capacity")
        self.start = jax.jit(functools.partial(start, config), static_argnames="capacity")
        self._unstack = jax.jit(functools.partial(unstack, config))
        self._extend = jax.jit(functools.partial(extend, config), donate_argnums=2)

    def generate(self, params: Params, request: Request) -> list[np.ndarray]:
        """The tokens that follow each prompt, int32, in one call of the device.

        Raises:
          ValueError: from `Request.arrays`.
        """
        arrays, capacity = request.arrays(self.config)
        found = self._whole(params, *arrays, np.int32(request.max_tokens), capacity=capacity)
        tokens, lengths = (np.array(x) for x in found)
        return [tokens[row, len(prompt) : lengths[row]] for row, prompt in enumerate(request.prompts)]

    def stream(self, params: Params, request: Request, chunk: int = 8) -> Iterator[tuple[int, int]]:
        """The tokens of `generate` as (row, token), one a row at once and then `chunk` a row at a time."""
        return self._stream(params, request, *request.arrays(self.config), chunk)

    def _stream(self, params: Params, request: Request, arrays: tuple, capacity: int, chunk: int):
        limit, given, layers = 1, [len(prompt) for prompt in request.prompts], None
        generation = self.start(params, *arrays, np.int32(limit), capacity=capacity)
        while True:
            # Copies: the next call reuses the buffers.
            tokens, lengths, done = (
                np.array(x) for x in (generation.tokens, generation.lengths, generation.done)
            )
            for row, token_ids in enumerate(tokens):
                yield from ((row, int(token)) for token in token_ids[given[row] : lengths[row]])
            if done.all() or limit >= request.max_tokens:
                return
            if limit == 1:  # the first token has not waited for it
                layers = self._unstack(params)
            given, limit = lengths, min(limit + chunk, request.max_tokens)
            generation = self._extend(params, layers, generation, np.int32(limit))
