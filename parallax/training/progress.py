"""What a person sees while a run goes on: a bar on a terminal, plain lines anywhere else.

Invariant: everything goes to standard error, and no control code to what is not a terminal.
"""

import datetime
import sys
import time
from typing import Any

_NAMES = {"loss": "loss {:.4f}", "eval_loss": "eval {:.4f}", "tokens_per_second": "{:,.0f} tokens/s"}


class TrainingProgress:
    """Step of total, loss, evaluation loss, tokens a second, time gone and time left.

    `start` once, `update` and `log` as often as wanted, `close` at the end, also after an error.
    """

    def __init__(self):
        self._latest: dict[str, float] = {}
        self._bar: Any = None
        self._task: Any = None

    def start(self, initial_step: int, total: int) -> None:
        """Begins at `initial_step` steps done of `total`."""
        self._total = total
        self._began = time.monotonic()
        # The rate is measured from the first update on: the steps before it compile.
        self._reference: tuple[float, int] | None = None
        if sys.stderr.isatty():
            self._start_bar(initial_step)

    def update(self, step: int, **latest: float) -> None:
        """Moves to `step` steps done. `loss`, `eval_loss` and `tokens_per_second` are shown until they change.

        Without a terminal this prints a line if any of them is given, so that logged steps alone are printed.
        """
        now = time.monotonic()
        self._reference = self._reference or (now, step)
        self._latest |= {name: float(latest[name]) for name in _NAMES if name in latest}
        shown = "  ".join(text.format(self._latest[name]) for name, text in _NAMES.items() if name in self._latest)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, latest=shown)
        elif latest:
            left = self._seconds_left(now, step)
            times = f"{_clock(now - self._began)} gone" + ("" if left is None else f", {_clock(left)} left")
            self.log(f"step {step}/{self._total}  {shown}  {times}")

    def log(self, line: str) -> None:
        """Prints one line, above the bar where there is one."""
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it last was."""
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
