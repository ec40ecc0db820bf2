"""summary.json: how a run ended, and where its wall time went, over all of its attempts.

Invariant: whatever kills an attempt, the file on disk is whole and true of some moment of that attempt not before its
last checkpoint; the attempt that resumes accounts for the rest.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from parallax.prediction import judge
from parallax.storage import write_json
from parallax.training.loop import Stopwatch
from parallax.training.metric_writers import METRICS_FILE

SUMMARY_FILE = "summary.json"


class Summary:
    """The record of one attempt, behind those of the attempts before it.

    Args:
      folder: the run folder.
      began: when this process began, in seconds since 1970.
      start: the step that it goes on from.
      stopwatch: what it spends its time on; `startup` must be in it once training begins.
      changed: flags that this attempt changed of the run, each with [before, now].
      sources: what was learned from each source up to a step; nothing where the data is not in stores.
    """

    def __init__(
        self,
        folder: Path,
        began: float,
        start: int,
        stopwatch: Stopwatch,
        changed: Mapping[str, list[Any]] | None = None,
        sources: Callable[[int], dict[str, Any]] = lambda step: {},
    ):
        self._path = folder / SUMMARY_FILE
        self._began, self._stopwatch, self._sources = began, stopwatch, sources
        self._earlier = _read_attempts(folder)
        self._attempt: dict[str, Any] = {"from_step": start, "began": round(began, 3)}
        self._attempt |= {"changed": dict(changed)} if changed else {}

    def write(self, step: int, best_step: int | None, end: str = "", failure: str | None = None) -> None:
        """Writes the file. `end` is finished, stopped or failed, and empty while the attempt goes on."""
        wall = time.time() - self._began
        seconds = dict(self._stopwatch.seconds)
        seconds["other"] = max(0.0, wall - sum(seconds.values()))
        attempts = [*self._earlier, self._attempt | {"to_step": step, "end": end, "seconds": _rounded(seconds)}]
        total = _total(attempts)
        wall_seconds, sources = sum(total.values()), self._sources(step)
        write_json(
            self._path,
            {
                "finished": end == "finished",
                "step": step,
                "best_step": best_step,
                "failure": failure,
                "wall_seconds": round(wall_seconds, 3),
                "seconds": _rounded(total),
                "goodput": round(total.get("step", 0.0) / wall_seconds, 4) if wall_seconds else 0.0,
                "attempts": attempts,
                **({"sources": sources} if sources else {}),
                **({"prediction": judged} if (judged := judge(self._path.parent)) else {}),
            },
        )


def describe_time(folder: Path) -> str:
    """One line: how much of a run's wall time went to steps, and where the rest went, the largest first."""
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    wall, seconds = max(summary["wall_seconds"], 1e-9), dict(summary["seconds"])
    steps = seconds.pop("step", 0.0)
    others = sorted(seconds.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {spent / wall:.0%}" for name, spent in others if spent / wall >= 0.005)
    attempts = f" in {len(summary['attempts'])} attempts" if len(summary["attempts"]) > 1 else ""
    return f"{wall:.0f} s{attempts}: steps {steps / wall:.0%}" + (f", {shares}" if shares else "")


def _read_attempts(folder: Path) -> list[dict[str, Any]]:
    try:
        attempts = json.loads((folder / SUMMARY_FILE).read_text())["attempts"]
        return [_settled(attempt, folder) for attempt in attempts]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # none yet, or of a damaged disk: the time of earlier attempts is not worth a refusal


def _settled(attempt: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An earlier attempt; one that was killed also spent the time up to its last row of metrics, and lost it."""
    seconds = {name: float(spent) for name, spent in attempt["seconds"].items()}
    if attempt["end"]:
        return attempt
    record = folder / METRICS_FILE
    last_sign = record.stat().st_mtime if record.exists() else attempt["began"]
    seconds["lost"] = max(0.0, last_sign - attempt["began"] - sum(seconds.values()))
    return attempt | {"end": "killed", "seconds": _rounded(seconds)}


def _total(attempts: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by what they went to; the start-up of every attempt but the first is a restart."""
    total: dict[str, float] = {}
    for number, attempt in enumerate(attempts):
        for name, spent in attempt["seconds"].items():
            name = "restart" if name == "startup" and number else name
            total[name] = total.get(name, 0.0) + spent
    return total


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(spent, 3) for name, spent in seconds.items()}
