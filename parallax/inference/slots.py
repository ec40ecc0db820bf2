"""Slots: rows of text that a model continues side by side, one token each in a `step`.

Invariant: what a slot draws depends on the prompt, seed and settings put into it and on nothing else: each row is
computed on its own, whatever the others hold and whether they are in use. The token at position p is drawn with
fold_in(key(seed), p).
"""

import dataclasses
from typing import cast

import chex
import jax
import jax.numpy as jnp

from parallax.axes import constrain
from parallax.inference.sampling import SamplingSettings, sample
from parallax.layers.cache import KVCache
from parallax.model.transformer import TransformerLM

PART = 64
"""Tokens of a prompt that are read at a time where its beginning is in a cache."""


@chex.dataclass(frozen=True)
class Slots:
    """B rows. The cache holds a row's tokens before its last, which is fed to draw the next."""

    cache: KVCache
    last: jax.Array  # int32 [B]: the last token of each row
    lengths: jax.Array  # int32 [B]: tokens of each row, at least 1
    seen: jax.Array  # bool [B, V]: which tokens the row holds, for the repetition penalty
    seeds: jax.Array  # uint32 [B]
    settings: SamplingSettings

    @classmethod
    def create(cls, model: TransformerLM, num_slots: int, capacity: int) -> "Slots":
        """Unused slots, which hold one token each: what a slot computes before it is filled is never looked at."""
        return cls(
            cache=model.empty_cache(num_slots, capacity),
            last=jnp.zeros(num_slots, jnp.int32),
            lengths=jnp.ones(num_slots, jnp.int32),
            seen=jnp.zeros((num_slots, model.config.vocab_size), bool),
            seeds=jnp.zeros(num_slots, jnp.uint32),
            settings=jax.tree.map(jnp.asarray, SamplingSettings.create(num_slots)),
        ).constrained()

    def constrained(self) -> "Slots":
        """Rows and heads over the devices, where a placement is bound; the same after each call."""
        rows = dataclasses.replace(self, cache=None)
        return dataclasses.replace(
            jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), rows), cache=self.cache.constrained()
        )

    def insert(self, slot: jax.Array, row: "Slots") -> "Slots":
        """The same with one row replaced by slots of one row."""
        rows, new = (dataclasses.replace(each, cache=None) for each in (self, row))
        rows = jax.tree.map(lambda x, x_1: jax.lax.dynamic_update_slice_in_dim(x, x_1, slot, 0), rows, new)
        return dataclasses.replace(rows, cache=self.cache.with_row(slot, row.cache)).constrained()

    def draw(self, logits_BV: jax.Array, active_B: jax.Array) -> "Slots":
        """The next token of each active row, from logits in its place, as its last; others stay as they are.

        Noise and filters are computed where an active row asks for them: what others ask for costs nothing.
        """
        keys_B = jax.vmap(jax.random.key)(self.seeds)
        settings = self.settings.where(active_B)
        return self.take(sample(logits_BV, settings, self.seen, keys_B, self.lengths), active_B)

    def take(self, token_B: jax.Array, active_B: jax.Array) -> "Slots":
        """One token more for each active row."""
        # The mark of a finished row is beyond the vocabulary, which is dropped.
        mark_B = jnp.where(active_B, token_B, self.seen.shape[1])
        return dataclasses.replace(
            self,
            last=jnp.where(active_B, token_B, self.last),
            lengths=self.lengths + active_B,
            seen=self.seen.at[jnp.arange(len(token_B)), mark_B].set(True, mode="drop"),
        )


def prefill(
    model: TransformerLM,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
    seeds_B: jax.Array,
    settings: SamplingSettings,
    ahead: int = 0,
) -> tuple[Slots, jax.Array]:
    """Reads prompts, right-padded to P tokens, into slots with room for P; and what the model makes of them, [B, P, D].

    Padding needs no mask: its keys are in the slots of their positions, later than any query of the prompt, and the
    next tokens overwrite them before anything sees them. `ahead` is how many tokens of a row may be taken back.
    """
    B, P = tokens_BP.shape
    positions_BP = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[None], (B, P))
    x_BPD, cache, _ = model.hidden(tokens_BP, positions_BP, cache=model.empty_cache(B, P, ahead), lengths=lengths_B)
    slots = _filled(cast(KVCache, cache), tokens_BP, lengths_B, seeds_B, settings, model.config.vocab_size)
    return slots, x_BPD


