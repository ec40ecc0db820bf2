"""The body of a request, and of one for a completion: its JSON Schema, and the way from bytes to what is asked.

Invariant: /openapi.json shows the schema that is enforced, and an `Ask` is complete and within the limits. Two rules no
schema can state: prompt and answer fit a slot together, and the tokenizer can spell the prompt.
"""

import dataclasses
import json
import math
import reprlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jsonschema_rs import Draft202012Validator, ValidationError
from jsonschema_rs import ValidationErrorKind as Kind

from parallax.inference.reports import TOP
from parallax.inference.request import Matcher, Request
from parallax.inference.sampling import SETTINGS
from parallax.serving.access import Limits
from parallax.serving.errors import Refusal
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.plain import CharTokenizer

Schema = dict[str, Any]
TYPES = {int: "integer", float: "number"}
MASK = "value"
"""Stands for the value in the validator's messages: the value itself may be long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """A request, read."""

    prompts: list[np.ndarray]
    max_tokens: int
    n: int
    stream: bool
    include_usage: bool
    logprobs: int | None
    stops: list[str]
    seed: int
    sampling: dict[str, float]
    echo: bool = False
    grammar: Callable[[], Matcher] | None = None

    def completions(self, end_ids: Sequence[int]) -> list[Request]:
        """One an answer: the n of the first prompt, then those of the next. Answer i of any prompt has seed + i.

        Each of `end_ids` ends one.
        """
        eos_id, *others = end_ids or [None]
        return [
            Request.one(
                prompt,
                max_tokens=self.max_tokens,
                seed=(self.seed + number) % 2**32,
                eos_id=eos_id,
                stops=[np.array([token], np.int32) for token in others],
                grammar=self.grammar,
                prompt_logprobs=self.max_tokens == 0 or (self.echo and self.logprobs is not None),
                **self.sampling,  # type: ignore[arg-type]
            )
            for prompt in self.prompts
            for number in range(self.n)
        ]


class Form:
    """What the body of a request to one of the models may hold; `schema` is that of the body."""

    def __init__(self, models: Sequence[str], schema: Schema):
        self.schema, self._models = schema, models
        properties = schema["properties"]
        self._outline = Draft202012Validator(schema | {"properties": {name: {} for name in properties}})
        self._fields = {
            name: [Draft202012Validator(one, mask=MASK) for one in rules.get("anyOf", [rules])]
            for name, rules in properties.items()
        }

    def _read_fields(self, body: bytes) -> dict[str, Any]:
        """Every field of the schema, as given or by default. Raises Refusal, of status 404 for another model."""
        data = _parse(body)
        self._check(data)
        return {
            name: rules.get("default") if data.get(name) is None else data[name]
            for name, rules in self.schema["properties"].items()
        }

    def _check(self, data: Any) -> None:
        """Raises Refusal for the first rule of the schema that `data` breaks."""
        if not isinstance(data, dict):
            message = f"body={reprlib.repr(data)} must be a JSON object; send fields such as model and prompt"
            raise Refusal(400, message)
        given = data.get("model")
        if isinstance(given, str) and given not in self._models:
            raise unknown_model(given, self._models)
        try:
            error = _first_error(self._outline, data)
        except ValueError:  # as below
            raise Refusal(400, "names of fields must be of whole characters; send them as UTF-8") from None
        if error:
            raise self._refusal([], error)
        for name, value in data.items():
            try:
                errors = [_first_error(validator, value) for validator in self._fields[name]]
            except ValueError:  # the validator gives up at half of a surrogate pair and below 255 levels
                rule = "must be of whole characters and nested no deeper than 3 levels; send it as UTF-8"
                raise Refusal(400, f"{name} {rule}", param=name) from None
            broken = [error for error in errors if error]
            if len(broken) == len(errors):
                # Of alternatives the one of the given type was meant, or with the right types, as far as it goes.
                alternatives = self.schema["properties"][name].get("anyOf", [{}])
                named = [error for error, rules in zip(broken, alternatives, strict=True) if _is_named(rules, value)]
                typed = named or [error for error in broken if not isinstance(error.kind, Kind.Type)]
                meant = max(typed, key=lambda error: len(error.instance_path), default=broken[0])
                if not isinstance(meant.kind, Kind.Pattern):  # the tokenizer names the character
                    raise self._refusal([name], meant, untyped=len(errors) > 1 and not typed)

    def _refusal(self, field: list[str | int], error: ValidationError, *, untyped: bool = False) -> Refusal:
        path, given = [*field, *error.instance_path], f"={reprlib.repr(error.instance)}"
        match error.kind:
            case Kind.Required(name):
                path, given, rule = [*path, name], "", "must be given"
            case Kind.AdditionalProperties([name, *_]):
                path, given, rule = [*path, name], "", "is not known to this server"
            case _ if untyped:
                rule = f"must be {self.schema['properties'][path[0]]['title']}"
            case _:
                rule = error.message.removeprefix(MASK).lstrip()
        rules = self.schema["properties"].get(path[0], {})
        example = rules.get("examples", [rules.get("default")])[0]
        remedy = "leave it out" if example is None else f"try {json.dumps(example)}"
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
        return Refusal(400, f"{name.removeprefix('.')}{given} {rule}; {remedy}", param=str(path[0]))


class CompletionForm(Form):
    """The body of POST /v1/completions."""

    def __init__(self, models: Sequence[str], tokenizer: Tokenizer, limits: Limits):
        super().__init__(models, _schema(models, tokenizer, limits))
        self._tokenizer, self._limits = tokenizer, limits

    def read(self, body: bytes) -> Ask:
        """What a body asks for. Raises Refusal, with status 404 for another model and 400 for all else."""
        fields = self._read_fields(body)
        ask = Ask(
            prompts=self._read_prompts(fields["prompt"]),
            max_tokens=int(fields["max_tokens"]),
            logprobs=None if fields["logprobs"] is None else int(fields["logprobs"]),
            echo=fields["echo"],
            **common_of(fields),
        )
        if (answers := len(ask.prompts) * ask.n) > self._limits.max_answers:
            rule = f"must not exceed {self._limits.max_answers} answers and make {answers}"
            message = f"{len(ask.prompts)} prompts times n={ask.n} {rule}; send several requests"
            raise Refusal(400, message, param="n")
        return ask

    def _read_prompts(self, prompt: Any) -> list[np.ndarray]:
        """Token ids from any of the four forms of a prompt."""
        alone = isinstance(prompt, str) or not isinstance(prompt[0], str | list)
        limit, prompts = self._limits.max_prompt_tokens, []
        for one in [prompt] if alone else prompt:
            try:
                ids = self._tokenizer.encode(one) if isinstance(one, str) else np.array(one, np.int32)
            except ValueError as error:
                raise Refusal(400, f"prompt: {error}", param="prompt") from None
            if len(ids) > limit:
                message = f"prompt of {len(ids)} tokens must not exceed {limit}; send its end alone"
                raise Refusal(400, message, param="prompt", code="context_length_exceeded")
            prompts.append(ids)
        return prompts


def common_of(fields: dict[str, Any]) -> dict[str, Any]:
    """What `common_schema` names, as `Ask` has it."""
    stop, seed = fields["stop"] or [], fields["seed"]
    return {
        "n": int(fields["n"]),
        "stream": fields["stream"],
        "include_usage": (fields["stream_options"] or {}).get("include_usage", False),
        "stops": [stop] if isinstance(stop, str) else stop,
        "seed": secrets.randbits(32) if seed is None else int(seed),
        "sampling": {name: setting.kind(fields[name]) for name, setting in SETTINGS.items()},
    }


def unknown_model(given: str, models: Sequence[str]) -> Refusal:
    served = "the one that is, is" if len(models) == 1 else "those that are, are"
    message = f"model={reprlib.repr(given)} is not served here; {served} {', '.join(map(repr, models))}"
    return Refusal(404, message, param="model", code="model_not_found")


def model_of(body: bytes) -> str | None:
    """The model that a request asks for, of a body that may break any rule; None where it names none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    named = value.get("model") if isinstance(value, dict) else None
    return named if isinstance(named, str) else None


