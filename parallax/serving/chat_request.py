"""The body of POST /v1/chat/completions: messages to the prompt that the chat template makes of them.

Invariant: as for completions, /openapi.json shows the schema that is enforced. What it cannot state: the template takes
the conversation, the tokenizer can spell it, and it leaves room for an answer.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from parallax.inference.reports import TOP
from parallax.inference.request import Matcher
from parallax.serving.access import Limits
from parallax.serving.errors import Refusal
from parallax.serving.request import Ask, Form, Schema, body_schema, common_of, common_schema, optional, spellable
from parallax.tokenizers.chat import Chat
from parallax.tokenizers.chat_template import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES, MAX_TOOLS = 1024, 128
JSON_OBJECT: Schema = {"type": "object"}


class ChatForm(Form):
    """Args: capacity: the tokens of a slot, which prompt and answer share."""

    def __init__(self, models: Sequence[str], chat: Chat, limits: Limits, capacity: int):
        super().__init__(models, _schema(models, chat, limits))
        self._chat, self._limits, self._capacity = chat, limits, capacity

    def read(self, body: bytes) -> Ask:
        """What a body asks for. Raises Refusal, with status 404 for another model and 400 for all else."""
        fields = self._read_fields(body)
        prompt, common = self._read_prompt(fields), common_of(fields)
        common["stops"] = [*common["stops"], *self._chat.template.stops]
        room = min(self._limits.max_tokens, self._capacity - len(prompt))
        given = [int(fields[name]) for name in ("max_completion_tokens", "max_tokens") if fields[name] is not None]
        top = fields["top_logprobs"]
        if top is not None and not fields["logprobs"]:
            raise Refusal(400, f"top_logprobs={top} must go with logprobs; set logprobs to true", param="top_logprobs")
        return Ask(
            prompts=[prompt],
            max_tokens=given[0] if given else room,
            logprobs=int(top or 0) if fields["logprobs"] else None,
            grammar=self._read_grammar(fields["response_format"] or {"type": "text"}),
            **common,
        )

    @functools.cached_property
    def _grammars(self) -> Any:
        """Made when the first request asks for JSON: a large vocabulary takes a second."""
        from parallax.serving.grammar import Grammars

        return Grammars(self._chat.tokenizer)

    def _read_grammar(self, form: dict[str, Any]) -> Callable[[], Matcher] | None:
        if form["type"] == "text":
            return None
        schema = form["json_schema"]["schema"] if form["type"] == "json_schema" else None
        try:
            return self._grammars.json(schema)
        except ValueError as error:
            raise Refusal(400, f"response_format: {error}", param="response_format") from None

    def _read_prompt(self, fields: dict[str, Any]) -> np.ndarray:
        tools = None if fields["tool_choice"] == "none" else fields["tools"] or None
        more = fields["chat_template_kwargs"] or {}
        try:
            prompt = self._chat.prompt([_plain(message) for message in fields["messages"]], tools, more)
        except ValueError as error:
            raise Refusal(400, f"messages: {error}", param="messages") from None
        limit = min(self._limits.max_prompt_tokens, self._capacity - 1)
        if not 0 < len(prompt) <= limit:
            rule = f"messages of {len(prompt)} tokens, as the chat template writes them, must not exceed {limit}"
            raise Refusal(400, f"{rule}; leave out the first turns", param="messages", code="context_length_exceeded")
        return prompt


def _plain(message: dict[str, Any]) -> Message:
    """As templates read messages: the parts of a text as one, and a tool's arguments as the object that they spell."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    calls = message.get("tool_calls")
    if calls:
        calls = [{**call, "function": {**call["function"], "arguments": _read_arguments(call)}} for call in calls]
    return {**message, "content": content, "tool_calls": calls or None}


def _read_arguments(call: dict[str, Any]) -> Any:
    text = call["function"]["arguments"]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a model may have written anything
        return text
    return value if isinstance(value, dict) else text


def _schema(models: Sequence[str], chat: Chat, limits: Limits) -> Schema:
    text: Schema = {"type": "string", **spellable(chat.tokenizer, limits)}
    part = _closed(["type", "text"], type={"const": "text"}, text=text)
    call = _closed(
        ["type", "function"],
        id={"type": "string"},
        type={"const": "function"},
        function=_closed(["name", "arguments"], name={"type": "string"}, arguments={"type": "string"}),
    )
    nothing = {"enum": [None, []]}
    message = _closed(
        ["role"],
        role={"enum": list(ROLES)},
        content={"type": ["string", "array", "null"], "items": part, **{k: v for k, v in text.items() if k != "type"}},
        name={"type": ["string", "null"]},
        reasoning_content={"type": ["string", "null"]},
        tool_calls={"type": ["array", "null"], "items": call, "maxItems": MAX_TOOLS},
        tool_call_id={"type": ["string", "null"]},
        refusal={"type": ["string", "null"]},
        **dict.fromkeys(("annotations", "audio", "function_call"), nothing),  # as OpenAI's client hands an answer back
    )
    tool = _closed(
        ["type", "function"],
        type={"const": "function"},
        function={"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
    )
    name, anything = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}, {"type": ["string", "null"]}
    followed = _closed(
        ["name", "schema"], name=name, description=anything, schema=JSON_OBJECT, strict={"type": ["boolean", "null"]}
    )
    json_schema = _closed(["type", "json_schema"], type={"const": "json_schema"}, json_schema=followed)
    own = {
        "messages": {"type": "array", "items": message, "minItems": 1, "maxItems": MAX_MESSAGES}
        | {"examples": [[{"role": "user", "content": "Hi"}]]},
        "max_tokens": optional("integer", None, minimum=1, maximum=limits.max_tokens),
        "max_completion_tokens": optional("integer", None, minimum=1, maximum=limits.max_tokens),
        "logprobs": optional("boolean", False),
        "top_logprobs": optional("integer", None, minimum=0, maximum=TOP),
        "tools": optional("array", None, items=tool, maxItems=MAX_TOOLS),
        "tool_choice": {"enum": [None, "auto", "none"]},
        "parallel_tool_calls": optional("boolean", None),
        "response_format": {
            "title": 'an object such as {"type": "json_object"}',
            "examples": [{"type": "json_object"}],
            "anyOf": [{"type": "null"}, _closed(["type"], type={"enum": ["text", "json_object"]}), json_schema],
        },
        "chat_template_kwargs": optional("object", None)
        | {"description": "Variables for the chat template, such as enable_thinking."},
        # What follows is taken only where it asks for nothing.
        "store": {"enum": [None, False]},
        "modalities": {"enum": [None, ["text"]]},
    }
    return body_schema("messages", common_schema(models, limits) | own)


def _closed(required: list[str], **properties: Schema) -> Schema:
    """An object that holds nothing else."""
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}
