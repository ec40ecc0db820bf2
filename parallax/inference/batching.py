"""Continuous batching: completions come and go while one compiled step serves all that are under way.

Invariant: a completion is, token for token, the one that it would be alone and the one that `Generator.generate` gives
with the same seed, whatever shares the batch, whoever came first and whoever was cancelled. After `warm_up` nothing is
compiled. (Matrices of other shapes may be multiplied with other last bits: a tie to the last bit can fall apart.)
Log-probabilities are those of the model itself, softmax(logits): before penalty, temperature and filters.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from parallax.axes import Names, Placement, bound, constrain
from parallax.config import TransformerConfig
from parallax.inference.prefixes import Prefixes
from parallax.inference.reports import logits_of, read_report, report, report_prompt
from parallax.inference.request import Matcher, Request, bucket
from parallax.inference.slots import PART, Slots, go_on, only, prefill, step
from parallax.layers.cache import KVCache
from parallax.model.transformer import Params, TransformerLM


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of one completion."""

    ticket: int
    token_id: int
    logprob: float | None
    """Natural log of its probability by the model itself: temperature 1, no penalty, no filter. None for the first
    token of a prompt, which nothing precedes."""
    top: tuple[tuple[int, float], ...]
    """The most probable tokens in its place as (id, logprob), best first: TOP of them, or the whole of a smaller
    vocabulary; none for the first token of a prompt."""
    is_prompt: bool
    """Whether it is a token of the prompt, reported for `prompt_logprobs`."""
    finish: str | None
    """None while the completion goes on; on its last token "stop" (eos or a stop, which is reported) or "length"."""


@dataclasses.dataclass
class _Running:
    """A completion under way, as the host knows it. Where it ends is decided here, by its own tokens."""

    ticket: int
    request: Request
    matcher: Matcher | None = None
    generated: list[int] = dataclasses.field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.request.prompts[0]) + len(self.generated)

    def take(self, words_R: np.ndarray) -> Token:
        """The token of a report."""
        token, logprob, top = read_report(words_R)
        self.generated.append(token)
        stops, finish = self.request.stops, self.matcher.take(token) if self.matcher else None
        if token == self.request.eos_id or any(self.generated[-len(stop) :] == list(stop) for stop in stops):
            finish = "stop"
        elif len(self.generated) == self.request.max_tokens:
            finish = finish or "length"
        return Token(self.ticket, token, logprob, top, False, finish)


def fill(
    model: TransformerLM, arrays: tuple, score_prompt: jax.Array, allowed_1W: jax.Array | None = None
) -> tuple[Slots, jax.Array, jax.Array]:
    """Reads the one prompt of `Request.prompt_arrays` and draws the token that follows it, an allowed one.

    Returns:
      slots of one row; the drawn token's report [1, R]; with `score_prompt` the reports [P, R] of what follows each
      token of the prompt, within it, and zeros without.
    """
    slots, x_1PD = prefill(model, *arrays)
    prompt_PR = report_prompt(model, x_1PD[0], arrays[0][0], score_prompt)
    last_11D = jax.lax.dynamic_slice_in_dim(x_1PD, slots.lengths[0] - 1, 1, axis=1)
    return *_draw_first(model, slots, last_11D, allowed_1W), constrain(prompt_PR, None, None)


def fill_on(
    model: TransformerLM, cache: KVCache, start: jax.Array, arrays: tuple, allowed_1W: jax.Array | None
) -> tuple[Slots, jax.Array]:
    """`fill` where a cache holds the first `start` tokens of the prompt, as `go_on` takes it; no token is scored."""
    return _draw_first(model, *go_on(model, cache, start, *arrays), allowed_1W)


def _draw_first(
    model: TransformerLM, slots: Slots, last_11D: jax.Array, allowed_1W: jax.Array | None
) -> tuple[Slots, jax.Array]:
    logits_1V = logits_of(model, last_11D)[:, 0]
    slots = slots.draw(only(allowed_1W, logits_1V), jnp.ones(1, bool))
    return slots, constrain(report(logits_1V, slots.last), None, None)


