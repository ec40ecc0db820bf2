"""Conversations to token ids, by a chat template and the tokenizer of the same model.

Invariant: only the template writes special tokens. Where a message spells one, such as <|im_end|>, it is text: nobody
ends a turn, or begins another's, by what they say in theirs. Otherwise ids are those of transformers for the same text.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.chat_template import NOTHING, ChatTemplate, Message, random_mark
from parallax.tokenizers.hugging_face import END_OF_TEXT, HuggingFaceTokenizer
from parallax.tokenizers.native import encode_with_places

Learned = Literal["assistant", "last", "all"]
"""Whose turns a model learns: the assistant's, its last one alone, or everybody's."""


class Encoded(NamedTuple):
    """A conversation in tokens."""

    ids: np.ndarray
    """int32 [T]"""
    learned: np.ndarray
    """bool [T]: what the assistant writes, the token that ends its turn included."""


class Chat:
    """A template with its tokenizer.

    What a tokenizer holds as special cannot be spelled by messages, save a token of a single character.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer):
        self.template, self.tokenizer = template, tokenizer
        self._special = _special_tokens(tokenizer)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._spelled = _any_of(spelling for spelling in longest_first if len(spelling) > 1)
        self._inside, self._begin, self._end = (random_mark() for _ in range(3))
        # json.dumps may have spelled the marks by escapes.
        groups = ((mark, json.dumps(mark)[1:-1]) for mark in (self._inside, self._begin, self._end))
        marks = "|".join(f"({re.escape(mark)}|{re.escape(escaped)})" for mark, escaped in groups)
        self._parts = re.compile(f"{marks}|({_any_of(longest_first).pattern})")
        self._pieces = _encoder(tokenizer, self._special)

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = NOTHING,
    ) -> np.ndarray:
        """The ids that an assistant's answer follows, int32 [T].

        Raises ValueError if the template refuses the conversation, or the tokenizer cannot spell it.
        """
        (text,) = self._render([messages], tools, [True], variables)
        return self._encode(text)[0]

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        learned: Learned = "assistant",
        variables: Mapping[str, Any] = NOTHING,
    ) -> Encoded:
        """A whole conversation, and which of its tokens are to be learned.

        The assistant's turns are the template's {% generation %} blocks. Where it has none, a turn is what follows the
        prompt that an answer would be generated from, up to the token that ends it. A token that begins before a turn
        is not of it.

        Raises ValueError as `prompt`, and where turns cannot be known: the template writes the prompt before a turn in
        another way once the turn follows, or no token ends the turn and what follows changes it.
        """
        if learned == "all":
            (text,) = self._render([messages], tools, [False], variables)
            ids = self._encode(text)[0]
            return Encoded(ids, np.ones(len(ids), bool))
        text, sure = self._with_turns(messages, tools, variables)
        ids, starts, turns = self._encode(text)
        chosen = np.zeros(len(ids), bool)
        for number, (begin, end) in list(enumerate(turns))[-1:] if learned == "last" else enumerate(turns):
            first, after = np.searchsorted(starts, [begin, end])
            if sure is not None:
                ending = np.flatnonzero(np.isin(ids[first:after], self.tokenizer.end_ids))
                if not len(ending) and not sure[number]:
                    raise _unknown(messages, number)
                after = first + ending[0] + 1 if len(ending) else after
            chosen[first:after] = True
        return Encoded(ids, chosen)

    def _with_turns(
        self, messages: Sequence[Message], tools: Any, variables: Mapping[str, Any]
    ) -> tuple[str, list[bool] | None]:
        """The text with marks before and after each of the assistant's turns, and of which ones that is the end.

        None for these where the template itself put the marks. The others end with a token, at the mark at the latest.
        """
        at = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
        conversations = [messages, *(messages[:number] for number in at), *(messages[: number + 1] for number in at)]
        add = [False, *[True] * len(at), *[False] * len(at)]
        whole, *others = self._render(conversations, tools, add, variables)
        if self._begin in whole or not at:
            return whole, None
        before, through = others[: len(at)], others[len(at) :]
        for number, (text, following) in enumerate(itertools.pairwise([*before, whole])):
            if not (whole.startswith(text) and following.startswith(text)):
                raise _unknown(messages, number)
        limits = [*map(len, before[1:]), len(whole)]
        sure = [whole.startswith(text) and len(text) <= limit for text, limit in zip(through, limits, strict=True)]
        pieces, end = [], 0
        for number, limit in enumerate(limits):
            begin, earlier = len(before[number]), end
            end = len(through[number]) if sure[number] else limit
            pieces += [whole[earlier:begin], self._begin, whole[begin:end], self._end]
        return "".join([*pieces, whole[end:]]), sure

    def _render(
        self, conversations: Sequence[Sequence[Message]], tools: Any, add: Sequence[bool], variables: Mapping[str, Any]
    ) -> list[str]:
        """Texts in which special tokens that messages spell have a mark inside."""
        for role in {message.get("role") for messages in conversations for message in messages}:
            # Templates put roles between parts of special tokens.
            if not isinstance(role, str) or not re.fullmatch(r"[A-Za-z][\w-]{0,63}", role):
                raise ValueError(f"role={role!r} of a message must be a name; try user")
        marked, tools, variables = self._marked((conversations, tools, dict(variables)))
        return self.template.render_all(marked, tools, add, (self._begin, self._end), variables)

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            while self._spelled.search(value):  # what is left around a mark may spell another
                value = self._spelled.sub(lambda match: match[0][0] + self._inside + match[0][1:], value)
            return value
        if isinstance(value, Mapping):
            return {self._marked(name): self._marked(part) for name, part in value.items()}
        return [self._marked(part) for part in value] if isinstance(value, list | tuple) else value

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """Ids, the place of each in a text without marks, and the turns as [begin, end) in it."""
        pieces, places, length, at = [""], [], 0, 0

        def add(part: str) -> None:
            nonlocal length
            pieces[-1] += part
            length += len(part)

        for match in self._parts.finditer(text):
            add(text[at : match.start()])
            at = match.end()
            _, begin, end, special = match.groups()
            if begin or end:
                places.append(length)
            elif special:
                pieces += [special, ""]
                length += len(special)
        add(text[at:])
        ids, starts = self._pieces(pieces)
        if np.count_nonzero(np.isin(ids, list(self._special.values()))) != len(pieces) // 2:
            raise ValueError("a message spells a special token, which this tokenizer cannot take for text; change it")
        return ids, starts, list(zip(places[::2], places[1::2], strict=True))


