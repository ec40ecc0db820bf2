"""A run's record: metrics.jsonl, one JSON object a line, and the same numbers as TensorBoard events.

Invariant: each line is complete standard JSON and steps never go back, so the record of a run that was cut off and
resumed equals that of one which never stopped, the fields that time it excepted.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

METRICS_FILE = "metrics.jsonl"
TIMING_FIELDS = frozenset({"tokens_per_second", "step_time", "mfu"})
"""What differs between two runs of the same curve."""

Row = dict[str, Any]


class MetricsWriter:
    """Appends rows to `run_dir/metrics.jsonl` and scalars to `run_dir/events.out.tfevents.*`.

    Args:
      run_dir: made if it does not exist.
      resume_step: None for a new record. A step for one that goes on after it: later rows and a torn last line are
        dropped, and TensorBoard is told to forget later events.

    Raises:
      ValueError: a whole line of the record that goes on is not a row.
      OSError: the folder cannot be written.
    """

    def __init__(self, run_dir: str | os.PathLike, *, resume_step: int | None):
        from tensorboardX import SummaryWriter

        folder = pathlib.Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        kept = (
            [] if resume_step is None else [row for row in read_metrics(path) if row["step"] <= resume_step]
        )
        draft = path.with_name(f"{METRICS_FILE}.draft")
        draft.write_text("".join(map(_line, kept)))
        draft.replace(path)
        self._file = path.open("a")
        # Purging starts at a step, so the first one to forget is the one after the last that stays.
        purge = None if resume_step is None else resume_step + 1
        self._events = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends {"step": step, **values} and flushes it.

        Values are numbers, or arrays of one. A value that is not finite becomes null, since standard JSON has no
        NaN. An evaluation is a row of its own, {"step", "eval_loss"}.
        """
        row = {"step": int(step), **{name: float(value) for name, value in values.items()}}
        self._file.write(_line(row))
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flushes and closes both files."""
        self._file.close()
        self._events.close()


def read_metrics(path: str | os.PathLike) -> list[Row]:
    """The rows of a metrics.jsonl in order; a torn last line is left out; no file is no rows.

    Raises:
      ValueError: another line is not a JSON object with a step.
    """
    try:
        text = pathlib.Path(path).read_text(errors="replace")
    except FileNotFoundError:
        return []
    # What follows the last newline was cut off while being written, even where it happens to parse.
    lines = text.split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"line {number} of {path} is not a row of metrics; remove that line") from None
        rows.append(row)
    return rows


def _line(row: Row) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
