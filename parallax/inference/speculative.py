"""Speculative decoding: a small model proposes tokens, the large one checks them all in one forward pass.

Invariant: what is generated is distributed as by the large model alone, whatever is proposed; at temperature 0 it is
the same text. A row depends on its own prompt, settings and seed alone: all draws for position p come from keys made of
fold_in(key(seed), p). Those for positions beyond a rejected token are drawn again from the same keys, and may be, since
nothing that was kept depended on them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np

from parallax.config import TransformerConfig
from parallax.inference.generate import Generation, prefill
from parallax.inference.rejection import check_proposals, draw
from parallax.inference.request import Request
from parallax.inference.sampling import probabilities
from parallax.inference.stopping import ends_with_stop
from parallax.model.cache import KVCache
from parallax.model.transformer import Params, TransformerLM, unstack

PROPOSE, ACCEPT, REPLACE = range(3)
"""What the key of a position is folded with for each of its draws."""


class Configs(NamedTuple):
    """The shapes of the large and the small model."""

    target: TransformerConfig
    draft: TransformerConfig


class BothParams(NamedTuple):
    """The parameters of the large and the small model."""

    target: Params
    draft: Params


@chex.dataclass(frozen=True)
class Speculation:
    """B rows under way. Both caches hold a row's tokens before its last, and have room for proposals beyond its end."""

    text: Generation
    draft_cache: KVCache
    rooms: jax.Array  # int32 [B]: how long each row may become
    proposed: jax.Array  # int32 [B]: tokens that the small model proposed
    accepted: jax.Array  # int32 [B]: those of them that the large one let pass


def start(
    configs: Configs,
    params: BothParams,
    arrays: tuple,
    max_tokens: jax.Array,
    limit: jax.Array,
    *,
    capacity: int,
    draft_tokens: int,
) -> Speculation:
    """Reads the prompts of `Request.arrays` into both caches, then `extend`s."""
    text, draft = (
        prefill(config, weights, unstack(config, weights), *arrays, capacity=capacity + draft_tokens)
        for config, weights in zip(configs, params, strict=True)
    )
    none = jnp.zeros_like(text.lengths)
    speculation = Speculation(
        text=text,
        draft_cache=draft.cache,
        rooms=text.prompt_lengths + max_tokens,
        proposed=none,
        accepted=none,
    )
    return extend(configs, params, speculation, limit, draft_tokens=draft_tokens)


def extend(
    configs: Configs, params: BothParams, speculation: Speculation, limit: jax.Array, *, draft_tokens: int
) -> Speculation:
    """Goes on until each row is done, full or has `limit` generated tokens; it may have up to `draft_tokens` more."""
    target, draft = (
        functools.partial(TransformerLM.from_params(config, weights), layers=unstack(config, weights))
        for config, weights in zip(configs, params, strict=True)
    )

    def active(state: Speculation) -> jax.Array:
        text = state.text
        return ~text.done & (text.lengths < jnp.minimum(text.prompt_lengths + limit, state.rooms))

    def step(state: Speculation) -> Speculation:
        proposal = _propose(draft, state, draft_tokens)
        return _check(target, state, proposal, active(state))

    return jax.lax.while_loop(lambda state: jnp.any(active(state)), step, speculation)


class _Proposal(NamedTuple):
    """R tokens a row; the next R positions, and the one after them, are t = 0 … R below."""

    tokens_RB: jax.Array
    probs_RBV: jax.Array  # what each was drawn from
    seen_TBV: jax.Array  # what the row holds before each position, if all earlier proposals pass
    draft_cache: KVCache


def _keys(text: Generation, count: int, purpose: int) -> jax.Array:
    """Keys [count, B] of the next positions of each row."""

    def key(row_key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(row_key, position), purpose)

    return jax.vmap(jax.vmap(key), (None, 0))(text.keys, text.lengths[None] + jnp.arange(count)[:, None])


