"""Observers of a run: a bar on a terminal, or plain lines, and a trace of a few steps for TensorBoard or Perfetto.

Invariant: every line goes to standard error, and no control code to what is not a terminal. A run has at most one
trace, of steps after compilation.
"""

import datetime
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

_NAMES = {"loss": "loss {:.4f}", "eval_loss": "eval {:.4f}", "tokens_per_second": "{:,.0f} tokens/s"}


class Terminal:
    """Observes a run and shows step of total, losses, tokens a second, time gone and time left.

    Args:
      start: how many steps of `total` are done.
    """

    def __init__(self, start: int, total: int):
        self._total, self._began = total, time.monotonic()
        # The rate is measured from the first step on: those before it compile.
        self._reference: tuple[float, int] | None = None
        self._latest: dict[str, float] = {}
        self._bar: Any = None
        if sys.stderr.isatty():
            self._start_bar(start)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves to `step` steps done."""
        self._reference = self._reference or (time.monotonic(), step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def row(self, row: Mapping[str, float]) -> None:
        """Shows the numbers of a row until they change; without a terminal, in a line."""
        step, now = int(row["step"]), time.monotonic()
        self._reference = self._reference or (now, step)
        self._latest |= {name: float(row[name]) for name in _NAMES if name in row}
        shown = "  ".join(text.format(self._latest[name]) for name, text in _NAMES.items() if name in self._latest)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, latest=shown)
        else:
            left = self._seconds_left(now, step)
            times = f"{_clock(now - self._began)} gone" + ("" if left is None else f", {_clock(left)} left")
            print(f"step {step}/{self._total}  {shown}  {times}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it last was; also for the end by an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start_bar(self, initial_step: int) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(bar_width=12),
            progress.TextColumn("{task.fields[latest]}", markup=False),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(elapsed_when_finished=False),
            console=Console(stderr=True),
            redirect_stdout=False,  # a sample printed to standard output stays there
        )
        self._task = self._bar.add_task("", total=self._total, completed=initial_step, latest="")
        self._bar.start()

    def _seconds_left(self, now: float, step: int) -> float | None:
        then, first = self._reference or (now, step)
        return None if step <= first else (now - then) / (step - first) * (self._total - step)


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


SKIPPED, TRACED = 3, 5


class Profiler:
    """Observes a run and traces five of its steps into `folder`, or fewer when the run ends before."""

    def __init__(self, folder: Path, start: int):
        self._folder, self._first = folder, start + SKIPPED
        self._running = False

    def step(self, step: int, metrics: dict) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self._first + TRACED:
            self.close()

    def row(self, row: dict) -> None:
        pass

    def close(self) -> None:
        """Writes the trace if one is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
