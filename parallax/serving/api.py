"""What the server answers at which address.

Invariant: a request is either refused before it takes a slot, or its answer is closed at the end, whatever the end was:
so no slot stays with a client that went away.
"""

import asyncio
import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from parallax.run_folder import Run
from parallax.serving.answer import Answer
from parallax.serving.assets import asset_routes, describe_run
from parallax.serving.engine import Engine
from parallax.serving.errors import CLIENT_GONE, Refusal, json_response, say_refusal
from parallax.serving.limits import Limits
from parallax.serving.metrics import Counts
from parallax.serving.openapi import describe_server
from parallax.serving.request import Ask, read_ask, read_json
from parallax.serving.schema import completion_schema


@dataclasses.dataclass(frozen=True)
class Api:
    """The answers of one model."""

    run: Run
    engine: Engine
    counts: Counts
    limits: Limits
    capacity: int
    with_key: bool

    @property
    def model(self) -> str:
        """The model's name: that of the run's folder."""
        return self.run.folder.name or Path.cwd().name  # --checkpoint . has none

    def application(self) -> Starlette:
        schema = completion_schema(self.model, self.run.tokenizer, self.limits)
        described = describe_server(self.model, schema, with_key=self.with_key)
        described_run = describe_run(self.run, self.model, self.limits, self.capacity)
        card = {"id": self.model, "object": "model", "created": int(time.time()), "owned_by": "parallax"}

        async def complete(request: Request) -> Response:
            body = await self._read_body(request)
            ask = read_ask(read_json(body), schema, self.run.tokenizer, self.limits.max_answers)
            return await self._complete(request, ask)

        async def tell_model(request: Request) -> Response:
            if request.path_params["model"] != self.model:
                message = f"model={request.path_params['model']!r} is not served here; try {self.model!r}"
                raise Refusal(404, message, param="model", code="model_not_found")
            return json_response(card)

        async def tell_counts(_: Request) -> Response:
            return Response(self.counts.text(), media_type="text/plain; version=0.0.4")

        app = Starlette(
            routes=[
                Route("/v1/completions", complete, methods=["POST"]),
                _fixed("/v1/models", {"object": "list", "data": [card]}),
                Route("/v1/models/{model:path}", tell_model, methods=["GET"]),
                _fixed("/healthz", {"status": "ok", "model": self.model}),
                Route("/metrics", tell_counts, methods=["GET"]),
                _fixed("/run", described_run),
                _fixed("/openapi.json", described),
                *asset_routes(),
            ],
            exception_handlers=dict.fromkeys(
                (Refusal, HTTPException, ClientDisconnect, Exception), say_refusal
            ),
        )
        app.router.redirect_slashes = False
        return app

    async def _read_body(self, request: Request) -> bytes:
        """The body, of the right type, no larger and no slower than allowed; raises Refusal."""
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, f"Content-Type={kind!r} must be application/json; send JSON with that header")
        limit, body = self.limits.max_body_bytes, b""
        announced = request.headers.get("content-length", "0")
        seconds = self.limits.body_seconds
        try:
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limit or int(announced) > limit:
                        raise Refusal(
                            413, f"body must not exceed {limit} bytes; send less, or several requests"
                        )
        except TimeoutError:
            message = f"body must arrive within {seconds} s, and {len(body)} bytes did; send it faster"
            raise Refusal(408, message, headers={"Connection": "close"}) from None
        return body

    async def _complete(self, request: Request, ask: Ask) -> Response:
        completions = ask.completions(self.run.tokenizer.end_ids)
        for completion in completions:
            try:
                self.engine.check(completion)
            except ValueError as error:
                raise Refusal(400, str(error), param="prompt", code="context_length_exceeded") from None
        job = self.engine.submit(completions)
        answer = Answer(ask, job, self.run.tokenizer, self.model, self.counts)
        if ask.stream:
            return EventStream(answer)
        try:
            return await _unless_gone(request, answer)
        finally:
            answer.close()


class EventStream(StreamingResponse):
    """An answer as server-sent events, closed when it was sent or nobody reads it any more."""

    def __init__(self, answer: Answer):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(answer.events(), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect):
                await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _unless_gone(request: Request, answer: Answer) -> Response:
    """The whole answer, given up as soon as the client closes its connection."""
    whole = asyncio.create_task(answer.whole())
    gone = asyncio.create_task(_wait_until_gone(request))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        return json_response(whole.result()) if whole.done() else Response(status_code=CLIENT_GONE)
    finally:
        whole.cancel()
        gone.cancel()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _fixed(path: str, value: Any) -> Route:
    async def answer(_: Request) -> Response:
        return json_response(value)

    return Route(path, answer, methods=["GET"])