def _schema(models: Sequence[str], tokenizer: Tokenizer, limits: Limits) -> Schema:
    text: Schema = {"type": "string", "minLength": 0 if len(tokenizer.encode("")) else 1}
    text |= spellable(tokenizer, limits)
    token = {"type": "integer", "minimum": 0, "maximum": tokenizer.vocab_size - 1}
    tokens = {"type": "array", "items": token, "minItems": 1, "maxItems": limits.max_prompt_tokens}
    several = {"type": "array", "minItems": 1, "maxItems": limits.max_answers}
    properties = {
        "prompt": {
            "title": "a text, a list of texts, a list of token ids, or a list of such lists",
            "examples": ["ROMEO:"],
            "anyOf": [text, tokens, {**several, "items": text}, {**several, "items": tokens}],
        },
        "max_tokens": optional("integer", 16, minimum=0, maximum=limits.max_tokens),
        "logprobs": optional("integer", None, minimum=0, maximum=TOP),
        "echo": optional("boolean", False),
        # What follows is taken only where it asks for nothing.
        "best_of": {"enum": [None, 1]},
        "suffix": {"enum": [None, ""]},
    }
    return body_schema("prompt", common_schema(models, limits) | properties)


def common_schema(models: Sequence[str], limits: Limits) -> dict[str, Schema]:
    """The fields that requests of every kind have."""
    stop = {"type": "string", "minLength": 1, "maxLength": 256}
    return {
        "model": {"type": "string", "enum": [*models], "examples": [models[0]]},
        **{name: optional(TYPES[each.kind], each.off, **each.bounds) for name, each in SETTINGS.items()},
        "n": optional("integer", 1, minimum=1, maximum=limits.max_answers),
        "stream": optional("boolean", False),
        "stream_options": optional("object", None)
        | {"properties": {"include_usage": {"type": "boolean"}}, "additionalProperties": False},
        "stop": {
            "title": "a text, or a list of at most 4 texts",
            "anyOf": [{"type": "null"}, stop, {"type": "array", "items": stop, "maxItems": 4}],
        },
        "seed": optional("integer", None, minimum=0, maximum=2**32 - 1)
        | {"description": "Answer i of a prompt is the only answer of seed + i; without a seed one is drawn."},
        "user": optional("string", None),
        # What follows is taken only where it asks for nothing.
        "presence_penalty": {"enum": [None, 0]},
        "frequency_penalty": {"enum": [None, 0]},
        "logit_bias": optional("object", None, maxProperties=0),
    }


