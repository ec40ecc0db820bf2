"""The server's own description, /openapi.json.

Invariant: the schema of a completion's body is the one that requests are checked against.
"""

from typing import Any

from parallax.serving.errors import ERROR_SCHEMA
from parallax.serving.schema import Schema

COMMON = {"401": "No key, or the wrong one.", "403": "A foreign Host or Origin."}
ERRORS_OF_COMPLETIONS = {
    "400": "The body breaks a rule, which the message names.",
    "404": "Another model than the one served.",
    "408": "The body takes too long to arrive.",
    "413": "The body is too large.",
    "415": "The body is not application/json.",
    "429": "The queue is full; Retry-After says when to try again.",
    "500": "The server failed.",
    "503": "The server is shutting down.",
}
USAGE = {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "token_ids", "top_token_ids")
CHOICE: Schema = {
    "type": "object",
    "required": ["index", "text", "logprobs", "finish_reason"],
    "properties": {
        "index": {"type": "integer"},
        "text": {"type": "string"},
        "logprobs": {"type": ["object", "null"], "properties": {name: {"type": "array"} for name in LISTS}},
        "finish_reason": {"enum": ["stop", "length", None]},
    },
}
COMPLETION: Schema = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "text_completion"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {"type": "array", "items": {"$ref": "#/components/schemas/Choice"}},
        "usage": {"type": ["object", "null"], "required": list(USAGE), "properties": USAGE},
    },
}
EVENT: Schema = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A Completion, an Error, or [DONE]."}},
}
MODEL: Schema = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
    },
}
MODELS: Schema = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
    },
}


def describe_server(model: str, request: Schema, *, with_key: bool) -> dict[str, Any]:
    """OpenAPI 3.1."""
    complete = {
        "summary": "Continues a prompt.",
        "operationId": "complete",
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": {
            "200": {
                "description": "The answer; with stream, server-sent events that hold the same object in pieces.",
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/Completion"}},
                    "text/event-stream": {"schema": EVENT},
                },
            },
            **_errors(ERRORS_OF_COMPLETIONS),
        },
    }
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": [model]}}
    unknown = {"404": "Another model than the one served."}
    one_model = _get("The model, if it is the one served.", "application/json", "Model", unknown)
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Parallax", "version": "1"},
        "paths": {
            "/v1/completions": {"post": complete},
            "/v1/models": {"get": _get("The model that is served.", "application/json", "Models")},
            "/v1/models/{model}": {"get": one_model, "parameters": [name]},
            "/healthz": {"get": _get("Whether the server lives.", "application/json")},
            "/metrics": {"get": _get("Counts, for Prometheus.", "text/plain")},
            "/run": {"get": _get("The run that the model came from.", "application/json")},
            "/openapi.json": {"get": _get("This description.", "application/json")},
            "/": {"get": _get("A page to talk to the model.", "text/html")},
        },
        "components": {
            "schemas": {
                "Error": ERROR_SCHEMA,
                "Choice": CHOICE,
                "Completion": COMPLETION,
                "Model": MODEL,
                "Models": MODELS,
            }
        },
    }
    if with_key:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
        for path in ("/", "/healthz"):
            described["paths"][path]["get"]["security"] = []
    return described


def _get(summary: str, kind: str, schema: str = "", errors: dict[str, str] | None = None) -> dict[str, Any]:
    content = {"schema": {"$ref": f"#/components/schemas/{schema}"}} if schema else {}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": summary, "content": {kind: content}},
            **_errors(errors or {}),
        },
    }


def _errors(errors: dict[str, str]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        status: {"description": words, "content": content} for status, words in {**COMMON, **errors}.items()
    }
