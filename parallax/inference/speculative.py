"""Speculative decoding: a small model proposes tokens, the large one checks them all in one forward pass.

Invariant: what is generated is distributed as by the large model alone, whatever is proposed; at temperature 0 it is
the same text. A row depends on its own prompt, settings and seed alone: all draws for position p come from keys made of
fold_in(key(seed), p). Those for positions beyond a rejected token are drawn again from the same keys, and may be, since
nothing that was kept depended on them.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from parallax.config import TransformerConfig
from parallax.inference.generate import Generation, read_prompts, stream
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings, probabilities
from parallax.layers.cache import KVCache
from parallax.model.transformer import Params, TransformerLM

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
    proposed: jax.Array  # int32 [B]: tokens that the small model proposed
    accepted: jax.Array  # int32 [B]: those of them that the large one let pass


def start(configs: Configs, params: BothParams, arrays: tuple, *, capacity: int, draft_tokens: int) -> Speculation:
    """Reads the prompts of `Request.arrays` into both caches."""
    room = capacity + draft_tokens
    text, draft = (
        read_prompts(TransformerLM.from_params(config, weights), arrays, capacity=room, room=room, ahead=draft_tokens)
        for config, weights in zip(configs, params, strict=True)
    )
    none = jnp.zeros_like(text.prompt_lengths)
    return Speculation(text=text, draft_cache=draft.slots.cache, proposed=none, accepted=none)


def extend(
    configs: Configs, params: BothParams, state: Speculation, limit: jax.Array, *, draft_tokens: int
) -> Speculation:
    """Goes on until each row is finished or has `limit` generated tokens; it may have up to `draft_tokens` more."""

    def take_round(state: Speculation) -> Speculation:
        target, draft = (
            TransformerLM.from_params(config, weights) for config, weights in zip(configs, params, strict=True)
        )
        active_B = state.text.active(limit)
        settings = state.text.slots.settings.where(active_B)  # the others' cost nothing
        return _check(target, state, _propose(draft, state, settings, draft_tokens), settings, active_B)

    return jax.lax.while_loop(lambda state: jnp.any(state.text.active(limit)), take_round, state)


class _Proposal(NamedTuple):
    """R tokens a row; the next R positions, and the one after them, are t = 0 … R below."""

    tokens_RB: jax.Array
    probs_RBV: jax.Array  # what each was drawn from
    seen_TBV: jax.Array  # what the row holds before each position, if all earlier proposals pass
    draft_cache: KVCache


def _keys(text: Generation, count: int, purpose: int) -> jax.Array:
    """Keys [count, B] of the next positions of each row."""

    def key(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)

    positions_TB = text.slots.lengths[None] + jnp.arange(count)[:, None]
    return jax.vmap(jax.vmap(key), (None, 0))(text.slots.seeds, positions_TB)


def _propose(model: TransformerLM, state: Speculation, settings: SamplingSettings, count: int) -> _Proposal:
    """Draws `count` tokens a row, one after another, by the small model."""
    text, slots = state.text, state.text.slots
    rows = jnp.arange(len(slots.lengths))

    def step(carry: tuple, keys_B: jax.Array) -> tuple[tuple, tuple]:
        # Two tokens are fed each time: where all proposals passed, the last but one has not been fed before.
        cache, pair_B2, lengths_B, seen_BV = carry
        positions_B2 = jnp.maximum(lengths_B[:, None] + jnp.array([[-2, -1]]), 0)
        logits_B2V, cache = model(pair_B2, positions_B2, cache=cache)
        probs_BV = probabilities(logits_B2V[:, 1], settings, seen_BV)
        token_B = draw(probs_BV, keys_B)
        pair_B2 = jnp.stack([pair_B2[:, 1], token_B], axis=1)
        seen_after_BV = seen_BV.at[rows, token_B].set(True)
        return (cache, pair_B2, lengths_B + 1, seen_after_BV), (token_B, probs_BV, seen_BV)

    last_two_B2 = jnp.maximum(slots.lengths[:, None] + jnp.array([[-2, -1]]), 0)
    pair_B2 = jnp.take_along_axis(text.tokens, last_two_B2, axis=1)
    carry = (state.draft_cache, pair_B2, slots.lengths, slots.seen)
    (cache, _, _, seen_BV), (tokens_RB, probs_RBV, seen_RBV) = jax.lax.scan(step, carry, _keys(text, count, PROPOSE))
    return _Proposal(tokens_RB, probs_RBV, jnp.concatenate([seen_RBV, seen_BV[None]]), cache)


def _check(
    model: TransformerLM, state: Speculation, proposal: _Proposal, settings: SamplingSettings, active_B: jax.Array
) -> Speculation:
    """Adds to each active row the proposals that pass and one token by the large model, up to the row's end."""
    text, slots, count = state.text, state.text.slots, len(proposal.tokens_RB)
    fed_BT = jnp.concatenate([slots.last[:, None], proposal.tokens_RB.T], axis=1)
    positions_BT = slots.lengths[:, None] - 1 + jnp.arange(count + 1)[None]
    logits_BTV, cache = model(fed_BT, positions_BT, cache=slots.cache)
    p_TBV = jax.vmap(probabilities, (1, None, 0))(logits_BTV, settings, proposal.seen_TBV)
    passed_B, own_B = check_proposals(
        proposal.tokens_RB, proposal.probs_RBV, p_TBV, _keys(text, count, ACCEPT), _keys(text, count + 1, REPLACE)
    )
    text = dataclasses.replace(text, slots=dataclasses.replace(slots, cache=cache))
    for at in range(count + 1):
        token_B = own_B if at == count else jnp.where(at < passed_B, proposal.tokens_RB[at], own_B)
        taken_B = active_B & (at <= passed_B) & text.active()
        text = text.record(text.slots.take(token_B, taken_B), taken_B)
    return Speculation(
        text=text,
        draft_cache=proposal.draft_cache,
        proposed=state.proposed + jnp.where(active_B, count, 0),
        accepted=state.accepted + jnp.where(active_B, passed_B, 0),
    )