def _propose(model: Callable, state: Speculation, count: int) -> _Proposal:
    """Draws `count` tokens a row, one after another, by the small model."""
    text, rows = state.text, jnp.arange(len(state.text.lengths))

    def step(carry: tuple, keys_B: jax.Array) -> tuple[tuple, tuple]:
        # Two tokens are fed each time: where all proposals passed, the last but one has not been fed before.
        cache, pair_B2, lengths_B, seen_BV = carry
        positions_B2 = jnp.maximum(lengths_B[:, None] + jnp.array([[-2, -1]]), 0)
        logits_B2V, cache = model(pair_B2, positions_B2, cache=cache)
        probs_BV = probabilities(logits_B2V[:, 1], text.settings, seen_BV)
        token_B = draw(probs_BV, keys_B)
        pair_B2 = jnp.stack([pair_B2[:, 1], token_B], axis=1)
        seen_after_BV = seen_BV.at[rows, token_B].set(True)
        return (cache, pair_B2, lengths_B + 1, seen_after_BV), (token_B, probs_BV, seen_BV)

    last_two_B2 = jnp.maximum(text.lengths[:, None] + jnp.array([[-2, -1]]), 0)
    pair_B2 = jnp.take_along_axis(text.tokens, last_two_B2, axis=1)
    carry = (state.draft_cache, pair_B2, text.lengths, text.seen)
    (cache, _, _, seen_BV), (tokens_RB, probs_RBV, seen_RBV) = jax.lax.scan(
        step, carry, _keys(text, count, PROPOSE)
    )
    return _Proposal(tokens_RB, probs_RBV, jnp.concatenate([seen_RBV, seen_BV[None]]), cache)


def _check(model: Callable, state: Speculation, proposal: _Proposal, active_B: jax.Array) -> Speculation:
    """Adds to each active row the proposals that pass and one token by the large model."""
    text, count = state.text, len(proposal.tokens_RB)
    last_B1 = jnp.take_along_axis(text.tokens, text.lengths[:, None] - 1, axis=1)
    fed_BT = jnp.concatenate([last_B1, proposal.tokens_RB.T], axis=1)
    positions_BT = text.lengths[:, None] - 1 + jnp.arange(count + 1)[None]
    logits_BTV, cache = model(fed_BT, positions_BT, cache=text.cache)
    p_TBV = jax.vmap(probabilities, (1, None, 0))(logits_BTV, text.settings, proposal.seen_TBV)
    passed_B, own_B = check_proposals(
        proposal.tokens_RB,
        proposal.probs_RBV,
        p_TBV,
        _keys(text, count, ACCEPT),
        _keys(text, count + 1, REPLACE),
    )
    at_T1 = jnp.arange(count + 1)[:, None]
    new_TB = jnp.where(at_T1 < passed_B[None], jnp.pad(proposal.tokens_RB, ((0, 1), (0, 0))), own_B[None])
    text = dataclasses.replace(text, cache=cast(KVCache, cache))
    return dataclasses.replace(
        state,
        text=_append(text, new_TB, passed_B + 1, state.rooms, active_B),
        draft_cache=proposal.draft_cache,
        proposed=state.proposed + jnp.where(active_B, count, 0),
        accepted=state.accepted + jnp.where(active_B, passed_B, 0),
    )