def _unknown(messages: Sequence[Message], turn: int) -> ValueError:
    at = [number for number, message in enumerate(messages) if message.get("role") == "assistant"][turn]
    return ValueError(
        f"message {at} is not written by the chat template as an answer to what came before it, so which tokens are "
        "learned cannot be known; give a template with {% generation %} around what the assistant writes"
    )


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """The first of several texts, which may be none."""
    return re.compile("|".join(map(re.escape, spellings)) or "(?!)")


Pieces = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""Texts and special tokens by turns, a text first, to ids and the place of each in the whole, in characters."""


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that messages cannot spell, by what a template writes for them."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return {} if tokenizer.eos_id is None else {END_OF_TEXT: tokenizer.eos_id}
    return tokenizer.special_tokens


def _encoder(tokenizer: Tokenizer, special: Mapping[str, int]) -> Pieces:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return lambda pieces: _encode_by_pieces(tokenizer, special, pieces)
    # The library knows special tokens by spellings that no message can hold, and takes those that it could for text.
    mark = random_mark()
    model, id_of = tokenizer.respelled(mark)

    def encode(pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.cumsum([len(piece) + len(mark) * (number % 2) for number, piece in enumerate(pieces)])
        text = "".join(mark * (number % 2) + piece for number, piece in enumerate(pieces))
        ids, places = encode_with_places(model, text)
        ids = np.array([id_of.get(token, token) for token in ids.tolist()], np.int32)
        return ids, places - len(mark) * np.searchsorted(lengths[::2], places)

    return encode


def _encode_by_pieces(
    tokenizer: Tokenizer, special: Mapping[str, int], pieces: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """By a tokenizer whose ids stand for the bytes of a text, all of them and in order."""
    ids, places, length = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], 0
    for number, piece in enumerate(pieces):
        if number % 2:
            found, starts = np.array([special[piece]], np.int32), np.zeros(1, np.int64)
        else:
            found = tokenizer.encode(piece) if piece else ids[0]
            sizes = [len(tokenizer.token_bytes(token)) for token in found.tolist()]
            characters = np.cumsum([len(character.encode()) for character in piece])
            starts = np.searchsorted(characters, np.cumsum([0, *sizes])[:-1], side="right")
        ids.append(found)
        places.append(starts + length)
        length += len(piece)
    return np.concatenate(ids), np.concatenate(places)
