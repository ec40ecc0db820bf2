"""Continue prompts: prefill, then token after token, in one compiled function.

Invariant: what a row becomes depends on its own prompt, settings and seed alone, so neighbours, padding and where a
stream pauses change nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from parallax import cpu
from parallax.config import TransformerConfig
from parallax.inference.request import Request
from parallax.inference.slots import Slots, prefill, step
from parallax.inference.stopping import ends_with_stop
from parallax.model.stack import is_listed
from parallax.model.transformer import Params, TransformerLM


@chex.dataclass(frozen=True)
class Generation:
    """Slots with their texts, and what ends these. The cache has room for S tokens, or fewer at first."""

    slots: Slots
    tokens: jax.Array  # int32 [B, S]: the prompt, then what was generated
    prompt_lengths: jax.Array  # int32 [B]
    rooms: jax.Array  # int32 [B]: how long each row may become, at most S
    done: jax.Array  # bool [B]: ended by eos or by a stop
    stops: jax.Array  # int32 [R, L] from pack_stops
    eos_id: jax.Array  # int32 []: -1 for none

    def active(self, limit: jax.Array | None = None) -> jax.Array:
        """Which rows take another token while they have fewer than `limit` generated ones, bool [B]."""
        rooms = self.rooms if limit is None else jnp.minimum(self.prompt_lengths + limit, self.rooms)
        return ~self.done & (self.slots.lengths < rooms)

    def record(self, slots: Slots, active_B: jax.Array) -> "Generation":
        """The same after active rows of its slots have taken a token."""
        S = self.tokens.shape[1]
        # A finished row writes beyond the end, which is dropped.
        at_B = jnp.where(active_B, self.slots.lengths, S)
        tokens = self.tokens.at[jnp.arange(len(at_B)), at_B].set(slots.last, mode="drop")
        stopped_B = ends_with_stop(tokens, self.prompt_lengths, slots.lengths, self.stops)
        done_B = self.done | (active_B & (stopped_B | (slots.last == self.eos_id)))
        return dataclasses.replace(self, slots=slots, tokens=tokens, done=done_B)

    def grow(self, capacity: int) -> "Generation":
        """The same with a cache for so many tokens."""
        slots = dataclasses.replace(self.slots, cache=self.slots.cache.resize(capacity))
        return dataclasses.replace(self, slots=slots)


def read_prompts(model: TransformerLM, arrays: tuple, *, capacity: int, room: int, ahead: int = 0) -> Generation:
    """The texts of `Request.arrays`, with room for `capacity` tokens and in the cache for `room`, or `capacity`.

    `ahead` is how many tokens of a row may be taken back.
    """
    tokens_BP, lengths_B, seeds_B, settings, max_tokens, stops_RL, eos_id = arrays
    slots, _ = prefill(model, tokens_BP, lengths_B, seeds_B, settings, ahead)
    return Generation(
        slots=slots,
        tokens=jnp.pad(tokens_BP, ((0, 0), (0, capacity - tokens_BP.shape[1]))),
        prompt_lengths=lengths_B,
        rooms=lengths_B + max_tokens,
        done=jnp.zeros(len(lengths_B), bool),
        stops=stops_RL,
        eos_id=eos_id,
    ).grow(room)


def start(config: TransformerConfig, params: Params, arrays: tuple, *, capacity: int) -> Generation:
    """`read_prompts` with all the room at once. To `extend` is a program of its own, which all tokens share."""
    return read_prompts(TransformerLM.from_params(config, params), arrays, capacity=capacity, room=capacity)


def whole(config: TransformerConfig, params: Params, arrays: tuple, *, capacity: int) -> tuple[jax.Array, jax.Array]:
    """All texts to their ends: tokens [B, S] and lengths [B]."""
    model, room = TransformerLM.from_params(config, params), capacity
    if is_listed(params):  # to grow takes both caches at once, for which other devices have no memory
        num_rows, width = arrays[0].shape
        room = cpu.first_room(num_rows, width, capacity)
    generation = extend(config, params, read_prompts(model, arrays, capacity=capacity, room=room))
    if room < capacity:
        generation = extend(config, params, generation.grow(capacity))
    return generation.tokens, generation.slots.lengths


def extend(
    config: TransformerConfig, params: Params, generation: Generation, limit: jax.Array | None = None
) -> Generation:
    """Goes on until each row is finished or has `limit` generated tokens, those of earlier calls included.

    It ends earlier where a row that is to go on has outgrown the cache, which then must `grow`.
    """

    def unfinished(generation: Generation) -> jax.Array:
        active_B, room = generation.active(limit), generation.slots.cache.capacity
        if room >= generation.tokens.shape[1]:
            return jnp.any(active_B)
        return jnp.any(active_B) & ~jnp.any(active_B & (generation.slots.lengths > room))

    def take_step(generation: Generation) -> Generation:
        model, active_B = TransformerLM.from_params(config, params), generation.active(limit)
        slots, _ = step(model, generation.slots, active_B)
        return generation.record(slots, active_B)

    return jax.lax.while_loop(unfinished, take_step, generation)


class Generator:
    """The compiled functions of one model shape. Parameters are fastest as `prepare` leaves them.

    One compilation serves all requests with as many rows whose longest prompt, and that plus max_tokens, `Request`
    rounds up to the same sizes. Tokens come back as drawn: a row ends with its eos or stop.
    """

    def __init__(self, config: TransformerConfig):
        self.config = config
        self._whole = jax.jit(functools.partial(whole, config), static_argnames="capacity")
        self._start = jax.jit(functools.partial(start, config), static_argnames="capacity")
        self._extend = jax.jit(functools.partial(extend, config), donate_argnums=1)

    def generate(self, params: Params, request: Request) -> list[np.ndarray]:
        """The tokens after each prompt, int32, in one call of the device. Raises ValueError as `Request.arrays`."""
        arrays, capacity = request.arrays(self.config)
        tokens, lengths = (np.array(x) for x in self._whole(params, arrays, capacity=capacity))
        return [tokens[row, len(prompt) : lengths[row]] for row, prompt in enumerate(request.prompts)]

    def stream(self, params: Params, request: Request, chunk: int = 8) -> Iterator[tuple[int, int]]:
        """The tokens of `generate` as (row, token), one a row at once and then `chunk` a row at a time."""
        arrays, capacity = request.arrays(self.config)  # which raises now, not when the first token is asked for
        begin = functools.partial(self._start, params, arrays, capacity=capacity)
        return stream(request, begin, functools.partial(self._extend, params), chunk)


def stream(
    request: Request,
    begin: Callable[[], Any],
    extend: Callable[[Any, np.int32], Any],
    chunk: int,
    text_of: Callable[[Any], Generation] = lambda state: state,
) -> Iterator[tuple[int, int]]:
    """Tokens as (row, token), of a state that is begun and extended to limits of generated tokens a row."""
    limit, given = 1, [len(prompt) for prompt in request.prompts]
    state = begin()
    while True:
        state = extend(state, np.int32(limit))
        text = text_of(state)
        # Copies: the next call reuses the buffers.
        tokens, lengths, done = (np.array(x) for x in (text.tokens, text.slots.lengths, text.done))
        for row, token_ids in enumerate(tokens):
            yield from ((row, int(token)) for token in token_ids[given[row] : lengths[row]])
        if done.all() or limit >= request.max_tokens:
            return
        given, limit = lengths, min(limit + chunk, request.max_tokens)
