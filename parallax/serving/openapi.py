"""The server's own description, /openapi.json.

Invariant: the schemas of bodies are those that requests are checked against.
"""

from collections.abc import Sequence
from typing import Any

from parallax.serving.request import Schema

COMMON = {"401": "No key, or the wrong one.", "403": "A foreign Host or Origin."}
UNKNOWN_MODEL = {"404": "A model that is not served."}
ERRORS_OF_COMPLETIONS = {
    **UNKNOWN_MODEL,
    "400": "The body breaks a rule, which the message names.",
    "408": "The body takes too long to arrive.",
    "413": "The body is too large.",
    "415": "The body is not application/json.",
    "429": "The queue is full; Retry-After says when to try again.",
    "500": "The server, or the step that computed the answer, failed.",
    "503": "The server is shutting down.",
}
TEXT, INTEGER = {"type": "string"}, {"type": "integer"}
TEXT_OR_NULL = {"type": ["string", "null"]}
FINISH = {"enum": ["stop", "length", None]}
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "token_ids", "top_token_ids")


def describe_server(
    models: Sequence[str], completion: Schema, chat: Schema | None, *, with_key: bool
) -> dict[str, Any]:
    """OpenAPI 3.1.

    Args:
      completion, chat: the schemas of the bodies; no chat where the model has no template.
    """
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": [*models]}}
    json = {"application/json": {}}
    one, all_models = ({"application/json": _named(schema)} for schema in ("Model", "Models"))
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Parallax", "version": "1"},
        "paths": {
            "/v1/completions": _post("Continues a prompt.", "complete", completion, "Completion", "Completion"),
            "/v1/models": _get("The models that are served.", all_models),
            "/v1/models/{model}": _get("The model, if it is served.", one, UNKNOWN_MODEL) | {"parameters": [name]},
            "/healthz": _get("Whether the server lives and computes.", json),
            "/metrics": _get("Counts, for Prometheus.", {"text/plain": {}}),
            "/run": _get("The run that the model came from.", json),
            "/openapi.json": _get("This description.", json),
            "/": _get("A page to talk to the model.", {"text/html": {}}),
        },
        "components": {"schemas": _answer_schemas()},
    }
    if chat:
        words = "Answers a conversation."
        described["paths"]["/v1/chat/completions"] = _post(words, "chat", chat, "ChatCompletion", "ChatCompletionChunk")
    degraded = {"description": "A step failed and the slots are being made again.", "content": json}
    described["paths"]["/healthz"]["get"]["responses"]["503"] = degraded
    if with_key:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
        for path in ("/", "/healthz"):
            described["paths"][path]["get"]["security"] = []
    return described


def _answer_schemas() -> dict[str, Schema]:
    usage = _object(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER)
    completion = _object(
        id=TEXT,
        object={"const": "text_completion"},
        created=INTEGER,
        model=TEXT,
        choices={"type": "array", "items": {"$ref": "#/components/schemas/Choice"}},
    )
    completion["properties"]["usage"] = usage | {"type": ["object", "null"]}  # a piece of a stream has none

    def chat(kind: str, part: Schema) -> Schema:
        choice = _object(index=INTEGER, **part, logprobs={"type": ["object", "null"]}, finish_reason=FINISH)
        properties = {"object": {"const": kind}, "choices": {"type": "array", "items": choice}}
        return completion | {"properties": completion["properties"] | properties}

    message = _object(role={"const": "assistant"}, content=TEXT, refusal={"type": "null"})
    delta = {"type": "object", "properties": {"role": {"const": "assistant"}, "content": TEXT}}
    error = _object(message=TEXT, type=TEXT, param=TEXT_OR_NULL, code=TEXT_OR_NULL)
    return {
        "Error": _object(error=error),
        "Choice": _object(
            index=INTEGER,
            text=TEXT,
            logprobs={"type": ["object", "null"], "properties": {name: {"type": "array"} for name in LISTS}},
            finish_reason=FINISH,
        ),
        "Completion": completion,
        "ChatCompletion": chat("chat.completion", {"message": message}),
        "ChatCompletionChunk": chat("chat.completion.chunk", {"delta": delta}),
        "Model": _object(id=TEXT, object={"const": "model"}, created=INTEGER, owned_by=TEXT),
        "Models": _object(
            object={"const": "list"}, data={"type": "array", "items": {"$ref": "#/components/schemas/Model"}}
        ),
    }


def _object(**properties: Schema) -> Schema:
    """An object that holds each of these."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _named(schema: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{schema}"}}


def _post(summary: str, operation: str, request: Schema, whole: str, part: str) -> dict[str, Any]:
    """What takes a request for generation."""
    event = _object(data=TEXT | {"description": f"A {part}, an Error, or [DONE]."})
    answer = {"application/json": _named(whole), "text/event-stream": {"schema": event}}
    words = "The answer; with stream, server-sent events that hold the same in pieces."
    return {
        "post": {
            "summary": summary,
            "operationId": operation,
            "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
            "responses": _responses(words, answer, ERRORS_OF_COMPLETIONS),
        }
    }


def _get(summary: str, content: dict[str, Any], errors: dict[str, str] | None = None) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": _responses(summary, content, errors or {})}}


def _responses(words: str, content: dict[str, Any], errors: dict[str, str]) -> dict[str, Any]:
    error = {"application/json": _named("Error")}
    return {
        "200": {"description": words, "content": content},
        **{status: {"description": reason, "content": error} for status, reason in {**COMMON, **errors}.items()},
    }
