"""What is asked of a generation, checked and padded.

Invariant: whatever leaves `arrays` the compiled functions can run, and its shapes are few: the length of prompts is
rounded up to a power of two and that of the whole to an eighth of one, no less than the former, so that a new one
seldom needs a compilation.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from parallax.config import TransformerConfig
from parallax.inference.sampling import SamplingSettings
from parallax.inference.stopping import NO_TOKEN, pack_stops, round_up

SMALLEST_BUCKET = 32
"""Tokens: shorter prompts and caches are padded to this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to continue, and how; one prompt, seed and setting a row."""

    prompts: Sequence[np.ndarray]
    """Token ids; lengths may differ."""
    settings: SamplingSettings
    seeds: Sequence[int]
    """In [0, 2^32)."""
    max_tokens: int
    """How many tokens to add at most."""
    stops: Sequence[np.ndarray] = ()
    """Token sequences; a row ends when its generated tokens end with one of them."""
    eos_id: int | None = None
    """The token that ends a row."""

    def arrays(self, config: TransformerConfig) -> tuple[tuple, int]:
        """The arguments of `generate.start` between `params` and `limit`, and its `capacity`.

        Raises:
          ValueError: a prompt is empty, too long for the model or holds foreign ids, a number is out of
            range, or there is not one seed and setting a row.
        """
        self._check(config)
        longest = max(len(prompt) for prompt in self.prompts)
        width, whole = max(SMALLEST_BUCKET, round_up(longest)), longest + self.max_tokens
        # Each token costs what the cache has room for: a power of two would be up to twice of what is needed.
        part = max(SMALLEST_BUCKET, round_up(whole) // 8)
        sizes = width, max(width, part * math.ceil(whole / part))
        width, capacity = (min(size, config.max_seq_len) for size in sizes)
        tokens = np.zeros((len(self.prompts), width), np.int32)
        for row, prompt in enumerate(self.prompts):
            tokens[row, : len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in self.prompts], np.int32)
        seeds, eos_id = np.array(self.seeds, np.uint32), NO_TOKEN if self.eos_id is None else self.eos_id
        return (tokens, lengths, self.settings, seeds, pack_stops(self.stops), np.int32(eos_id)), capacity

    def _check(self, config: TransformerConfig) -> None:
        num_rows, num_settings = len(self.prompts), len(self.settings.temperature)
        limit = config.max_seq_len
        if not num_rows or not all(len(prompt) for prompt in self.prompts):
            raise ValueError("prompt is empty (0 tokens); give at least one token to continue from")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1; try 200")
        longest = max(len(prompt) for prompt in self.prompts)
        if longest + self.max_tokens > limit:
            remedy = f"max_tokens {limit - longest}" if longest < limit else "a shorter prompt"
            raise ValueError(
                f"prompt of {longest} tokens + max_tokens={self.max_tokens} must not exceed "
                f"max_seq_len={limit}; try {remedy}"
            )
        check_ids(config, [*self.prompts, *self.stops, [] if self.eos_id is None else [self.eos_id]])
        if not len(self.seeds) == num_settings == num_rows:
            raise ValueError(
                f"{num_rows} prompts have {len(self.seeds)} seeds and {num_settings} settings; "
                "give one a prompt"
            )
        for seed in self.seeds:
            check_seed(seed)


def check_ids(config: TransformerConfig, sequences: Iterable[Iterable[int]]) -> None:
    """Raises ValueError for a token id that the model does not know."""
    for token in (int(token) for sequence in sequences for token in sequence):
        if not 0 <= token < config.vocab_size:
            raise ValueError(
                f"token id {token} must lie in [0, vocab_size={config.vocab_size}); "
                "encode with the tokenizer of the run"
            )


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that no key can be made from."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie in [0, 2^32); try 0")
