"""The answer to a chat request: a message, or its deltas while its tokens come.

Invariant: as for completions, the deltas of an answer, joined, are the message that is sent in one object.
"""

from typing import Any

from parallax.serving.answer import Answer, Mark, Piece, finite, spell
from parallax.tokenizers.base import Tokenizer


class ChatAnswer(Answer):
    """One choice an answer, each a message of the assistant."""

    PREFIX, WHOLE, PART = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, number: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": number, "message": message, **self._ending(piece)}

    def _part(self, number: int, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if number not in self._introduced:
            self._introduced.add(number)
            delta = {"role": "assistant", "content": piece.text}
        return {"index": number, "delta": delta, **self._ending(piece)}

    def _ending(self, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._ask.logprobs is not None:
            content = [logprob_json(mark, self._tokenizer, self._ask.logprobs) for mark in piece.marks]
            logprobs = {"content": content, "refusal": None}
        return {"logprobs": logprobs, "finish_reason": piece.finish}


def logprob_json(mark: Mark, tokenizer: Tokenizer, count: int) -> dict[str, Any]:
    """A token with its log-probability, its bytes, and the `count` most probable tokens in its place."""
    token = mark.token

    def one(token_id: int, logprob: float | None) -> dict[str, Any]:
        own = list(tokenizer.token_bytes(token_id))
        return {"token": spell(token_id, tokenizer), "logprob": finite(logprob), "bytes": own}

    return {**one(token.token_id, token.logprob), "top_logprobs": [one(*pair) for pair in token.top[:count]]}
