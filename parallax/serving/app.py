"""What the server answers at which address: the API, the page at /, and the run behind them.

Invariant: a request is either refused before it takes a slot, or its answer is closed at the end, whatever the end was:
so no slot stays with a client that went away. The page is the files of page/, read once; it loads nothing from
elsewhere and runs no other script.
"""

import asyncio
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from parallax.run_folder import Run
from parallax.serving.access import Guard, Limits
from parallax.serving.answer import Answer
from parallax.serving.chat_answer import ChatAnswer
from parallax.serving.chat_request import ChatForm
from parallax.serving.engine import Counts, Engine
from parallax.serving.errors import CLIENT_GONE, Refusal, json_response, say_refusal
from parallax.serving.openapi import describe_server
from parallax.serving.request import Ask, CompletionForm, model_of, unknown_model
from parallax.tokenizers.chat import Chat
from parallax.training.metric_writers import METRICS_FILE, SAMPLES_FILE

FOLDER = Path(__file__).resolve().parent / "page"
KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
MAX_POINTS = 400
"""Points of each curve: more cannot be distinguished on a screen."""

NO_CHAT = "this model has no chat template and takes no messages; serve it with --chat-template FILE, or plain"


@dataclasses.dataclass(frozen=True)
class Served:
    """A model that a server answers for."""

    name: str
    run: Run
    engine: Engine
    capacity: int
    """The tokens that an answer may hold, with its prompt."""


def application(models: Sequence[Served], slots: int, limits: Limits, names: frozenset[str] | None, key: str) -> Guard:
    """The whole server of some models, and of their chats where they have a template for them.

    Args:
      models: the first is the one that the page talks to; all have its tokenizer.
      slots: how many answers of a model are computed at once.
      names, key: as `Guard` takes them.
    """
    counts, known = Counts([each.engine for each in models], slots), [each.name for each in models]
    desks = {each.name: _Desk(each, known, limits.within(each.capacity)) for each in models}
    first, created = desks[known[0]], int(time.time())
    chat = next((desk.chat.schema for desk in desks.values() if desk.chat), None)  # adapters may have taught a base
    cards = {name: {"id": name, "object": "model", "created": created, "owned_by": "parallax"} for name in known}

    async def take(request: Request) -> tuple[_Desk, bytes]:
        body = await _read_body(request, limits)
        # A body that names no model of these is refused at the first desk.
        return (first if len(desks) == 1 else desks.get(model_of(body) or "", first)), body

    async def complete(request: Request) -> Response:
        desk, body = await take(request)
        return await reply(request, desk, Answer, desk.form.read(body))

    async def talk(request: Request) -> Response:
        desk, body = await take(request)
        if desk.chat is None:
            raise Refusal(404, NO_CHAT, code="no_chat_template")
        # In a thread: a template may take its time.
        return await reply(request, desk, ChatAnswer, await asyncio.to_thread(desk.chat.read, body))

    async def reply(request: Request, desk: _Desk, kind: type[Answer], ask: Ask) -> Response:
        tokenizer = desk.model.run.tokenizer
        job = desk.model.engine.submit(ask.completions(tokenizer.end_ids))
        answer = kind(ask, job, tokenizer, desk.model.name, counts)
        return EventStream(answer) if ask.stream else await _unless_gone(request, answer)

    async def one_model(request: Request) -> Response:
        if (asked := request.path_params["model"]) not in cards:
            raise unknown_model(asked, known)
        return json_response(cards[asked])

    async def health(_: Request) -> Response:
        degraded = any(each.engine.degraded for each in models)
        return json_response({"status": "degraded" if degraded else "ok", "model": known[0]}, 503 if degraded else 200)

    async def metrics(_: Request) -> Response:
        return Response(counts.text(), media_type="text/plain; version=0.0.4")

    assets = [
        _asset("/", FOLDER / "index.html", "text/html"),
        *(
            _asset(f"/{path.name}", path, KINDS[path.suffix])
            for path in sorted(FOLDER.iterdir())
            if path.suffix in KINDS
        ),
    ]
    app = Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", talk, methods=["POST"]),
            _fixed("/v1/models", {"object": "list", "data": [*cards.values()]}),
            Route("/v1/models/{model:path}", one_model, methods=["GET"]),
            Route("/healthz", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            _fixed("/run", _describe_run(first.model, limits.within(first.model.capacity))),
            _fixed("/openapi.json", describe_server(known, first.form.schema, chat, with_key=bool(key))),
            *assets,
        ],
        exception_handlers=dict.fromkeys((Refusal, HTTPException, ClientDisconnect, Exception), say_refusal),
    )
    app.router.redirect_slashes = False
    open_paths = frozenset({"/healthz", *(route.path for route in assets)})
    return Guard(app, names, key, open_paths, lambda status: counts.requests.labels(str(status)).inc())


