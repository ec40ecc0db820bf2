"""The slots of a running batch, on the device: `prefill` and `insert` fill one, `decode` gives all of them tokens.

Invariant: what a slot draws depends on the prompt and the settings put into it and on nothing else: each row is
computed on its own, whatever the others hold and whether they are in use. The token at position p is drawn with
fold_in(key(seed), p).
"""

import dataclasses
import math
from typing import cast

import chex
import jax
import jax.numpy as jnp
import numpy as np

from parallax.axes import constrain
from parallax.config import TransformerConfig
from parallax.inference.sampling import SamplingSettings, sample
from parallax.model.cache import KVCache
from parallax.model.transformer import Layers, Params, TransformerLM

TOP = 10
"""How many of the most probable tokens are reported with each token."""
CHUNK = 32
"""Prompt positions whose logits [V] live in memory at once while a prompt is scored."""


@chex.dataclass(frozen=True)
class Slots:
    """B rows. The cache holds a row's tokens before its last, which is fed to draw the next.

    It is unstacked where the functions below are given `layers`, which `unstack` makes of the parameters.
    """

    cache: KVCache
    last: jax.Array  # int32 [B]: the last token of each row
    lengths: jax.Array  # int32 [B]: tokens of each row, from 1 to the capacity S of the cache
    seen: jax.Array  # bool [B, V]: which tokens the row holds, for the repetition penalty
    seeds: jax.Array  # uint32 [B]
    settings: SamplingSettings

    @classmethod
    def create(
        cls, config: TransformerConfig, layers: Layers | None, num_slots: int, capacity: int
    ) -> "Slots":
        """Unused slots, which hold one token each: what a slot computes before `prefill` is never looked at."""
        settings = SamplingSettings.create(num_slots)
        return _placed(
            cls(
                cache=KVCache.create(config, num_slots, capacity, unstacked=layers is not None),
                last=jnp.zeros(num_slots, jnp.int32),
                lengths=jnp.ones(num_slots, jnp.int32),
                seen=jnp.zeros((num_slots, config.vocab_size), bool),
                seeds=jnp.zeros(num_slots, jnp.uint32),
                settings=jax.tree.map(jnp.asarray, settings),
            )
        )


def _placed(slots: Slots) -> Slots:
    """Rows and heads of the cache over the devices, where a placement is bound; the same after each call."""
    keys_values, rows = (None, "batch", "act_kv_heads", None, None), dataclasses.replace(slots, cache=None)
    return dataclasses.replace(
        jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), rows),
        cache=jax.tree.map(lambda x: constrain(x, *keys_values[-x.ndim :]), slots.cache),
    )


def prefill(
    config: TransformerConfig,
    params: Params,
    layers: Layers | None,
    tokens_P: jax.Array,
    length: jax.Array,
    seed: jax.Array,
    settings: SamplingSettings,
    score_prompt: jax.Array,
) -> tuple[Slots, jax.Array, jax.Array]:
    """Reads a prompt, right-padded to P tokens, and draws the token that follows it.

    Returns:
      one row of slots, whose cache has room for P tokens; the drawn token's report [1, R]; with `score_prompt` the
      reports [P, R] of what follows each token of the prompt, within it, and zeros without.
    """
    P = tokens_P.shape[0]
    model, positions_1P = TransformerLM.from_params(config, params), jnp.arange(P, dtype=jnp.int32)[None]
    # Padding needs no mask: its keys lie later than any query, and are overwritten before anything sees them.
    cache = KVCache.create(config, 1, P, unstacked=layers is not None)
    x_1PD, cache = model.hidden(tokens_P[None], positions_1P, cache=cache, layers=layers)
    ids_1P = jnp.where(positions_1P < length, tokens_P[None], config.vocab_size)  # padding is dropped
    seen_1V = jnp.zeros((1, config.vocab_size), bool).at[0, ids_1P[0]].set(True, mode="drop")

    def report_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_CD, next_C = chunk
        return report(_logits(model, x_CD[None])[0], next_C)

    def report_prompt(x_PD: jax.Array) -> jax.Array:
        size = math.gcd(P, CHUNK)
        chunks = (x_PD.reshape(P // size, size, -1), jnp.roll(tokens_P, -1).reshape(-1, size))
        return jax.lax.map(report_chunk, chunks).reshape(P, -1)

    width = 2 + 2 * num_top(config.vocab_size)
    prompt_PR = jax.lax.cond(
        score_prompt, report_prompt, lambda _: jnp.zeros((P, width), jnp.int32), x_1PD[0]
    )
    logits_1V = _logits(model, jax.lax.dynamic_slice_in_dim(x_1PD, length - 1, 1, axis=1))[:, 0]
    token_1 = _draw(logits_1V, settings, seen_1V, seed[None], length[None])
    row = Slots(
        cache=cast(KVCache, cache),
        last=token_1,
        lengths=length[None] + 1,
        seen=seen_1V.at[0, token_1].set(True),
        seeds=seed[None],
        settings=settings,
    )
    return row, constrain(report(logits_1V, token_1), None, None), constrain(prompt_PR, None, None)


def insert(slots: Slots, slot: jax.Array, row: Slots) -> Slots:
    """`slots` with one row replaced; of its cache, the beginning for which the row has room."""

    def put(whole: jax.Array, part: jax.Array, dim: int) -> jax.Array:
        at = [slot if each == dim else 0 for each in range(whole.ndim)]
        return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), at)

    few, own = (dataclasses.replace(each, cache=None) for each in (slots, row))
    replaced = jax.tree.map(lambda whole, part: put(whole, part, 0), few, own)
    cache = jax.tree.map(lambda whole, part: put(whole, part, whole.ndim - 4), slots.cache, row.cache)
    return _placed(dataclasses.replace(replaced, cache=cache))


