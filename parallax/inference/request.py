"""A request for generation, checked and padded.

Invariant: whatever leaves `arrays` the compiled functions can run, and its shapes are few: the length of prompts is
rounded up to a power of two and that of the whole to an eighth of one, no less than the former, so that a new one
seldom needs a compilation.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from parallax.config import TransformerConfig
from parallax.inference.sampling import SETTINGS, SamplingSettings
from parallax.inference.stopping import NO_TOKEN, pack_stops, round_up

SMALLEST_BUCKET = 32
"""Tokens: shorter prompts and caches are padded to this."""


def bucket(length: int, most: int) -> int:
    """Room for so many tokens, of few sizes, so that few are compiled for; no more than `most`."""
    return min(max(SMALLEST_BUCKET, round_up(length)), most)


class Matcher(Protocol):
    """Says which tokens may come next in one text, while it is generated."""

    def allowed(self) -> np.ndarray:
        """int32 [⌈V / 32⌉]: bit v % 32 of word v // 32 is 1 where token v may be drawn; one at least is."""
        ...

    def take(self, token_id: int) -> str | None:
        """Adds the token that was drawn. Why the text ends with it, as `Token.finish` has it, or None."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to continue, and how; one prompt, seed and setting a row."""

    prompts: Sequence[np.ndarray]
    """Token ids; lengths may differ."""
    settings: SamplingSettings
    seeds: Sequence[int]
    """In [0, 2^32)."""
    max_tokens: int
    """How many tokens to add at most; 0 only with `prompt_logprobs`, to score a text and add nothing."""
    stops: Sequence[np.ndarray] = ()
    """Token sequences; a row ends when its generated tokens end with one of them."""
    eos_id: int | None = None
    """The token that ends a row."""
    prompt_logprobs: bool = False
    """Whether the tokens of the prompt are reported too, which a Batcher does."""
    grammar: Callable[[], Matcher] | None = None
    """Makes what says which tokens a text may consist of, which a Batcher asks."""

    @classmethod
    def one(cls, prompt: np.ndarray, *, max_tokens: int, seed: int = 0, **others: Any) -> "Request":
        """A request of one row; sampling settings are given by their names."""
        settings = SamplingSettings.create(1, **{name: others.pop(name) for name in SETTINGS if name in others})
        return cls(prompts=[prompt], settings=settings, seeds=[seed], max_tokens=max_tokens, **others)

    def arrays(self, config: TransformerConfig) -> tuple[tuple, int]:
        """The arguments of `generate.read_prompts`, and `capacity`; raises ValueError as `check`, or for no tokens."""
        self.check(config)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1; try 200")
        whole = max(len(prompt) for prompt in self.prompts) + self.max_tokens
        # Each token costs what the cache has room for: a power of two would be up to twice of what is needed.
        part = max(SMALLEST_BUCKET, round_up(whole) // 8)
        tokens, *others = self.prompt_arrays(config.max_seq_len)
        capacity = min(max(tokens.shape[1], part * math.ceil(whole / part)), config.max_seq_len)
        eos_id = NO_TOKEN if self.eos_id is None else self.eos_id
        ends = np.int32(self.max_tokens), pack_stops(self.stops), np.int32(eos_id)
        return (tokens, *others, *ends), capacity

    def prompt_arrays(self, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, SamplingSettings]:
        """What `slots.prefill` reads: prompts padded to P ≤ `most` tokens, lengths, seeds and settings."""
        lengths = np.array([len(prompt) for prompt in self.prompts], np.int32)
        tokens = np.zeros((len(lengths), bucket(int(lengths.max()), most)), np.int32)
        for row, prompt in enumerate(self.prompts):
            tokens[row, : len(prompt)] = prompt
        return tokens, lengths, np.array(self.seeds, np.uint32), self.settings

    def check(self, config: TransformerConfig, slot: int | None = None) -> None:
        """Whether a model can run it, in slots of so many tokens if they are limited.

        Raises ValueError if a prompt is empty, too long or holds foreign ids, a number is out of range, or there is not
        one seed and setting a row.
        """
        num_rows, num_settings = len(self.prompts), len(self.settings.temperature)
        if not num_rows or not all(len(prompt) for prompt in self.prompts):
            raise ValueError("prompt is empty (0 tokens); give at least one token to continue from")
        if self.max_tokens < 0 or (self.max_tokens == 0 and not self.prompt_logprobs):
            remedy = "try 200, or 0 with prompt_logprobs"
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1; {remedy}")
        longest, limit = max(len(prompt) for prompt in self.prompts), slot or config.max_seq_len
        if longest + self.max_tokens > limit:
            remedy = f"max_tokens {limit - longest}" if longest < limit else "a shorter prompt"
            rule = f"the {slot} tokens that a slot holds" if slot else f"max_seq_len={limit}"
            given = f"prompt of {longest} tokens + max_tokens={self.max_tokens}"
            raise ValueError(f"{given} must not exceed {rule}; try {remedy}")
        pack_stops(self.stops)
        eos = [] if self.eos_id is None else [self.eos_id]
        for token in (int(token) for ids in (*self.prompts, *self.stops, eos) for token in ids):
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"token id {token} must be in [0, vocab_size={config.vocab_size}); "
                    "encode with the tokenizer of the run"
                )
        if not len(self.seeds) == num_settings == num_rows:
            raise ValueError(
                f"{num_rows} prompts have {len(self.seeds)} seeds and {num_settings} settings; give one a prompt"
            )
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"seed={seed} must be in [0, 2^32); try 0")
