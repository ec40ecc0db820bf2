"""The body of a completion request, from bytes to what the engine is asked.

Invariant: what leaves `read_ask` is complete and within its limits; whatever else came is refused with status 4xx.
"""

import dataclasses
import json
import math
import reprlib
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from parallax.inference.request import Request
from parallax.serving.errors import Refusal
from parallax.serving.schema import Schema, find_violation
from parallax.tokenizers.base import Tokenizer

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """A completion request, read."""

    prompts: list[np.ndarray]
    max_tokens: int
    n: int
    stream: bool
    include_usage: bool
    logprobs: int | None
    echo: bool
    stops: list[str]
    seed: int
    sampling: dict[str, float]

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
                prompt_logprobs=self.max_tokens == 0 or (self.echo and self.logprobs is not None),
                **self.sampling,  # type: ignore[arg-type]
            )
            for prompt in self.prompts
            for number in range(self.n)
        ]


def read_json(body: bytes) -> Any:
    """Strict JSON in UTF-8.

    Raises:
      Refusal: status 400.
    """
    try:
        return json.loads(body.decode("utf-8"), parse_float=_finite, parse_constant=_finite)
    except UnicodeDecodeError as error:
        raise Refusal(
            400, f"body must be UTF-8 and is not at byte {error.start}; encode it as UTF-8"
        ) from None
    except RecursionError:
        raise Refusal(400, "body is nested too deeply; a request needs no more than 3 levels") from None
    except ValueError as error:
        raise Refusal(400, f"body must be JSON ({error}); send one JSON object") from None


def read_ask(data: Any, schema: Schema, tokenizer: Tokenizer, max_answers: int) -> Ask:
    """What a decoded body asks for.

    Raises:
      Refusal: status 404 for another model, 400 for all else.
    """
    if not isinstance(data, dict):
        raise Refusal(
            400, f"body={reprlib.repr(data)} must be a JSON object; send fields such as model and prompt"
        )
    _check_model(data.get("model"), schema["properties"]["model"]["enum"][0])
    if found := find_violation(data, schema):
        given = "" if found.rule == "be given" else f"={reprlib.repr(found.value)}"
        remedy = _remedy(schema["properties"].get(found.path[0], {}))
        raise Refusal(400, f"{found.name}{given} must {found.rule}; {remedy}", param=str(found.path[0]))
    fields = {
        name: rules.get("default") if data.get(name) is None else data[name]
        for name, rules in schema["properties"].items()
    }
    stop, seed = fields["stop"] or [], fields["seed"]
    ask = Ask(
        prompts=_read_prompts(fields["prompt"], tokenizer, schema),
        max_tokens=int(fields["max_tokens"]),
        n=int(fields["n"]),
        stream=fields["stream"],
        include_usage=(fields["stream_options"] or {}).get("include_usage", False),
        logprobs=None if fields["logprobs"] is None else int(fields["logprobs"]),
        echo=fields["echo"],
        stops=[stop] if isinstance(stop, str) else stop,
        seed=secrets.randbits(32) if seed is None else int(seed),
        sampling={name: int(fields[name]) if name == "top_k" else float(fields[name]) for name in SAMPLING},
    )
    if (answers := len(ask.prompts) * ask.n) > max_answers:
        rule = f"{len(ask.prompts)} prompts times n={ask.n} must not exceed {max_answers} answers"
        raise Refusal(400, f"{rule} and make {answers}; send several requests", param="n")
    return ask


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{reprlib.repr(text)} is no finite number")
    return number


def _check_model(given: Any, served: str) -> None:
    if isinstance(given, str) and given != served:
        message = f"model={reprlib.repr(given)} is not served here; the one that is, is {served!r}"
        raise Refusal(404, message, param="model", code="model_not_found")


def _remedy(rules: Schema) -> str:
    example = rules.get("examples", [rules.get("default")])[0]
    return "leave it out" if example is None else f"try {json.dumps(example)}"


def _read_prompts(prompt: Any, tokenizer: Tokenizer, schema: Schema) -> list[np.ndarray]:
    """Token ids from any of the four forms of a prompt."""
    alone = isinstance(prompt, str) or not isinstance(prompt[0], str | list)
    limit = schema["properties"]["prompt"]["anyOf"][1]["maxItems"]
    prompts = []
    for one in [prompt] if alone else prompt:
        try:
            ids = tokenizer.encode(one) if isinstance(one, str) else np.array(one, np.int32)
        except ValueError as error:
            raise Refusal(400, f"prompt: {error}", param="prompt") from None
        if len(ids) > limit:
            message = f"prompt of {len(ids)} tokens must not exceed {limit}; send its end alone"
            raise Refusal(400, message, param="prompt", code="context_length_exceeded")
        prompts.append(ids)
    return prompts