class SpeculativeGenerator:
    """The compiled functions of two model shapes, used as a `Generator` whose parameters are `BothParams`.

    Texts at temperature 0 are those of `Generator` (but for ties: logits of several positions at once may differ in the
    last bits from those of one). Others are other draws from the same distribution, and depend on the draft too. Raises
    ValueError if the vocabularies differ, or `draft_tokens` is below 1.
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
            functools.partial(function, self.configs, draft_tokens=draft_tokens) for function in (start, extend)
        )
        self._start = jax.jit(begin, static_argnames="capacity")
        self._extend = jax.jit(go_on, donate_argnums=1)

    def generate(self, params: BothParams, request: Request) -> list[np.ndarray]:
        """The tokens that follow each prompt, int32. Raises ValueError from `Request.arrays`, of either model."""
        rows: list[list[int]] = [[] for _ in request.prompts]
        for row, token in self.stream(params, request, chunk=request.max_tokens):
            rows[row].append(token)
        return [np.array(tokens, np.int32) for tokens in rows]

    def stream(self, params: BothParams, request: Request, chunk: int = 8) -> Iterator[tuple[int, int]]:
        """The tokens of `generate` as (row, token), at least one a row at once and then `chunk` while it goes on."""
        arrays, capacity = request.arrays(self.configs.target)
        request.arrays(self.configs.draft)  # it reads the same tokens

        def counted(state: Speculation) -> Generation:
            self.proposed, self.accepted = (int(np.sum(x)) for x in (state.proposed, state.accepted))
            return state.text

        begin = functools.partial(self._start, params, arrays, capacity=capacity)
        return stream(request, begin, functools.partial(self._extend, params), chunk, counted)


def check_proposals(
    tokens_RB: jax.Array, q_RBV: jax.Array, p_TBV: jax.Array, accept_RB: jax.Array, replace_TB: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many proposals of each row pass, int32 [B], and the token after these, int32 [B].

    A proposal x passes with probability min(1, p(x) / q(x)). In place of the first that does not, a token is drawn from
    max(0, p - q); after the last, if all pass, one from p (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1): the
    tokens that pass and the one after them are distributed as p has it, whatever q is (appendix A.1).

    Args:
      tokens_RB: R proposals a row, the first drawn from q[0], the next from q[1] and so on.
      q_RBV: by which distributions they were proposed.
      p_TBV: those that are wanted at the places of the proposals and, T = R + 1, behind them.
      accept_RB: keys for the first draw.
      replace_TB: keys for the second.
    """
    q_TBV, at_RB1 = jnp.pad(q_RBV, ((0, 1), (0, 0), (0, 0))), tokens_RB[:, :, None]
    p_RB, q_RB = (jnp.take_along_axis(probs_TBV[:-1], at_RB1, axis=2)[:, :, 0] for probs_TBV in (p_TBV, q_TBV))
    passes_RB = jax.vmap(jax.vmap(jax.random.uniform))(accept_RB) * q_RB < p_RB
    passed_B = jnp.sum(jnp.cumprod(passes_RB.astype(jnp.int32), axis=0), axis=0)
    rows = jnp.arange(len(passed_B))
    p_BV = p_TBV[passed_B, rows]
    excess_BV = jnp.maximum(p_BV - q_TBV[passed_B, rows], 0)
    # Where p and q differ by rounding alone, a proposal that was rejected may leave no excess at all.
    weights_BV = jnp.where(jnp.any(excess_BV > 0, axis=1, keepdims=True), excess_BV, p_BV)
    return passed_B, draw(weights_BV, replace_TB[passed_B, rows])


def draw(weights_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """A token a row with probability proportional to its weight, never one of weight 0, int32 [B]."""
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, weights_BV.shape[1:], weights_BV.dtype))(keys_B)
    return jnp.argmax(jnp.log(weights_BV) + noise_BV, axis=1).astype(jnp.int32)
