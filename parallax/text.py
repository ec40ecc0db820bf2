"""Prompts to a request, and the tokens that answer it back to text.

Invariant: a text is the same whether it is taken in pieces or at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Unpack

import numpy as np

from parallax.inference.context import Context
from parallax.inference.request import Request
from parallax.inference.sampling import Sampling, SamplingSettings
from parallax.inference.stopping import StopFilter
from parallax.tokenizers.base import StreamDecoder, Tokenizer


class Options(Sampling, total=False):
    """How a prompt is continued: sampling settings and these; what is left out is as in generate.py."""

    max_tokens: int
    """How many tokens to add at most."""
    stop: str | Sequence[str]
    """End before this text, or before the first of several."""
    seed: int
    """All draws follow from it; prompt i, from 0, is continued as it would be alone with seed + i."""
    context: Context
    """What happens where the text outgrows the length of the model's training; by default "slide"."""


def make_request(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int = 200,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    **sampling: Unpack[Sampling],
) -> Request:
    """The request that `Options` describe, one row a prompt, at temperature 0.8 by default.

    Rows end with any id that ends a text. Raises ValueError if the tokenizer cannot spell a prompt or a stop, or a
    setting is out of its range.
    """
    rows = len(prompts)
    other_ends = [np.array([token], np.int32) for token in tokenizer.end_ids if token != tokenizer.eos_id]
    given: Sampling = {"temperature": 0.8, **sampling}
    return Request(
        prompts=[tokenizer.encode(prompt) for prompt in prompts],
        settings=SamplingSettings.create(rows, **given),
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
