"""The text of one answer as its tokens come, with what is known of each token.

Invariant: pieces joined are the text of the tokens up to, without, the first stop; no piece ends inside a character or
holds a part of a stop. A token is told of together with its text, and starts where its offset says, in characters.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from parallax.inference.batching import Token
from parallax.inference.stopping import StopFilter
from parallax.tokenizers.base import StreamDecoder, Tokenizer

END_OF_TEXT = "<|endoftext|>"
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
        "token_logprobs": [_finite(mark.token.logprob) for mark in marks],
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
        top.setdefault(spell(token_id, tokenizer), (token_id, _finite(logprob)))
    return top


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None or math.isfinite(logprob) else LEAST_LOGPROB
