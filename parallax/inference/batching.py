"""Continuous batching: completions come and go while one compiled step serves all that are under way.

Invariant: a completion is, token for token, the one that it would be alone and the one that `Generator.generate` gives
with the same seed, whatever shares the batch, whoever came first and whoever was cancelled. After `warm_up` nothing is
compiled. (Matrices of other shapes may be multiplied with other last bits: a tie to the last bit can fall apart.)
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from parallax.axes import Names, Placement, bound
from parallax.config import TransformerConfig
from parallax.inference.completion import Completion, Running, Token
from parallax.inference.request import SMALLEST_BUCKET, check_ids, check_seed
from parallax.inference.slots import TOP, Slots, decode, insert, prefill, read_report
from parallax.inference.stopping import round_up
from parallax.model.transformer import Params, unstack

__all__ = ["TOP", "Batcher", "Completion", "Token"]


class Batcher:
    """Completions in S slots of one cache. One thread calls it; `check` any may.

    Args:
      params: may lie on a mesh; then `placement` says how the rest lies.
      slots: how many completions run at once; all of them are computed, used or not.
      capacity: the most tokens a slot can hold, prompt included; at most max_seq_len of them are used.
      tokens_per_step: how many tokens a slot takes in one `step`; more cost fewer calls, and a newcomer waits longer.
      placement: what `axes.bound` takes, to lay slots and heads over devices. The mesh axes that split a batch must
        divide `slots`; no axis may split `length`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: Params,
        *,
        slots: int = 16,
        capacity: int = 1024,
        tokens_per_step: int = 4,
        placement: Placement | None = None,
    ):
        for name, value in (
            ("slots", slots),
            ("capacity", capacity),
            ("tokens_per_step", tokens_per_step),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1; try 16")
        self.config, self.params = config, params
        self.capacity, self.tokens_per_step = min(capacity, config.max_seq_len), tokens_per_step
        self._running: list[Running | None] = [None] * slots
        whole, row = (placement, None) if placement is None else (placement, _OneRow(placement))

        # Fresh closures, since JAX knows nothing of what is bound.
        def create(layers):
            with bound(whole):
                return Slots.create(config, layers, slots, self.capacity)

        def fill(params, layers, slots, slot, *prompt):
            with bound(row):
                filled, drawn, prompt_scores = prefill(config, params, layers, *prompt)
            with bound(whole):
                return insert(slots, slot, filled), drawn, prompt_scores

        def step(params, layers, slots, window):
            with bound(whole):
                return decode(config, params, layers, slots, steps=tokens_per_step, window=window)

        self._fill = jax.jit(fill, donate_argnums=2)
        self._step = jax.jit(step, donate_argnums=2, static_argnums=3)
        # A second copy of the blocks' weights, for CPUs. On a mesh a layer's own cache would be gathered to be written.
        self._layers = jax.jit(functools.partial(unstack, config))(params) if placement is None else None
        self._slots = jax.jit(create)(self._layers)

    @property
    def free(self) -> int:
        """How many slots are free now."""
        return self._running.count(None)

    def check(self, completion: Completion) -> None:
        """Raises ValueError for a completion that can never run here."""
        length, max_tokens = len(completion.prompt), completion.max_tokens
        if not length:
            raise ValueError("prompt is empty (0 tokens); give at least one token to continue from")
        if max_tokens < 1 and not (max_tokens == 0 and completion.prompt_logprobs):
            raise ValueError(
                f"max_tokens={max_tokens} must be at least 1; try 200, or 0 with prompt_logprobs"
            )
        if length + max_tokens > self.capacity:
            fits = self.capacity - length
            remedy = f"max_tokens {fits}" if fits > 0 else "a shorter prompt"
            raise ValueError(
                f"prompt of {length} tokens + max_tokens={max_tokens} must not exceed the {self.capacity} tokens that "
                f"a slot holds; try {remedy}"
            )
        if any(len(stop) == 0 for stop in completion.stops):
            raise ValueError("a stop is empty; leave it out, or give at least one token")
        eos = [] if completion.eos_id is None else [completion.eos_id]
        check_ids(self.config, [completion.prompt, *completion.stops, eos])
        check_seed(completion.seed)
        completion.settings()

    def admit(self, ticket: int, completion: Completion) -> list[Token]:
        """Prefills a free slot: the tokens of the prompt if asked for, then the first that is drawn.

        Args:
          ticket: any number that no completion under way has.

        Raises:
          ValueError: from `check`; or no slot is free, or the ticket is in use.
        """
        self.check(completion)
        if not self.free:
            raise ValueError(f"all {len(self._running)} slots are busy; admit once `free` is above 0")
        if any(running and running.ticket == ticket for running in self._running):
            raise ValueError(f"ticket={ticket} is under way; give each completion its own")
        slot = self._running.index(None)
        drawn, prompt_scores = self._prefill(slot, completion)
        tokens = list(_prompt_tokens(ticket, completion, prompt_scores)) if completion.prompt_logprobs else []
        if completion.max_tokens:
            self._running[slot] = running = Running(ticket, completion)
            tokens.append(self._take(slot, running, np.asarray(drawn)[0]))
        return tokens

    def _bucket(self, length: int) -> int:
        """Tokens of the cache that a call reads for texts up to this length: few sizes, so few compilations."""
        return min(max(SMALLEST_BUCKET, round_up(length)), self.capacity)

    def _prefill(self, slot: int, completion: Completion) -> tuple[jax.Array, jax.Array]:
        length = len(completion.prompt)
        tokens = np.zeros(self._bucket(length), np.int32)
        tokens[:length] = completion.prompt
        self._slots, drawn, prompt_scores = self._fill(
            self.params,
            self._layers,
            self._slots,
            np.int32(slot),
            tokens,
            np.int32(length),
            np.uint32(completion.seed),
            completion.settings(),
            np.bool_(completion.prompt_logprobs),
        )
        return drawn, prompt_scores

    def _take(self, slot: int, running: Running, words: np.ndarray) -> Token:
        """A drawn token, which frees the slot if it is the last."""
        token, logprob, top = read_report(words)
        finish = running.take(token)
        if finish:
            self._running[slot] = None
        return Token(running.ticket, token, logprob, top, False, finish)

    def step(self) -> list[Token]:
        """Some tokens more for every busy slot, each completion's in order; nothing where none is busy."""
        busy = [running for running in self._running if running]
        if not busy:
            return []
        longest = max(running.length for running in busy)
        self._slots, reports = self._step(
            self.params, self._layers, self._slots, self._bucket(longest + self.tokens_per_step)
        )
        return [
            self._take(slot, running, words)
            for words_BR in np.asarray(reports)
            for slot, words in enumerate(words_BR)
            if (running := self._running[slot])
        ]

    def cancel(self, ticket: int) -> None:
        """Frees the slot of a completion at once; an unknown ticket has no effect."""
        self._running = [
            None if running and running.ticket == ticket else running for running in self._running
        ]

    def warm_up(self) -> None:
        """Compiles prompts and steps of every length, so that no request waits for a compiler.

        Raises:
          ValueError: a completion is under way.
        """
        if self.free < len(self._running):
            raise ValueError("completions are under way; warm up before the first")
        length = min(SMALLEST_BUCKET, self.capacity)
        while True:
            self._prefill(0, Completion(prompt=np.zeros(length, np.int32), max_tokens=0))
            self._slots, _ = self._step(self.params, self._layers, self._slots, length)
            if length == self.capacity:
                return
            length = min(2 * length, self.capacity)


def _prompt_tokens(ticket: int, completion: Completion, scores: jax.Array) -> Iterator[Token]:
    """The tokens of a prompt, from what follows each of its tokens."""
    length = len(completion.prompt)
    finish = None if completion.max_tokens else "length"
    yield Token(ticket, int(completion.prompt[0]), None, (), True, finish if length == 1 else None)
    for at, words in enumerate(np.asarray(scores)[: length - 1], start=2):
        yield Token(ticket, *read_report(words), True, finish if at == length else None)


class _OneRow:
    """A placement for one prompt, a row that no devices can share: each works on it with the heads that it has."""

    def __init__(self, placement: Placement):
        self._placement = placement

    def constrain(self, x: jax.Array, names: Names) -> jax.Array:
        return self._placement.constrain(x, _alone(names))

    def gather(self, x: jax.Array, names: Names) -> jax.Array:
        return self._placement.gather(x, names)

    def local(self, fn, in_names: Sequence[Names], out_names: Names):
        return self._placement.local(fn, [_alone(names) for names in in_names], _alone(out_names))


def _alone(names: Names) -> Names:
    return [None if name == "batch" else name for name in names]