def go_on(
    model: TransformerLM,
    cache: KVCache,
    start: jax.Array,
    tokens_1P: jax.Array,
    lengths_1: jax.Array,
    seeds_1: jax.Array,
    settings: SamplingSettings,
) -> tuple[Slots, jax.Array]:
    """`prefill` of a prompt of which a cache with room for P holds the first `start` tokens; and its last's [1, 1, D].

    The others are read PART at a time, to the end of the last part: P must reach it, and no layer's window may be
    shorter than P, since of a ring the padding behind the prompt would take slots.
    """
    part = min(PART, tokens_1P.shape[1])
    nothing = jax.eval_shape(lambda: model.hidden(tokens_1P[:, :1], jnp.zeros((1, 1), jnp.int32), cache=cache)[0])

    def read(number: jax.Array, state: tuple[KVCache, jax.Array]) -> tuple[KVCache, jax.Array]:
        cache, last_11D = state
        at = start + number * part
        tokens_1T = jax.lax.dynamic_slice_in_dim(tokens_1P, at, part, axis=1)
        x_1TD, cache, _ = model.hidden(tokens_1T, at + jnp.arange(part, dtype=jnp.int32)[None], cache=cache)
        last = lengths_1[0] - 1 - at
        found_11D = jax.lax.dynamic_slice_in_dim(x_1TD, jnp.clip(last, 0, part - 1), 1, axis=1)
        return cast(KVCache, cache), jnp.where(last < part, found_11D, last_11D)

    parts = (lengths_1[0] - start + part - 1) // part
    cache, last_11D = jax.lax.fori_loop(0, parts, read, (cache, jnp.zeros(nothing.shape, nothing.dtype)))
    return _filled(cache, tokens_1P, lengths_1, seeds_1, settings, model.config.vocab_size), last_11D


def _filled(
    cache: KVCache,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
    seeds_B: jax.Array,
    settings: SamplingSettings,
    vocab_size: int,
) -> Slots:
    """Slots that hold prompts and nothing more."""
    B, P = tokens_BP.shape
    # Padding marks a token beyond the vocabulary, which is dropped.
    ids_BP = jnp.where(jnp.arange(P)[None] < lengths_B[:, None], tokens_BP, vocab_size)
    return Slots(
        cache=cache,
        last=jnp.take_along_axis(tokens_BP, lengths_B[:, None] - 1, axis=1)[:, 0],
        lengths=lengths_B,
        seen=jnp.zeros((B, vocab_size), bool).at[jnp.arange(B)[:, None], ids_BP].set(True, mode="drop"),
        seeds=seeds_B,
        settings=settings,
    )


def step(
    model: TransformerLM, slots: Slots, active_B: jax.Array, allowed_BW: jax.Array | None = None
) -> tuple[Slots, jax.Array]:
    """One token more for each active row, and the model's logits [B, V]; only `allowed` ones, by `only`, are drawn.

    A last token that was fed before, by the prefill or in a finished row, writes the same keys and values; what a
    finished row writes beyond the cache is dropped.
    """
    logits_B1V, cache = model(slots.last[:, None], slots.lengths[:, None] - 1, cache=slots.cache)
    logits_BV = constrain(logits_B1V[:, 0], "batch", None)
    slots = dataclasses.replace(slots, cache=cache).draw(only(allowed_BW, logits_BV), active_B)
    return slots.constrained(), logits_BV


def only(allowed_BW: jax.Array | None, logits_BV: jax.Array) -> jax.Array:
    """Logits in which what is not allowed, by the bits of `Matcher.allowed`, has no probability."""
    if allowed_BW is None:
        return logits_BV
    bits_BV = (allowed_BW[:, :, None] >> jnp.arange(32)[None, None]).reshape(len(allowed_BW), -1) & 1
    return jnp.where(bits_BV[:, : logits_BV.shape[1]] == 1, logits_BV, -jnp.inf)
