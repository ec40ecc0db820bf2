"""What a completion request may hold, as JSON Schema, and the check of a request against that very schema.

Invariant: /openapi.json shows the schema that is enforced. Two rules no schema can state, and they are enforced
elsewhere: prompt and answer fit a slot together, and the tokenizer can spell the prompt.
"""

import reprlib
from typing import Any, NamedTuple

from parallax.inference.report import TOP
from parallax.serving.limits import Limits
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.plain import CharTokenizer

Schema = dict[str, Any]

KINDS = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: KINDS["number"](value) and value == value // 1,  # 5.0 is one, says JSON Schema
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
BOUNDS = {
    "minimum": (lambda value, bound: value >= bound, "at least"),
    "maximum": (lambda value, bound: value <= bound, "at most"),
    "exclusiveMaximum": (lambda value, bound: value < bound, "below"),
}
SIZES = {
    "minLength": (lambda size, bound: size >= bound, "at least {} characters long"),
    "maxLength": (lambda size, bound: size <= bound, "at most {} characters long"),
    "minItems": (lambda size, bound: size >= bound, "a list of at least {}"),
    "maxItems": (lambda size, bound: size <= bound, "a list of at most {}"),
    "maxProperties": (lambda size, bound: size <= bound, "an object of at most {} fields"),
}

OF_TYPE = "be of type"


class Violation(NamedTuple):
    """The first rule that a value breaks: where, by what, and the rule as in `must be …`."""

    path: tuple[str | int, ...]
    value: Any
    rule: str

    @property
    def name(self) -> str:
        """As in `stream_options.include_usage` or `prompt[3]`."""
        parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path]
        return "".join(parts).removeprefix(".")


def completion_schema(model: str, tokenizer: Tokenizer, limits: Limits) -> Schema:
    """The body of POST /v1/completions."""
    text: Schema = {"type": "string", "minLength": 1}
    if isinstance(tokenizer, CharTokenizer):
        text |= {"pattern": _only(tokenizer.alphabet), "maxLength": limits.max_prompt_tokens}
    token = {"type": "integer", "minimum": 0, "maximum": tokenizer.vocab_size - 1}
    tokens = {"type": "array", "items": token, "minItems": 1, "maxItems": limits.max_prompt_tokens}
    several = {"type": "array", "minItems": 1, "maxItems": limits.max_answers}
    stop = {"type": "string", "minLength": 1, "maxLength": 256}
    properties = {
        "model": {"type": "string", "enum": [model], "examples": [model]},
        "prompt": {
            "title": "a text, a list of texts, a list of token ids, or a list of such lists",
            "examples": ["ROMEO:"],
            "anyOf": [text, tokens, {**several, "items": text}, {**several, "items": tokens}],
        },
        "max_tokens": _optional("integer", 16, minimum=0, maximum=limits.max_tokens),
        "temperature": _optional("number", 1.0, minimum=0, maximum=1e6, examples=[0.8]),
        "top_p": _optional("number", 1.0, minimum=1e-30, maximum=1),
        "top_k": _optional("integer", 0, minimum=0, maximum=2**31 - 1),
        "min_p": _optional("number", 0.0, minimum=0, exclusiveMaximum=1),
        "repetition_penalty": _optional("number", 1.0, minimum=1e-6, maximum=1e6),
        "n": _optional("integer", 1, minimum=1, maximum=limits.max_answers),
        "stream": _optional("boolean", False),
        "stream_options": _optional("object", None)
        | {"properties": {"include_usage": {"type": "boolean"}}, "additionalProperties": False},
        "logprobs": _optional("integer", None, minimum=0, maximum=TOP),
        "echo": _optional("boolean", False),
        "stop": {
            "title": "a text, or a list of at most 4 texts",
            "anyOf": [{"type": "null"}, stop, {"type": "array", "items": stop, "maxItems": 4}],
        },
        "seed": _optional("integer", None, minimum=0, maximum=2**32 - 1)
        | {
            "description": "Answer i of a prompt is the only answer of seed + i; without a seed one is drawn."
        },
        "user": _optional("string", None),
        # What follows is taken only where it asks for nothing.
        "best_of": {"enum": [None, 1]},
        "suffix": {"enum": [None, ""]},
        "presence_penalty": {"enum": [None, 0]},
        "frequency_penalty": {"enum": [None, 0]},
        "logit_bias": _optional("object", None, maxProperties=0),
    }
    return {
        "type": "object",
        "required": ["model", "prompt"],
        "properties": properties,
        "additionalProperties": False,
    }


def find_violation(value: Any, schema: Schema, path: tuple[str | int, ...] = ()) -> Violation | None:
    """The first rule of `schema` that a JSON value breaks; it knows the keywords that are used above."""
    if "anyOf" in schema:
        return _least_broken(value, schema, path)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(KINDS[kind](value) for kind in kinds):
        return Violation(path, value, f"{OF_TYPE} {' or '.join(kinds)}")
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        return Violation(path, value, f"be {' or '.join(map(_show, schema['enum']))}")
    return _broken_size(value, schema, path) or _broken_part(value, schema, path)


def _least_broken(value: Any, schema: Schema, path: tuple[str | int, ...]) -> Violation | None:
    """What is wrong by the alternative that was meant: the one with the right types, as far as it goes."""
    found = [find_violation(value, choice, path) for choice in schema["anyOf"]]
    broken = [violation for violation in found if violation]
    if len(broken) < len(found):
        return None
    meant = [violation for violation in broken if not violation.rule.startswith(OF_TYPE)]
    if not meant:
        return Violation(path, value, f"be {schema['title']}")
    return max(meant, key=lambda violation: len(violation.path))


def _same(value: Any, one: Any) -> bool:
    """Equality of JSON, to which 1 is 1.0 and not true."""
    return value == one and isinstance(value, bool) == isinstance(one, bool)


def _broken_size(value: Any, schema: Schema, path: tuple[str | int, ...]) -> Violation | None:
    if KINDS["number"](value):
        for keyword, (holds, words) in BOUNDS.items():
            if keyword in schema and not holds(value, schema[keyword]):
                return Violation(path, value, f"be {words} {schema[keyword]}")
    if isinstance(value, str | list | dict):
        for keyword, (holds, words) in SIZES.items():
            if keyword in schema and not holds(len(value), schema[keyword]):
                return Violation(path, value, f"be {words.format(schema[keyword])}: it has {len(value)}")
    return None


def _broken_part(value: Any, schema: Schema, path: tuple[str | int, ...]) -> Violation | None:
    if isinstance(value, list):
        for index, item in enumerate(value):
            if found := find_violation(item, schema.get("items", {}), (*path, index)):
                return found
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name in schema.get("required", []):
            if name not in value:
                return Violation((*path, name), None, "be given")
        for name, item in value.items():
            if name not in known and schema.get("additionalProperties") is False:
                return Violation((*path, name), item, "be left out: this server does not know it")
            if found := find_violation(item, known.get(name, {}), (*path, name)):
                return found
    return None


def _optional(kind: str, default: Any, **rules: Any) -> Schema:
    """A field that may be left out or null, and is `default` then."""
    return {"type": [kind, "null"], "default": default, **rules}


def _only(alphabet: str) -> str:
    """A pattern that holds for texts of these characters alone, for Python's dialect and ECMA's."""
    escaped = "".join("\\" + char if char in "\\]^-[" else char for char in alphabet)
    return f"^[{escaped}]+(?![\\s\\S])"


def _show(value: Any) -> str:
    return {None: "null", "": "an empty text"}.get(value) or reprlib.repr(value)