def _append(
    text: Generation, new_TB: jax.Array, count_B: jax.Array, rooms_B: jax.Array, active_B: jax.Array
) -> Generation:
    """Adds the first `count_B` of some new tokens to each active row, up to its end."""
    rows, T = jnp.arange(len(count_B))[:, None], len(new_TB)
    S, V = text.tokens.shape[1], text.seen.shape[1]
    at_BT = text.lengths[:, None] + jnp.arange(T)[None]
    tokens = text.tokens.at[rows, jnp.where(active_B[:, None], at_BT, S)].set(new_TB.T, mode="drop")

    def ends(new_B: jax.Array, lengths_B: jax.Array) -> jax.Array:
        stopped_B = ends_with_stop(tokens, text.prompt_lengths, lengths_B, text.stops)
        return stopped_B | (new_B == text.eos_id)

    ends_TB = jax.vmap(ends)(new_TB, at_BT.T + 1)
    to_end_B = jnp.where(jnp.any(ends_TB, axis=0), jnp.argmax(ends_TB, axis=0) + 1, T + 1)
    fitting_B = jnp.minimum(jnp.minimum(count_B, to_end_B), rooms_B - text.lengths)
    taken_B = jnp.where(active_B, fitting_B, 0)
    mark_BT = jnp.where(jnp.arange(T)[None] < taken_B[:, None], new_TB.T, V)
    return dataclasses.replace(
        text,
        tokens=tokens,
        lengths=text.lengths + taken_B,
        seen=text.seen.at[rows, mark_BT].set(True, mode="drop"),
        done=text.done | (active_B & (to_end_B <= taken_B)),
    )


class SpeculativeGenerator:
    """The compiled functions of two model shapes, used as a `Generator` whose parameters are `BothParams`.

    Texts at temperature 0 are those of `Generator` (but for ties: logits of several positions at once may differ in the
    last bits from those of one). Others are other draws from the same distribution, and depend on the draft too.

    Raises:
      ValueError: the vocabularies differ, or `draft_tokens` is below 1.
    """

    def __init__(self, config: TransformerConfig, draft: TransformerConfig, draft_tokens: int = 4):
        if draft.vocab_size != config.vocab_size:
            raise ValueError(
                f"the draft's vocab_size={draft.vocab_size} must equal the model's {config.vocab_size}; "
                "give a draft that was trained with the same tokenizer"
            )
        if draft_tokens < 1:
            raise ValueError(f"draft_tokens={draft_tokens} must be at least 1; try 4")
        self.configs, self.draft_tokens = Configs(config, draft), draft_tokens
        self.proposed = self.accepted = 0
        """Tokens that the small model proposed in the latest request so far, and those of them that passed."""
        begin, go_on = (
            functools.partial(function, self.configs, draft_tokens=draft_tokens)
            for function in (start, extend)
        )
        self._start = jax.jit(begin, static_argnames="capacity")
        self._extend = jax.jit(go_on, donate_argnums=1)

    def generate(self, params: BothParams, request: Request) -> list[np.ndarray]:
        """The tokens that follow each prompt, int32, in one call of the device.

        Raises:
          ValueError: from `Request.arrays`, of either model.
        """
        rows: list[list[int]] = [[] for _ in request.prompts]
        for row, token in self.stream(params, request, chunk=request.max_tokens):
            rows[row].append(token)
        return [np.array(tokens, np.int32) for tokens in rows]

    def stream(self, params: BothParams, request: Request, chunk: int = 8) -> Iterator[tuple[int, int]]:
        """The tokens of `generate` as (row, token), at least `chunk` a row at a time while it goes on."""
        arrays, capacity = request.arrays(self.configs.target)
        request.arrays(self.configs.draft)  # it reads the same tokens
        return self._stream(params, request, arrays, capacity, chunk)

    def _stream(self, params: BothParams, request: Request, arrays: tuple, capacity: int, chunk: int):
        limit, given = min(chunk, request.max_tokens), [len(prompt) for prompt in request.prompts]
        total = np.int32(request.max_tokens)
        state = self._start(params, arrays, total, np.int32(limit), capacity=capacity)
        while True:
            text = state.text
            # Copies: the next call reuses the buffers.
            tokens, lengths, done = (np.array(x) for x in (text.tokens, text.lengths, text.done))
            self.proposed, self.accepted = (int(np.sum(x)) for x in (state.proposed, state.accepted))
            for row, token_ids in enumerate(tokens):
                yield from ((row, int(token)) for token in token_ids[given[row] : lengths[row]])
            if done.all() or limit >= request.max_tokens:
                return
            given, limit = lengths, min(limit + chunk, request.max_tokens)
            state = self._extend(params, state, np.int32(limit))
