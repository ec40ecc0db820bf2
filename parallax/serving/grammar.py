"""Answers that are JSON: which tokens may come next, by llguidance.

Invariant: what is drawn is the beginning of a text that the schema allows, and the answer ends where such a text ends.
An answer that reaches its most tokens first is such a beginning, and its finish_reason says so.
"""

from collections.abc import Callable
from typing import Any

import llguidance
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from parallax.inference.request import Matcher
from parallax.tokenizers.base import Tokenizer

OPTIONS: Any = {"whitespace_flexible": False}  # no spaces but in texts: a model could write them without end


class Grammars:
    """The grammars of answers in one tokenizer, which is read once."""

    def __init__(self, tokenizer: Tokenizer):
        self._size = tokenizer.vocab_size
        self._vocabulary: Any = _Vocabulary(tokenizer)
        ends = list(tokenizer.end_ids) or [self._size]
        self._tokenizer = llguidance.LLTokenizer(self._vocabulary, n_vocab=self._size + 1, eos_token=ends)

    def json(self, schema: dict[str, Any] | None = None) -> Callable[[], Matcher]:
        """Makes matchers of any object, or of what a JSON Schema allows.

        Raises ValueError for a schema that cannot be followed to the letter, or a tokenizer that cannot spell it.
        """
        try:
            self._vocabulary("{}")
        except ValueError as error:
            raise ValueError(f"this model's tokenizer spells no JSON ({error}); ask for text") from None
        given = {"type": "object"} if schema is None else schema
        grammar = llguidance.LLMatcher.grammar_from_json_schema(given, overrides=OPTIONS)
        first = JsonMatcher(llguidance.LLMatcher(self._tokenizer, grammar), self._size)
        fault = first.fault()
        # llguidance panics where the tokenizer raises: it cannot spell a text that must come next.
        if "panic" in fault or not (fault or first.allowed().any()):
            raise ValueError("this model's tokenizer spells no answer of this schema; ask for text")
        if fault:
            raise ValueError(f"the schema cannot be followed ({fault}); leave that out, or ask for json_object")
        return lambda: JsonMatcher(llguidance.LLMatcher(self._tokenizer, grammar), self._size)


class JsonMatcher:
    """One answer under way."""

    def __init__(self, matcher: llguidance.LLMatcher, size: int):
        self._matcher, self._size = matcher, size
        self._words = self._next()

    def allowed(self) -> np.ndarray:
        return self._words

    def take(self, token_id: int) -> str | None:
        self._matcher.consume_token(token_id)
        if self._matcher.is_stopped() and not self.fault():
            return "stop"
        self._words = self._next()
        return None if np.any(self._words) else "length"  # what came is a beginning that no token goes on from

    def _next(self) -> np.ndarray:
        if self.fault():
            return np.zeros(-(-self._size // 32), np.int32)
        mask = allocate_token_bitmask(1, self._size + 1)
        fill_next_token_bitmask(self._matcher, mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        bits[self._size :] = 0
        return np.packbits(bits, bitorder="little").view(np.int32)[: -(-self._size // 32)]

    def fault(self) -> str:
        """Why no more can be said of what comes next; the limits of llguidance bound what a schema may cost."""
        said = self._matcher.get_error() if self._matcher.is_error() else ""
        return " ".join(said.partition("<state>")[0].split())[:300]  # what follows is the library's own state


class _Vocabulary:
    """A tokenizer as llguidance reads it, with one id more, which ends a text where no other does."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer):
        size = tokenizer.vocab_size
        self._tokenizer, self.eos_token_id = tokenizer, size if tokenizer.eos_id is None else tokenizer.eos_id
        pieces = [*map(tokenizer.token_bytes, range(size)), b""]
        self.special_token_ids = [token for token, piece in enumerate(pieces) if not piece]
        self.tokens = [piece or b"<%d>" % token for token, piece in enumerate(pieces)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode_part(text).tolist()
