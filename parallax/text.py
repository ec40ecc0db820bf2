"""Prompts to a request, and the tokens that answer it back to text.

Invariant: a text is the same whether it is taken in pieces or at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict

import numpy as np

from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.inference.stopping import StopFilter
from parallax.tokenizers.base import StreamDecoder, Tokenizer


class Options(TypedDict, total=False):
    """How a prompt is continued; what is left out is as in `make_request`, and as in generate.py."""

    max_tokens: int
    """How many tokens to add at most."""
    temperature: float
    """The lower, the rarer are unlikely tokens; 0 is greedy."""
    top_k: int
    """Draw from the k most probable tokens; 0 is off."""
    top_p: float
    """Draw from the fewest most probable tokens whose probability reaches p; 1 is off."""
    min_p: float
    """Draw from tokens with at least this share of the highest probability; 0 is off."""
    repetition_penalty: float
    """Above 1 makes tokens that occurred before less likely; 1 is off."""
    stop: str | Sequence[str]
    """End before this text, or before the first of several."""
    seed: int
    """All draws follow from it; prompt i, from 0, is continued as it would be alone with seed + i."""


def make_request(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int = 0,
) -> Request:
    """The request that `Options` describe, one row a prompt. Rows end with any id that ends a text.

    Raises:
      ValueError: the tokenizer cannot spell a prompt or a stop, or a setting is out of its range.
    """
    rows = len(prompts)
    other_ends = [np.array([token], np.int32) for token in tokenizer.end_ids if token != tokenizer.eos_id]
    settings = SamplingSettings.create(
        rows,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    return Request(
        prompts=[tokenizer.encode(prompt) for prompt in prompts],
        settings=settings,
        seeds=range(seed, seed + rows),
        max_tokens=max_tokens,
        stops=[*(tokenizer.encode_part(text) for text in listed(stop)), *other_ends],
        eos_id=tokenizer.eos_id,
    )


def listed(texts: str | Sequence[str]) -> list[str]:
    """One text or several as a list."""
    return [texts] if isinstance(texts, str) else list(texts)


def decode(tokens: Iterable[int], tokenizer: Tokenizer, stop: str | Sequence[str] = ()) -> Iterator[str]:
    """The text of tokens, in pieces as they come, some of them empty, up to the first stop."""
    decoder, until_stop = StreamDecoder(tokenizer), StopFilter(listed(stop))
    for token in tokens:
        yield until_stop.push(decoder.push(token))
        if until_stop.stopped:
            return
    yield until_stop.push(decoder.flush())
    yield until_stop.flush()