def body_schema(needed: str, properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "required": ["model", needed], "properties": properties, "additionalProperties": False}


def optional(kind: str, default: Any, **rules: Any) -> Schema:
    """A field that may be left out or null, and is `default` then."""
    return {"type": [kind, "null"], "default": default, **rules}


def spellable(tokenizer: Tokenizer, limits: Limits) -> Schema:
    """What a schema can say of texts that a tokenizer can spell."""
    if not isinstance(tokenizer, CharTokenizer):
        return {}
    return {"pattern": _only(tokenizer.alphabet), "maxLength": limits.max_prompt_tokens}


def _only(alphabet: str) -> str:
    """A pattern that holds for texts of these characters alone, in every dialect of regular expressions."""
    escaped = "".join("\\" + char if char in "\\]^-[" else char for char in alphabet)
    return f"^[{escaped}]+(?![\\s\\S])"


def _is_named(rules: Schema, value: Any) -> bool:
    """Whether `rules` are of objects of the type that `value` names."""
    kind = rules.get("properties", {}).get("type", {})
    known = kind.get("enum", [kind["const"]] if "const" in kind else [])
    return isinstance(value, dict) and "type" in value and value["type"] in known


def _first_error(validator: Draft202012Validator, value: Any) -> ValidationError | None:
    """The first error alone, since a long list may hold a million."""
    try:
        validator.validate(value)
    except ValidationError as error:
        return error
    return None


def _parse(body: bytes) -> Any:
    """Strict JSON in UTF-8. Raises Refusal with status 400."""
    try:
        return json.loads(body.decode("utf-8"), parse_float=_finite, parse_constant=_finite)
    except UnicodeDecodeError as error:
        message = f"body must be UTF-8 and is not at byte {error.start}; encode it as UTF-8"
    except RecursionError:
        message = "body is nested too deeply; a request needs no more than 3 levels"
    except ValueError as error:
        message = f"body must be JSON ({error}); send one JSON object"
    raise Refusal(400, message)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{reprlib.repr(text)} is no finite number")
    return number
