"""What one sequence of a batch asks for, and what it is answered, token by token.

Invariant: plain values of the host. Where a completion ends is decided here alone, by its own tokens.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from parallax.inference.sampling import SamplingSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What one sequence asks for; n completions of a prompt are n of these with different seeds."""

    prompt: np.ndarray
    """int32 token ids, at least one."""
    max_tokens: int
    """How many tokens to add at most; 0 only with `prompt_logprobs`, to score a text and add nothing."""
    temperature: float = 1.0
    """This and the next four as in `sampling.SamplingSettings`."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    """In [0, 2^32)."""
    stops: Sequence[np.ndarray] = ()
    """Token sequences; it ends when the generated tokens end with one of them."""
    eos_id: int | None = None
    """The token that ends it."""
    prompt_logprobs: bool = False
    """Whether the tokens of the prompt are reported too."""

    def settings(self) -> SamplingSettings:
        """Raises ValueError where one is out of its range."""
        return SamplingSettings.create(
            1,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


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
class Running:
    """A completion under way, as the host knows it."""

    ticket: int
    completion: Completion
    generated: list[int] = dataclasses.field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.completion.prompt) + len(self.generated)

    def take(self, token: int) -> str | None:
        """Adds a token; why it is the last one, or None."""
        self.generated.append(token)
        completion = self.completion
        if token == completion.eos_id or any(
            self.generated[-len(stop) :] == list(stop) for stop in completion.stops
        ):
            return "stop"
        return "length" if len(self.generated) == completion.max_tokens else None
