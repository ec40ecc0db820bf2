"""Contenders measured in turn, A B A B, and what their numbers say.

Invariant: no two contenders compute at the same time, and ratios are taken within a round, so that a machine whose
speed drifts favours nobody.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SCRIPTS = Path(__file__).resolve().parent

ENVIRONMENT = {
    # The allocator of train.py, for everyone: freed memory is kept; and huge pages, which it does not ask for.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "JAX_PLATFORMS": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
"""Of every contender."""


class Worker:
    """A contender's process, from its start until `close`; ready when the constructor returns.

    Raises:
      ValueError: what it is asked for is wrong, or a package is missing.
      RuntimeError: it died; with the last lines that it wrote.
    """

    def __init__(self, name: str, kind: str, devices: int = 1, **spec: Any):
        self.name = name
        # To a file, since a pipe that nobody reads fills up; `close` closes it.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(  # noqa: S603 - this Python and a file of ours
            [sys.executable, str(SCRIPTS / "benchmark_worker.py"), kind, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": ""},
        )
        try:
            self.facts: dict[str, Any] = self._read("facts")
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """What it measured; waits for it."""
        stdin = self._process.stdin
        if stdin is None:
            raise RuntimeError(f"{self.name} has no standard input")
        with contextlib.suppress(BrokenPipeError):  # it died, as reading will tell
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        return self._read("result")

    def _read(self, what: str) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = "\n".join(self._errors.read().splitlines()[-25:])
            raise RuntimeError(f"{self.name} ended with status {self._process.returncode}\n{last}")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(f"{self.name}: {answer['error']}")
        return answer[what]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def calibrate(worker: Worker, seconds: float) -> int:
    """How many units of work last that long."""
    worker.ask(units=1)
    once = worker.ask(units=2)["seconds"] / 2
    return max(1, round(seconds / once))


def require_positive(flags: Any, *names: str) -> None:
    """Raises ValueError for the first of these flags that is not above 0, with its default as the remedy."""
    for name in names:
        if getattr(flags, name) <= 0:
            default = getattr(type(flags), name)
            raise ValueError(f"{name}={getattr(flags, name)} must be positive; try {default}")


class Bar:
    """How far a measurement is, on standard error."""

    def __init__(self, shown: Progress, what: str, total: int):
        self._shown, self._task = shown, shown.add_task(what, total=total)

    def say(self, what: str, done: int | None = None) -> None:
        self._shown.update(self._task, description=what, completed=done)

    def advance(self) -> None:
        self._shown.advance(self._task)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Bar]:
    """A bar over `total` rounds."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield Bar(shown, what, total)


def interleave(
    workers: Sequence[Worker], requests: Sequence[dict[str, Any]], rounds: int, what: str
) -> dict[str, list[dict[str, Any]]]:
    """`rounds` results of each worker's request, by its name, taken in turn after one that is not counted."""
    results: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    with progress(what, rounds + 1) as bar:
        for number in range(rounds + 1):
            for worker, request in zip(workers, requests, strict=True):
                bar.say(f"{what}: {worker.name}")
                result = worker.ask(**request)
                if number:
                    results[worker.name].append(result)
            bar.advance()
    return results


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of several measurements."""

    least: float
    median: float
    most: float

    def __str__(self) -> str:
        return self.text(2)

    def text(self, digits: int) -> str:
        """`median (least to most)` with so many digits after the point."""
        least, median, most = (f"{each:.{digits}f}" for each in (self.least, self.median, self.most))
        return f"{median} ({least} to {most})"


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError where there are none."""
    if not values:
        raise ValueError("no measurement was made; give at least 1 round")
    return Spread(min(values), statistics.median(values), max(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of the quotients of two contenders' numbers, round by round.

    Raises:
      ValueError: there are not as many of one as of the other.
    """
    return spread([a / b for a, b in zip(above, below, strict=True)])
