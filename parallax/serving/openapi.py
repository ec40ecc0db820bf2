"""The server's own description, /openapi.json.

Invariant: the schema of a completion's body is the one that requests are checked against.
"""

from typing import Any

from parallax.serving.request import Schema

COMMON = {"401": "No key, or the wrong one.", "403": "A foreign Host or Origin."}
UNKNOWN_MODEL = {"404": "Another model than the one served."}
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
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "token_ids", "top_token_ids")


def describe_server(model: str, request: Schema, *, with_key: bool) -> dict[str, Any]:
    """OpenAPI 3.1."""
    event = _object(data=TEXT | {"description": "A Completion, an Error, or [DONE]."})
    answer = {"application/json": _named("Completion"), "text/event-stream": {"schema": event}}
    complete = {
        "summary": "Continues a prompt.",
        "operationId": "complete",
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": _responses(
            "The answer; with stream, server-sent events that hold the same object in pieces.",
            answer,
            ERRORS_OF_COMPLETIONS,
        ),
    }
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": [model]}}
    json = {"application/json": {}}
    one, all_models = ({"application/json": _named(schema)} for schema in ("Model", "Models"))
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Parallax", "version": "1"},
        "paths": {
            "/v1/completions": {"post": complete},
            "/v1/models": _get("The model that is served.", all_models),
            "/v1/models/{model}": _get("The model, if it is the one served.", one, UNKNOWN_MODEL)
            | {"parameters": [name]},
            "/healthz": _get("Whether the server lives and computes.", json),
            "/metrics": _get("Counts, for Prometheus.", {"text/plain": {}}),
            "/run": _get("The run that the model came from.", json),
            "/openapi.json": _get("This description.", json),
            "/": _get("A page to talk to the model.", {"text/html": {}}),
        },
        "components": {"schemas": _answer_schemas()},
    }
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
    error = _object(message=TEXT, type=TEXT, param=TEXT_OR_NULL, code=TEXT_OR_NULL)
    return {
        "Error": _object(error=error),
        "Choice": _object(
            index=INTEGER,
            text=TEXT,
            logprobs={"type": ["object", "null"], "properties": {name: {"type": "array"} for name in LISTS}},
            finish_reason={"enum": ["stop", "length", None]},
        ),
        "Completion": completion,
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


def _get(summary: str, content: dict[str, Any], errors: dict[str, str] | None = None) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": _responses(summary, content, errors or {})}}


def _responses(words: str, content: dict[str, Any], errors: dict[str, str]) -> dict[str, Any]:
    error = {"application/json": _named("Error")}
    return {
        "200": {"description": words, "content": content},
        **{status: {"description": reason, "content": error} for status, reason in {**COMMON, **errors}.items()},
    }
