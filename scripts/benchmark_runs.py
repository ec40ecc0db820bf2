"""Whole runs of train.py, as a user starts them, for what only a whole run shows.

Invariant: a run is a process of its own in a folder of its own, and is timed from the moment it is started.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmark_rounds import SCRIPTS

LOOK = 0.05
"""Seconds between two looks at the metrics of a run under way."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run left."""

    wall_seconds: float
    """From the start of the process to its end."""
    evaluations: list[tuple[float, int, float]]
    """Seconds since the start, step and evaluation loss, as each was found in metrics.jsonl."""
    summary: dict[str, Any]
    """summary.json; empty where the run was ended before."""


def environment(cache: Path) -> dict[str, str]:
    """Of a run: one device, and compiled programs kept in `cache`."""
    mine = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    return os.environ | mine | {"JAX_COMPILATION_CACHE_DIR": str(cache)}


def run_train(
    flags: Sequence[str],
    *,
    enough: Callable[[float, list], bool] = lambda seconds, evaluations: False,
    watch: Callable[[float, list], None] = lambda seconds, evaluations: None,
) -> Run:
    """Runs train.py with these flags until it ends, or until `enough` of (seconds so far, evaluations) holds.

    Nothing is compiled before, so that every run pays for it.

    Raises:
      ValueError: train.py refused its flags or failed; with its last line.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder, said = Path(temporary, "run"), Path(temporary, "said")
        command = [sys.executable, str(SCRIPTS / "train.py"), *flags, "--output-dir", str(folder)]
        began, evaluations = time.monotonic(), []
        with said.open("w") as out:
            process = subprocess.Popen(  # noqa: S603 - this Python and a file of ours
                command, env=environment(Path(temporary, "cache")), stdout=out, stderr=out
            )
        try:
            while process.poll() is None:
                time.sleep(LOOK)
                seconds = time.monotonic() - began
                found = _evaluations(folder / "metrics.jsonl")
                evaluations += [(seconds, *each) for each in found[len(evaluations) :]]
                watch(seconds, evaluations)
                if enough(seconds, evaluations):
                    return Run(seconds, evaluations, {})
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            last = (said.read_text().splitlines() or ["nothing said"])[-1]
            raise ValueError(f"train.py ended with status {process.returncode}: {last}")
        summary = json.loads((folder / "summary.json").read_text())
        return Run(time.monotonic() - began, evaluations, summary)


def _evaluations(path: Path) -> list[tuple[int, float]]:
    """Steps and losses so far; a line that is still being written is left for the next look."""
    try:
        lines = path.read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in lines if '"eval_loss"' in line]
    return [(row["step"], row["eval_loss"]) for row in rows]
