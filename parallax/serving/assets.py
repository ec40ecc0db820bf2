"""The page at / and what it shows of the run.

Invariant: the page is the files of page/, read once; it loads nothing from elsewhere and runs no other script.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from parallax.run_folder import Run
from parallax.serving.limits import Limits

FOLDER = Path(__file__).resolve().parent / "page"
KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
MAX_POINTS = 400
"""Of each curve: more cannot be told apart on a screen."""


def asset_routes() -> list[Route]:
    """The page and what it loads, each at its own name."""
    files = sorted(path for path in FOLDER.iterdir() if path.suffix in KINDS)
    page = _asset("/", FOLDER / "index.html", "text/html")
    return [page, *(_asset(f"/{path.name}", path, KINDS[path.suffix]) for path in files)]


def describe_run(run: Run, model: str, limits: Limits, capacity: int) -> dict[str, Any]:
    """What /run says: the model's shape, how it was trained, its loss curves as [step, loss], and what may be asked."""
    rows = _rows(run)
    return {
        "model": model,
        "step": run.step,
        "parameters": run.config.num_params(),
        "tokenizer": run.tokenizer.name,
        "capacity": capacity,
        "max_prompt_tokens": limits.max_prompt_tokens,
        "max_tokens": limits.max_tokens,
        "loss": _curve(rows, "loss"),
        "eval_loss": _curve(rows, "eval_loss"),
        "config": _finite(run.settings),
    }


def _asset(address: str, path: Path, kind: str) -> Route:
    content = path.read_bytes()

    def answer(_: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return Route(address, answer, methods=["GET"])


def _rows(run: Run) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl; none where the file is not there."""
    try:
        text = (run.folder / "metrics.jsonl").read_text("utf-8")
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


def _curve(rows: Iterable[dict[str, Any]], name: str) -> list[list[float]]:
    points = [[row["step"], row[name]] for row in rows if _is_finite(row.get(name)) and "step" in row]
    every = -(-len(points) // MAX_POINTS)
    return [*points[:-1:every], *points[-1:]] if points else []


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _finite(value: Any) -> Any:
    """A config for JSON, which has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