def decode(
    model: TransformerLM, slots: Slots, busy_B: jax.Array, allowed_BW: jax.Array | None = None, *, steps: int
) -> tuple[Slots, jax.Array]:
    """`steps` tokens more for each busy slot: the slots, and the reports of these tokens [steps, B, R].

    With `allowed` there is one step, since each token decides what the next may be. Where a row ends, the host knows,
    and looks at no more of it.
    """

    def one(slots: Slots, _) -> tuple[Slots, jax.Array]:
        slots, logits_BV = step(model, slots, busy_B & (slots.lengths < slots.cache.capacity), allowed_BW)
        return slots, report(logits_BV, slots.last)

    slots, reports_KBR = jax.lax.scan(one, slots, None, length=steps if allowed_BW is None else 1)
    return slots.constrained(), constrain(reports_KBR, None, None, None)


class Batcher:
    """Completions in S slots of one cache. One thread calls it; `check` any may.

    The cache has room for the longest completion under way, in powers of two, since attention reads all of it: a step
    costs what is held, not what could be, and copies nothing. Where that grows, old and new are held for a moment, at
    most one and a half times the cache for `capacity` tokens.

    Args:
      params: fastest as `prepare` leaves them; may be sharded over a mesh, and then `placement` says how the rest is.
      slots: how many completions run at once; all of them are computed, used or not.
      capacity: the most tokens a slot can hold, prompt included; at most max_seq_len of them are used.
      prefix_tokens: for how many tokens caches of earlier texts may have room, beside the slots. What a prompt shares
        with the beginning of one of them, if it is half of the prompt at least, is not read again.
      grammars: whether requests may have a grammar. While one is under way, steps take one token a slot.
      tokens_per_step: how many tokens a slot takes in one `step`; more cost fewer calls, and a newcomer waits longer.
      placement: what `axes.bound` takes, to place slots and heads over devices. The mesh axes that split a batch must
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
        prefix_tokens: int = 0,
        grammars: bool = False,
        placement: Placement | None = None,
    ):
        for name, value in {"slots": slots, "capacity": capacity, "tokens_per_step": tokens_per_step}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1; try 16")
        self.config, self.params = config, params
        self.capacity, self.tokens_per_step = min(capacity, config.max_seq_len), tokens_per_step
        self._rooms = [bucket(1, self.capacity)]
        while self._rooms[-1] < self.capacity:
            self._rooms.append(bucket(self._rooms[-1] + 1, self.capacity))
        self._running: list[_Running | None] = [None] * slots
        self._words = -(-config.vocab_size // 32) if grammars else 0
        self._prefixes = Prefixes(prefix_tokens) if prefix_tokens else None
        self.reused = 0
        """Tokens of prompts that were not read again, since the first."""
        row = None if placement is None else _OneRow(placement)

        # Fresh closures, since JAX knows nothing of what is bound.
        def create_slots(params):
            with bound(placement):
                return Slots.create(TransformerLM.from_params(config, params), slots, self._rooms[0])

        def fill_row(params, *args):
            with bound(row):
                return fill(TransformerLM.from_params(config, params), *args)

        def fill_row_on(params, *args):
            with bound(row):
                return fill_on(TransformerLM.from_params(config, params), *args)

        def insert(slots, slot, filled):
            with bound(placement):
                return slots.insert(slot, filled)

        def take_step(params, slots, busy, allowed=None):
            with bound(placement):
                return decode(TransformerLM.from_params(config, params), slots, busy, allowed, steps=tokens_per_step)

        self._create, self._fill, self._fill_on = jax.jit(create_slots), jax.jit(fill_row), jax.jit(fill_row_on)
        self._insert, self._resize = jax.jit(insert, donate_argnums=0), jax.jit(KVCache.resize, static_argnums=1)
        self._step, self._row = jax.jit(take_step, donate_argnums=1), jax.jit(KVCache.row)
        self._slots: Slots = self._create(params)

    @property
    def free(self) -> int:
        """How many slots are free now."""
        return self._running.count(None)

    @property
    def under_way(self) -> set[int]:
        """The tickets of the completions that hold a slot."""
        return {running.ticket for running in self._running if running}

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that can never run here."""
        request.check(self.config, self.capacity)
        if len(request.prompts) > 1:
            raise ValueError(f"{len(request.prompts)} prompts must be 1 a completion; admit one after another")
        if request.grammar and not self._words:
            raise ValueError("a request with a grammar needs a Batcher for them; make it with grammars=True")

    def admit(self, ticket: int, request: Request) -> list[Token]:
        """Prefills a free slot: the tokens of the prompt if asked for, then the first that is drawn.

        Args:
          ticket: any number that no completion under way has.
          request: of one prompt.

        Raises:
          ValueError: from `check`; or no slot is free, or the ticket is in use.
        """
        self.check(request)
        if not self.free:
            raise ValueError(f"all {len(self._running)} slots are busy; admit once `free` is above 0")
        if ticket in self.under_way:
            raise ValueError(f"ticket={ticket} is under way; give each completion its own")
        matcher = request.grammar() if request.grammar else None
        row, drawn, prompt_scores = self._prefill(request, matcher)
        if self._prefixes and row.cache.keeps_all(row.cache.capacity):
            self._prefixes.keep(request.prompts[0], row.cache)
        tokens = [] if prompt_scores is None else list(_prompt_tokens(ticket, request, prompt_scores))
        if request.max_tokens:
            slot, running = self._running.index(None), _Running(ticket, request, matcher)
            self._running[slot] = running
            self._make_room(self._longest + self.tokens_per_step)
            self._put(slot, row)
            tokens.append(self._take(slot, running, np.asarray(drawn)[0]))
        return tokens

    def _prefill(self, request: Request, matcher: Matcher | None = None) -> tuple[Slots, jax.Array, jax.Array | None]:
        allowed = self._allowed([matcher]) if self._words else None
        arrays, (prompt,) = request.prompt_arrays(self.capacity), request.prompts
        room, shared, cache = arrays[0].shape[1], 0, None
        if self._prefixes and not request.prompt_logprobs:
            shared, cache = self._prefixes.find(prompt)
        parts = math.ceil((len(prompt) - shared) / PART)
        fits = shared + parts * PART <= room
        if cache is None or 2 * shared < len(prompt) or not fits or not cache.keeps_all(room):
            row, drawn, scores = self._fill(self.params, arrays, np.bool_(request.prompt_logprobs), allowed)
            return row, drawn, scores if request.prompt_logprobs else None
        self.reused += shared
        return *self._fill_on(self.params, self._resized(cache, room), np.int32(shared), arrays, allowed), None

    def _allowed(self, matchers: Sequence[Matcher | None]) -> np.ndarray:
        """The bits of `Matcher.allowed` for each row, [B, W]; all tokens where it has no matcher."""
        free = np.full(self._words, -1, np.int32)
        return np.stack([matcher.allowed() if matcher else free for matcher in matchers])

    def _put(self, slot: int, row: Slots) -> None:
        row = dataclasses.replace(row, cache=self._resized(row.cache, self._slots.cache.capacity))
        self._slots = self._insert(self._slots, np.int32(slot), row)

    @property
    def _longest(self) -> int:
        return max((running.length for running in self._running if running), default=0)

    def _make_room(self, tokens: int) -> None:
        """A cache for rows of so many tokens, which may be a smaller one."""
        for room in self._between(self._slots.cache, bucket(tokens, self.capacity)):
            self._slots = dataclasses.replace(self._slots, cache=self._resize(self._slots.cache, room))

    def _resized(self, cache: KVCache, room: int) -> KVCache:
        """A cache of one row with another room."""
        for size in self._between(cache, room):
            cache = self._resize(cache, size)
        return cache

    def _between(self, cache: KVCache, room: int) -> list[int]:
        """The sizes that lead to a room, from neighbour to neighbour, since each pair of sizes is a program."""
        now, then = self._rooms.index(cache.capacity), self._rooms.index(room)
        return self._rooms[now + 1 : then + 1] or self._rooms[then:now][::-1]

    def _take(self, slot: int, running: _Running, words_R: np.ndarray) -> Token:
        """A drawn token, which frees the slot if it is the last."""
        token = running.take(words_R)
        if token.finish:
            self._running[slot] = None
            self._keep(slot, running)
        return token

    def _keep(self, slot: int, running: _Running) -> None:
        """Keeps what a slot holds of a completion that ended, for a prompt that goes on from it."""
        held = [*running.request.prompts[0].tolist(), *running.generated[:-1]]  # the last was not fed
        if self._prefixes and len(running.generated) > 1 and self._slots.cache.keeps_all(self.capacity):
            row = self._resized(self._row(self._slots.cache, np.int32(slot)), bucket(len(held), self.capacity))
            self._prefixes.keep(np.array(held, np.int32), row)

    def step(self) -> list[Token]:
        """Some tokens more for every busy slot, each completion's in order; nothing where none is busy."""
        busy = np.array([running is not None for running in self._running])
        if not busy.any():
            return []
        self._make_room(self._longest + self.tokens_per_step)
        matchers = [running and running.matcher for running in self._running]
        allowed = (self._allowed(matchers),) if any(matchers) else ()
        self._slots, reports = self._step(self.params, self._slots, busy, *allowed)
        return [
            self._take(slot, running, words)
            for words_BR in np.asarray(reports)
            for slot, words in enumerate(words_BR)
            if (running := self._running[slot])
        ]

    def cancel(self, ticket: int) -> None:
        """Frees the slot of a completion at once; an unknown ticket has no effect."""
        self._running = [None if running and running.ticket == ticket else running for running in self._running]

    def warm_up(self) -> None:
        """Compiles prompts and steps of every length, so that no request waits; raises ValueError if a slot is busy."""
        if self.free < len(self._running):
            raise ValueError("completions are under way; warm up before the first")
        for room in self._rooms:
            self._make_room(room)
            for length in {self._rooms[0], room}:
                request = Request.one(np.zeros(length, np.int32), max_tokens=0)
                row, *_ = self._prefill(request)
                self._put(0, row)
                if self._prefixes:
                    row = self._row(self._slots.cache, np.int32(0))
                    cache = self._resized(self._resized(row, self._rooms[0]), length)
                    if length > PART:  # a shorter prompt has no room for a part behind what is shared
                        allowed = self._allowed([None]) if self._words else None
                        arrays = request.prompt_arrays(self.capacity)
                        self._fill_on(self.params, cache, np.int32(0), arrays, allowed)
            self._step_idle()
        self._make_room(self._rooms[0])

    def _step_idle(self) -> None:
        idle = np.zeros(len(self._running), bool)
        for allowed in ((), (self._allowed([None] * len(idle)),)) if self._words else ((),):
            self._slots, reports = self._step(self.params, self._slots, idle, *allowed)
            reports.block_until_ready()

    def rebuild(self) -> None:
        """Empty slots in place of those that a failed call may have taken along; completions under way are gone.

        Raises what a step raises where the device does not compute.
        """
        self._running = [None] * len(self._running)
        if self._prefixes:
            self._prefixes.clear()
        for x in jax.tree.leaves(self._slots):  # whoever still refers to them, such as a traceback
            x.delete()
        self._slots = self._create(self.params)
        self._step_idle()


