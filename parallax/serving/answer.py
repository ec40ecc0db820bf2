"""Completions as OpenAI's API tells of them: in one object, or as server-sent events.

Invariant: the streamed pieces of an answer, joined, are the answer that is sent in one object.
"""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from parallax.serving.engine import Job
from parallax.serving.errors import Refusal, to_json
from parallax.serving.metrics import Counts
from parallax.serving.request import Ask
from parallax.serving.text import AnswerText, Mark, Piece, logprobs_json
from parallax.tokenizers.base import Tokenizer


class Answer:
    """The answer to one request."""

    def __init__(self, ask: Ask, job: Job, tokenizer: Tokenizer, model: str, counts: Counts):
        self._ask, self._job, self._tokenizer, self._counts = ask, job, tokenizer, counts
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._texts = [
            AnswerText(tokenizer, prompt, ask.stops, echo=ask.echo)
            for prompt in ask.prompts
            for _ in range(ask.n)
        ]
        self._unfinished = len(self._texts)

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
            self._choice(number, Piece(*parts))
            for number, parts in enumerate(zip(texts, marks, finishes, strict=True))
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, one a piece; where the server ends, the last one tells of the error."""
        usage = {"usage": None} if self._ask.include_usage else {}
        try:
            async for number, piece in self._pieces():
                if piece.text or piece.finish or (piece.marks and self._ask.logprobs is not None):
                    yield _event({**self._head, "choices": [self._choice(number, piece)], **usage})
        except Refusal as refusal:
            yield _event(refusal.body())
            return
        if self._ask.include_usage:
            yield _event({**self._head, "choices": [], "usage": self._usage()})
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

    def _usage(self) -> dict[str, int]:
        prompt = sum(map(len, self._ask.prompts))
        completion = sum(text.generated for text in self._texts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


def _event(value: Any) -> str:
    return f"data: {to_json(value)}\n\n"
