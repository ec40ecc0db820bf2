"""Prompts to a request, and the tokens that answer it back to text.

Invariant: a text is the same whether it is taken in pieces or at once.
"""

import operator
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Unpack

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
    stop: str | Sequence[str] | None
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
    stop: str | Sequence[str] | None = (),
    seed: int = 0,
    **sampling: Unpack[Sampling],
) -> Request:
    """The request that `Options` describe, one row a prompt, at temperature 0.8 by default.

    Rows end with any id that ends a text. Raises ValueError if the tokenizer cannot spell a prompt or a stop, one is no
    text, or a setting is out of its range.
    """
    prompts, seed = listed(prompts), whole_number("seed", seed)
    rows = len(prompts)
    other_ends = [np.array([token], np.int32) for token in tokenizer.end_ids if token != tokenizer.eos_id]
    given: Sampling = {"temperature": 0.8, **sampling}
    return Request(
        prompts=[tokenizer.encode(prompt) for prompt in prompts],
        settings=SamplingSettings.create(rows, **given),
        seeds=range(seed, seed + rows),
        max_tokens=whole_number("max_tokens", max_tokens),
        stops=[*(tokenizer.encode_part(text) for text in listed(stop)), *other_ends],
        eos_id=tokenizer.eos_id,
    )


def listed(texts: str | Sequence[str] | None) -> list[str]:
    """One text or several as a list, which is empty for None. Raises ValueError for what is no text."""
    alone = isinstance(texts, str | bytes) or not isinstance(texts, Iterable)
    several: list[Any] = [] if texts is None else [texts] if alone else list(texts)
    for text in several:
        if not isinstance(text, str):
            raise ValueError(f"{reprlib.repr(text)} must be a text; give a str, or a list of them")
    return several


def whole_number(name: str, value: Any) -> int:
    """An int of Python or NumPy as it is. Raises ValueError for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={reprlib.repr(value)} must be a whole number; give an int") from None


def decode(tokens: Iterable[int], tokenizer: Tokenizer, stop: str | Sequence[str] | None = ()) -> Iterator[str]:
    """The text of tokens, in pieces as they come, some of them empty, up to the first stop."""
    decoder, until_stop = StreamDecoder(tokenizer), StopFilter(listed(stop))
    for token in tokens:
        yield until_stop.push(decoder.push(token))
        if until_stop.stopped:
            return
    yield until_stop.push(decoder.flush())
    yield until_stop.flush()