def _prompt_tokens(ticket: int, request: Request, scores_PR: jax.Array) -> Iterator[Token]:
    """The tokens of a prompt, from what follows each of its tokens."""
    (prompt,) = request.prompts
    finish = None if request.max_tokens else "length"
    yield Token(ticket, int(prompt[0]), None, (), True, finish if len(prompt) == 1 else None)
    for at, words_R in enumerate(np.asarray(scores_PR)[: len(prompt) - 1], start=2):
        yield Token(ticket, *read_report(words_R), True, finish if at == len(prompt) else None)


class _OneRow(Placement):
    """A placement for one prompt, a row that no devices can share: each works on it with the heads that it has."""

    def __init__(self, placement: Placement):
        self._placement, self.ragged = placement, placement.ragged

    def constrain(self, x: jax.Array, names: Names) -> jax.Array:
        return self._placement.constrain(x, _alone(names))

    def gather(self, x: jax.Array, names: Names) -> jax.Array:
        return self._placement.gather(x, names)

    def local(self, fn: Callable, in_names: Sequence[Names], out_names: Names, *, checked: bool) -> Callable:
        return self._placement.local(fn, [_alone(names) for names in in_names], _alone(out_names), checked=checked)

    def group(self, name: str) -> tuple[str, ...]:
        return self._placement.group(name)

    def alike(self, fn: Callable) -> Callable:
        return self._placement.alike(fn)


def _alone(names: Names) -> Names:
    return [None if name == "batch" else name for name in names]