class _Desk:
    """Where requests to one model are read."""

    def __init__(self, model: Served, known: Sequence[str], limits: Limits):
        run, template = model.run, model.run.chat_template
        self.model, self.form = model, CompletionForm(known, run.tokenizer, limits)
        self.chat = ChatForm(known, Chat(template, run.tokenizer), limits, model.capacity) if template else None


async def _read_body(request: Request, limits: Limits) -> bytes:
    """The body, of the right type, no larger and no slower than allowed; raises Refusal."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, f"Content-Type={kind!r} must be application/json; send JSON with that header")
    limit, seconds, body = limits.max_body_bytes, limits.body_seconds, b""
    announced = int(request.headers.get("content-length", "0"))
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if max(len(body), announced) > limit:
                    message = f"body must not exceed {limit} bytes; send less, or several requests"
                    raise Refusal(413, message)
    except TimeoutError:
        message = f"body must arrive within {seconds} s, and {len(body)} bytes did; send it faster"
        raise Refusal(408, message, headers={"Connection": "close"}) from None
    return body


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
    """The whole answer, given up and closed as soon as the client closes its connection."""
    whole = asyncio.create_task(answer.whole())
    gone = asyncio.create_task(_wait_until_gone(request))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        return json_response(whole.result()) if whole.done() else Response(status_code=CLIENT_GONE)
    finally:
        whole.cancel()
        gone.cancel()
        answer.close()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _fixed(path: str, value: Any) -> Route:
    return _always(path, json_response(value))


def _asset(address: str, path: Path, kind: str) -> Route:
    return _always(address, Response(path.read_bytes(), headers=HEADERS, media_type=kind))


def _always(path: str, response: Response) -> Route:
    async def answer(_: Request) -> Response:
        return response

    return Route(path, answer, methods=["GET"])


def _describe_run(model: Served, limits: Limits) -> dict[str, Any]:
    """What /run says: the model's shape, how it was trained, its loss curves as [step, loss], samples of the last
    evaluation as [prompt, text], and what may be asked.
    """
    run, rows = model.run, _rows(model.run, METRICS_FILE)
    return {
        "model": model.name,
        "step": run.step,
        "parameters": run.config.num_params(),
        "tokenizer": run.tokenizer.name,
        "capacity": model.capacity,
        "max_prompt_tokens": limits.max_prompt_tokens,
        "max_tokens": limits.max_tokens,
        "chat": run.chat_template is not None,
        "loss": _curve(rows, "loss"),
        "eval_loss": _curve(rows, "eval_loss"),
        "samples": _of_last(_rows(run, SAMPLES_FILE)),
        "config": _finite(run.settings),
    }


def _rows(run: Run, name: str) -> list[dict[str, Any]]:
    """The whole rows of a file; none where it is not there."""
    try:
        text = (run.folder / name).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run under way may be torn
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _of_last(samples: list[dict[str, Any]]) -> list[list[str]]:
    """The samples of the newest step, as [prompt, text]."""
    return [[str(row["prompt"]), str(row["text"])] for row in samples if row["step"] == samples[-1]["step"]]


def _curve(rows: Iterable[dict[str, Any]], name: str) -> list[list[float]]:
    numbers = (row for row in rows if isinstance(row.get(name), int | float) and "step" in row)
    points = [[row["step"], row[name]] for row in numbers if math.isfinite(row[name])]
    every = -(-len(points) // MAX_POINTS)
    return [*points[:-1:every], *points[-1:]] if points else []


def _finite(value: Any) -> Any:
    """A config for JSON, which has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
