"""Conversations to documents of ids that say which tokens are learned.

Invariant: a conversation is a document as the chat template of its model writes it, and nothing is added to that. Of
every shape that is read the same messages come.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from data.stores.store import UNLEARNED
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.batches import Encode
from parallax.tokenizers.chat import Chat, Learned
from parallax.tokenizers.chat_template import ChatTemplate

SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}
"""What roles are called there that have another name here."""
SHAPES = "messages, prompt and completion, or conversations"


@dataclasses.dataclass(frozen=True)
class ChatForm:
    """How conversations become tokens, as plain values that a journal can hold.

    Attributes:
        template, special_tokens, with_tools: of a `ChatTemplate`.
        learned: of which turns the tokens are learned; or pairs, where a row has two answers to a prompt.
    """

    template: str
    special_tokens: Mapping[str, str]
    with_tools: str | None
    learned: Learned | Literal["pairs"]

    @classmethod
    def of(cls, template: ChatTemplate, learned: Learned | Literal["pairs"]) -> "ChatForm":
        return cls(template.source, template.special_tokens, template.with_tools, learned)

    def chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.template, self.special_tokens, self.with_tools)


def chat_encoder(tokenizer: Tokenizer, form: ChatForm) -> Encode:
    """What turns conversations, each an object in JSON, into documents of ids, uint32 [length].

    An id has the bit UNLEARNED where its token is read and not learned. A pair is a document of the preferred
    conversation and, behind the last token learned of it, of the other one. Raises ValueError for what is no
    conversation, for one that the template refuses, and for one with nothing to learn.
    """
    chat = Chat(form.chat_template(), tokenizer)

    def marked(messages: list[dict[str, Any]], tools: Any, learned: Learned) -> np.ndarray:
        ids, chosen = chat.encode(messages, tools, learned=learned)
        if not chosen.any():
            raise ValueError("the conversation has no turn of the assistant, and nothing to learn")
        return ids.astype(np.uint32) | np.where(chosen, 0, UNLEARNED).astype(np.uint32)

    def conversation(text: str) -> np.ndarray:
        return marked(*read_conversation(json.loads(text)), form.learned)  # pyright: ignore[reportArgumentType]

    def pair(text: str) -> np.ndarray:
        *both, tools = read_pair(json.loads(text))
        sides = [marked(messages, tools, "last") for messages in both]
        if any(side[0] < UNLEARNED for side in sides):
            raise ValueError("the chat template writes nothing before an answer, which needs a prompt; give one")
        return np.concatenate([side[: np.flatnonzero(side < UNLEARNED)[-1] + 1] for side in sides])

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        return [(pair if form.learned == "pairs" else conversation)(text) for text in texts]

    return encode


def read_conversation(value: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The messages of an object, and the tools that go with them.

    It holds `messages`; or `prompt` and `completion`, texts or lists of messages; or `conversations` as ShareGPT has
    them, with `from` and `value`. Raises ValueError for anything else.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a conversation must be an object with {SHAPES}, and is none")
    tools = _tools(value.get("tools"))
    if value.get("messages") is not None:
        return _messages(value["messages"], "messages"), tools
    if value.get("prompt") is not None and value.get("completion") is not None:
        sides = (("prompt", "user"), ("completion", "assistant"))
        return [message for name, role in sides for message in _side(value[name], name, role)], tools
    if value.get("conversations") is not None:
        turns = _messages(value["conversations"], "conversations", "from", "value")
        system = value.get("system")
        first = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
        return first + [{"role": SHAREGPT.get(t["from"], t["from"]), "content": t["value"]} for t in turns], tools
    raise ValueError(f"a conversation must have {SHAPES}, and has {', '.join(list(value)[:8]) or 'nothing at all'}")


def read_pair(value: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The preferred conversation of an object, the other one, and the tools that go with them.

    It holds `chosen` and `rejected`, and `prompt` where these are answers alone; each a text or a list of messages. A
    prompt that they hold themselves is not put before them again. Raises ValueError for anything else, and where they
    do not differ.
    """
    if not isinstance(value, dict) or any(value.get(name) is None for name in ("chosen", "rejected")):
        raise ValueError("a pair must be an object with chosen and rejected, and perhaps prompt, and is none")
    tools = _tools(value.get("tools"))
    prompt = [] if value.get("prompt") is None else _side(value["prompt"], "prompt", "user")
    sides = [_side(value[name], name, "assistant") for name in ("chosen", "rejected")]
    chosen, rejected = (side if all(said in side for said in prompt) else prompt + side for side in sides)
    if chosen == rejected:
        raise ValueError("chosen and rejected must differ")
    if any(side[-1]["role"] != "assistant" for side in (chosen, rejected)):
        raise ValueError("chosen and rejected must end with a message of the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected must answer the same messages, and differ before their last one")
    return chosen, rejected, tools


def _side(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, name)


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Raises ValueError unless these are a list, or one in JSON."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value else value
    except ValueError as error:
        raise ValueError(f"tools must be JSON ({error})") from None
    if tools and not isinstance(tools, list):
        raise ValueError("tools must be a list of objects")
    return tools or None


def _messages(value: Any, name: str, role: str = "role", content: str = "content") -> list[dict[str, Any]]:
    """Raises ValueError unless these are objects with a role and a text, or parts of one.

    A message that calls tools may have no `content`, which None stands for too.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of messages, and not empty")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get(role), str):
            raise ValueError(f"message {number} of {name} must be an object with {role!r} and {content!r}")
        text, calls = message.get(content), content == "content" and message.get("tool_calls")
        if not isinstance(text, str | list) and not (text is None and calls):
            raise ValueError(f"message {number} of {name} has no {content!r} that is a text")
    return value
