"""The answer to a request as OpenAI's API states it: in one object, or as server-sent events while its tokens come.

Invariant: the streamed pieces, joined, are the answer that is sent in one object: the text of the tokens up to the
first stop, without it. No piece ends inside a character or holds a part of a stop. A token is reported together with
its text, and starts where its offset says, in characters.
"""

import dataclasses
import math
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from parallax.inference.batching import Token
from parallax.inference.stopping import StopFilter
from parallax.serving.engine import Counts, Job
from parallax.serving.errors import Refusal, to_json
from parallax.serving.request import Ask
from parallax.tokenizers.base import StreamDecoder, Tokenizer
from parallax.tokenizers.hugging_face import END_OF_TEXT

LEAST_LOGPROB = -9999.0
"""Stands for what JSON cannot hold: the logarithm of 0."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """A token in the text."""

    offset: int
    """Characters of the answer before it."""
    end: int
    """Characters of the answer up to its end; `offset` where it is a part of a character that others complete."""
    token: Token


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a token added to the answer."""

    text: str
    marks: Sequence[Mark]
    finish: str | None


class AnswerText:
    """Takes the tokens of one completion, in order.

    Args:
      prompt: its ids; a character that they begin, the first generated tokens may end.
      echo: whether the text begins with the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int], stops: Sequence[str], *, echo: bool):
        self.generated = 0
        """How many tokens were generated."""
        self._decoder = StreamDecoder(tokenizer)
        self._prompt = self._spell_prompt(tokenizer, list(prompt))
        self._until_stop = StopFilter(stops)
        self._echoes, self._echo = echo, "".join(self._prompt) if echo else ""
        self._read = 0  # tokens of the prompt that came back
        self._prompt_end = 0  # where the last of these ended
        self._shown = self._end = len(self._echo)  # characters let out, and characters decoded
        self._held: list[Mark] = []

    def _spell_prompt(self, tokenizer: Tokenizer, prompt: list[int]) -> list[str]:
        """The text of each token, without the space that SentencePiece puts before a text."""
        pieces = [self._decoder.push(token) for token in prompt]
        if not tokenizer.decode(prompt).startswith("".join(pieces)):
            first = next(index for index, piece in enumerate(pieces) if piece)
            pieces[first] = pieces[first].removeprefix(" ")
        return pieces

    def push(self, token: Token) -> Piece:
        """What the next token adds, perhaps nothing yet; after a piece with `finish` none may follow."""
        text, self._echo = self._echo, ""
        if token.is_prompt:
            return self._push_prompt(token)
        self.generated += 1
        piece = self._decoder.push(token.token_id)
        self._held.append(Mark(self._end, self._end + len(piece), token))
        self._end += len(piece)
        new = self._until_stop.push(piece)
        if token.finish:
            new += self._until_stop.push(self._decoder.flush()) + self._until_stop.flush()
        self._shown += len(new)
        if self._until_stop.stopped:
            return Piece(text + new, [mark for mark in self._held if mark.offset < self._shown], "stop")
        marks = [mark for mark in self._held if token.finish or mark.end <= self._shown]
        self._held = self._held[len(marks) :]
        return Piece(text + new, marks, token.finish)

    def _push_prompt(self, token: Token) -> Piece:
        text, start = self._prompt[self._read], self._prompt_end
        self._read += 1
        self._prompt_end += len(text)
        if not self._echoes:
            return Piece("", [], token.finish)
        return Piece(text, [Mark(start, self._prompt_end, token)], token.finish)


class Answer:
    """The answer to one request, as completions are answered."""

    PREFIX, WHOLE, PART = "cmpl", "text_completion", "text_completion"
    """What an id begins with, and what the whole answer and a piece of it are called."""

    def __init__(self, ask: Ask, job: Job, tokenizer: Tokenizer, model: str, counts: Counts):
        self._ask, self._job, self._tokenizer, self._counts = ask, job, tokenizer, counts
        self._head = {
            "id": f"{self.PREFIX}-{secrets.token_hex(12)}",
            "object": self.WHOLE,
            "created": int(time.time()),
            "model": model,
        }
        self._texts = [
            AnswerText(tokenizer, prompt, ask.stops, echo=ask.echo) for prompt in ask.prompts for _ in range(ask.n)
        ]
        self._unfinished = len(self._texts)
        self._introduced: set[int] = set()  # the choices of which a piece was sent

    async def whole(self) -> dict[str, Any]:
        """Everything at once; raises Refusal where the server ends."""
        texts = [""] * len(self._texts)
        marks: list[list[Mark]] = [[] for _ in texts]
        finishes: list[str | None] = [None] * len(texts)
        async for number, piece in self._pieces():
            texts[number] += piece.text
            marks[number] += piece.marks
            finishes[number] = piece.finish
        choices = [
            self._choice(number, Piece(*parts)) for number, parts in enumerate(zip(texts, marks, finishes, strict=True))
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, one a piece; where the server ends, the last one holds the error."""
        head = self._head | {"object": self.PART}
        usage = {"usage": None} if self._ask.include_usage else {}
        try:
            async for number, piece in self._pieces():
                if piece.text or piece.finish or (piece.marks and self._ask.logprobs is not None):
                    yield _event({**head, "choices": [self._part(number, piece)], **usage})
        except Refusal as refusal:
            yield _event(refusal.body())
            return
        if self._ask.include_usage:
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def close(self) -> None:
        """Frees what the answer still holds; for the end, and for a client that went away."""
        self._job.close()
        self._counts.answers.labels("unfinished").inc(self._unfinished)
        self._counts.tokens.labels("prompt").inc(self._usage()["prompt_tokens"])
        self._counts.tokens.labels("completion").inc(self._usage()["completion_tokens"])
        self._unfinished = 0

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        began = time.monotonic()
        async for number, token in self._job.tokens():
            if began:
                self._counts.first_token.observe(time.monotonic() - began)
                began = 0.0
            piece = self._texts[number].push(token)
            if piece.finish:
                self._unfinished -= 1
                self._counts.answers.labels(piece.finish).inc()
                self._job.drop(number)
            yield number, piece

    def _choice(self, number: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._ask.logprobs is not None:
            logprobs = logprobs_json(piece.marks, self._tokenizer, self._ask.logprobs)
        return {"index": number, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def _part(self, number: int, piece: Piece) -> dict[str, Any]:
        """A choice in a piece of a stream."""
        return self._choice(number, piece)

    def _usage(self) -> dict[str, int]:
        prompt = sum(map(len, self._ask.prompts))
        completion = sum(text.generated for text in self._texts)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _event(value: Any) -> str:
    return f"data: {to_json(value)}\n\n"


def spell(token_id: int, tokenizer: Tokenizer) -> str:
    r"""A token by itself, as OpenAI spells it: its text, or `bytes:\xe2\x80` for a part of a character."""
    if token_id in tokenizer.end_ids:
        return END_OF_TEXT
    spelling = tokenizer.token_bytes(token_id)
    try:
        return spelling.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


def logprobs_json(marks: Sequence[Mark], tokenizer: Tokenizer, count: int) -> dict[str, list]:
    """The `logprobs` of a choice, with the `count` most probable tokens in each place, and the token itself.

    `token_ids` and `top_token_ids` go beyond OpenAI's fields: with them a text can be continued from any token.
    """
    tops = [_top(mark.token, tokenizer, count) for mark in marks]
    return {
        "tokens": [spell(mark.token.token_id, tokenizer) for mark in marks],
        "token_logprobs": [finite(mark.token.logprob) for mark in marks],
        "top_logprobs": [top and {name: logprob for name, (_, logprob) in top.items()} for top in tops],
        "text_offset": [mark.offset for mark in marks],
        "token_ids": [mark.token.token_id for mark in marks],
        "top_token_ids": [top and [token_id for token_id, _ in top.values()] for top in tops],
    }


def _top(token: Token, tokenizer: Tokenizer, count: int) -> dict[str, tuple[int, float | None]] | None:
    """By spelling, best first; of two tokens that are spelled alike, the better. None where nothing came before."""
    if token.logprob is None:
        return None
    top: dict[str, tuple[int, float | None]] = {}
    for token_id, logprob in [*token.top[:count], (token.token_id, token.logprob)]:
        top.setdefault(spell(token_id, tokenizer), (token_id, finite(logprob)))
    return top


def finite(logprob: float | None) -> float | None:
    return logprob if logprob is None or math.isfinite(logprob) else LEAST_LOGPROB