def decode(
    config: TransformerConfig, params: Params, layers: Layers | None, slots: Slots, *, steps: int, window: int
) -> tuple[Slots, jax.Array]:
    """`steps` tokens more for every slot: the slots, and the reports of these tokens [steps, B, R].

    It ends early for nothing: where a row is over, the host knows, and looks at no more of it. Only the first `window`
    tokens of the cache are read and written, which rows in use must not outgrow: a step costs what is held, not what
    could be.
    """
    capacity = slots.cache.capacity
    whole = slots.cache
    slots = dataclasses.replace(slots, cache=jax.tree.map(lambda x: x[..., :window, :], whole))

    def step(slots: Slots, _) -> tuple[Slots, jax.Array]:
        model = TransformerLM.from_params(config, params)
        logits_B1V, cache = model(
            slots.last[:, None], slots.lengths[:, None] - 1, cache=slots.cache, layers=layers
        )
        logits_BV = constrain(logits_B1V[:, 0], "batch", None)
        token_B = _draw(logits_BV, slots.settings, slots.seen, slots.seeds, slots.lengths)
        slots = dataclasses.replace(
            slots,
            cache=cast(KVCache, cache),
            last=token_B,
            # A row that is over stays within its slot, whatever is drawn in it.
            lengths=jnp.minimum(slots.lengths + 1, capacity),
            seen=slots.seen.at[jnp.arange(len(token_B)), token_B].set(True),
        )
        return _placed(slots), report(logits_BV, token_B)

    slots, reports_KBR = jax.lax.scan(step, slots, None, length=steps)
    cache = jax.tree.map(
        lambda x, part: jax.lax.dynamic_update_slice(x, part, [0] * x.ndim), whole, slots.cache
    )
    return _placed(dataclasses.replace(slots, cache=cache)), constrain(reports_KBR, None, None, None)


def _logits(model: TransformerLM, x_BTD: jax.Array) -> jax.Array:
    """Float32 logits [B, T, V]."""
    logits_BTV = model.unembed(x_BTD)[..., : model.config.vocab_size]
    return constrain(logits_BTV, "batch", None, None)


def _draw(
    logits_BV: jax.Array,
    settings: SamplingSettings,
    seen_BV: jax.Array,
    seeds_B: jax.Array,
    positions_B: jax.Array,
) -> jax.Array:
    return sample(logits_BV, settings, seen_BV, jax.vmap(jax.random.key)(seeds_B), positions_B)


def num_top(vocab_size: int) -> int:
    """How many alternatives a report holds."""
    return min(TOP, vocab_size)


def report(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """What the host is told of a token a row, as one array int32 [B, 2 + 2·num_top], which `read_report` reads.

    Log-probabilities are those of softmax(logits): before penalty, temperature and filters.
    """
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=1)
    top_BT, ids_BT = jax.lax.top_k(logprobs_BV, num_top(logits_BV.shape[1]))
    own_B1 = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)
    bits_BL = jax.lax.bitcast_convert_type(jnp.concatenate([own_B1, top_BT], axis=1), jnp.int32)
    return jnp.concatenate([token_B[:, None], ids_BT, bits_BL], axis=1)


def read_report(words_R: np.ndarray) -> tuple[int, float, tuple[tuple[int, float], ...]]:
    """A row of `report` on the host: token, its log-probability, the most probable tokens with theirs."""
    count, words_R = len(words_R) // 2, np.ascontiguousarray(words_R)
    ids, logprobs = words_R[:count].tolist(), words_R[count:].view(np.float32).tolist()
    return ids[0], logprobs[0], tuple(zip(ids[1:], logprobs[1:], strict=True))
