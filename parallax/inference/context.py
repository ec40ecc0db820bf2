"""Texts longer than what a model reads at once.

Invariant: up to that length a text is, token for token, the one that the generator gives; and a row depends on its own
prompt, settings and seed alone, here too.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol, get_args

import jax
import numpy as np

from parallax.inference.request import Request
from parallax.inference.speculative import SpeculativeGenerator

Context = Literal["slide", "crop", "extend"]
"""What happens to a text that outgrows the length of a model's training. slide: the model reads the last half of that
length again, and goes on from there; crop: the text ends; extend: the model goes on as far as its max_seq_len, at
distances between tokens that it never saw."""
NEXT_WINDOW = 0x9E3779B9
"""Added to a seed for each window, modulo 2^32: positions repeat, and the same draws would."""

Tokens = Iterable[tuple[int, int]]
"""(row, token) as they are drawn."""


class AnyGenerator(Protocol):
    """`Generator`, or one with a draft."""

    def generate(self, params: Any, request: Request) -> list[np.ndarray]: ...

    def stream(self, params: Any, request: Request, chunk: int = 8) -> Iterator[tuple[int, int]]: ...


class ContextGenerator:
    """A generator whose model reads at most `length` tokens, as `context` says; a penalty sees these alone."""

    def __init__(self, generator: AnyGenerator, context: Context, length: int):
        if context not in get_args(Context):
            raise ValueError(f"context={context!r} is not one of {', '.join(get_args(Context))}; try slide")
        self._generator, self._context, self._length = generator, context, max(2, length)
        self.proposed = self.accepted = 0
        """Tokens that a draft proposed for the latest request so far, and those of them that passed."""

    def outgrown(self, request: Request) -> bool:
        """Whether a text may become longer than the model reads."""
        return max(map(len, request.prompts), default=0) + request.max_tokens > self._length

    def generate(self, params: Any, request: Request) -> list[np.ndarray]:
        """The tokens after each prompt, int32. Raises ValueError as the generator, or where no token has room."""

        def ask(part: Request) -> Tokens:
            for row, tokens in enumerate(self._generator.generate(params, part)):
                yield from ((row, int(token)) for token in tokens)

        texts: list[list[int]] = [[] for _ in request.prompts]
        for row, token in self._in_windows(request, ask):
            texts[row].append(token)
        return [np.array(text, np.int32) for text in texts]

    def stream(self, params: Any, request: Request, chunk: int = 8) -> Iterator[tuple[int, int]]:
        """The tokens of `generate` as (row, token); raises ValueError as that, at the call."""
        return self._in_windows(request, lambda part: self._generator.stream(params, part, chunk))

    def _in_windows(self, request: Request, ask: Callable[[Request], Tokens]) -> Iterator[tuple[int, int]]:
        self.proposed = self.accepted = 0
        empty = not request.prompts or not all(map(len, request.prompts))  # which the generator refuses
        if empty or self._context == "extend" or not self.outgrown(request):
            return self._counted(ask(request))
        # Rows of one length outgrow it together; others would go on at the length of their neighbours.
        lengths = [len(prompt) for prompt in request.prompts]
        groups = [[row for row, each in enumerate(lengths) if each == length] for length in dict.fromkeys(lengths)]
        begun = []
        for rows in groups:
            texts = [request.prompts[row].tolist() for row in rows]
            first = self._window(request, rows, texts, len(texts[0]), request.max_tokens, 0)
            begun.append(self._follow(request, rows, texts, first, ask(first), ask))
        return itertools.chain.from_iterable(begun)

    def _window(
        self, request: Request, rows: list[int], texts: list[list[int]], length: int, left: int, number: int
    ) -> Request:
        """What to ask for in the window of this number, of some rows with texts of this length so far."""
        if length >= self._length and self._context == "crop":
            raise ValueError(
                f"prompt of {length} tokens leaves no room in the {self._length} that the model was trained at; "
                "try context=slide, or a shorter prompt"
            )
        kept, seeds = length if length < self._length else self._length // 2, [request.seeds[row] for row in rows]
        return dataclasses.replace(
            request,
            prompts=[np.array(text[-kept:], np.int32) for text in texts],
            settings=jax.tree.map(lambda x: np.asarray(x)[rows], request.settings),
            seeds=[(seed + number * NEXT_WINDOW) % 2**32 for seed in seeds] if number else seeds,
            max_tokens=min(left, self._length - kept),
        )

    def _follow(
        self,
        request: Request,
        rows: list[int],
        texts: list[list[int]],
        window: Request,
        tokens: Tokens,
        ask: Callable[[Request], Tokens],
    ) -> Iterator[tuple[int, int]]:
        """The tokens of some rows, from those of their first window on, as they are added to their texts."""
        stops, left = [np.asarray(stop).tolist() for stop in request.stops], request.max_tokens
        prompt_length, going = len(texts[0]), set(range(len(rows)))
        for number in itertools.count(1):
            for index, token in self._counted(tokens):
                if index in going:  # a stop may have begun in an earlier window, of which the generator knows nothing
                    text = texts[index]
                    text.append(token)
                    yield rows[index], token
                    tails = (text[max(prompt_length, len(text) - len(stop)) :] for stop in stops)
                    if token == request.eos_id or any(map(list.__eq__, tails, stops)):
                        going.remove(index)
            left -= window.max_tokens
            if not left or not going or self._context == "crop":
                return
            # Rows that ended stay: fewer would be another program to compile.
            window = self._window(request, rows, texts, len(texts[min(going)]), left, number)
            tokens = ask(window)

    def _counted(self, tokens: Tokens) -> Iterator[tuple[int, int]]:
        """The same tokens, of one window; what a draft proposed for it is added to what it did for earlier ones."""
        proposed, accepted = self.proposed, self.accepted
        for pair in tokens:
            if isinstance(self._generator, SpeculativeGenerator):
                self.proposed = proposed + self._generator.proposed
                self.accepted = accepted + self._generator.accepted
            yield pair
