"""A run's record: metrics.jsonl and samples.jsonl, one JSON object a line, and the same as TensorBoard events.

Invariant: each line is complete standard JSON and steps never go back, so the record of a run that was cut off and
resumed equals that of one which never stopped, the fields that time it excepted.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
"""What a model made of fixed prompts, as {"step", "prompt", "text"}."""

Row = dict[str, Any]


class MetricsWriter:
    """Appends rows to `run_dir/metrics.jsonl`, texts to `run_dir/samples.jsonl`, and both to
    `run_dir/events.out.tfevents.*`.

    Args:
      run_dir: made if it does not exist.
      resume_step: None for a new record. A step for one that goes on after it: later rows and a torn last line are
        dropped, and TensorBoard gets word to forget later events.

    Raises:
      ValueError: a whole line of the record that goes on is not a row.
      OSError: the folder cannot be written.
    """

    def __init__(self, run_dir: str | os.PathLike, *, resume_step: int | None):
        folder = pathlib.Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        first = 0 if resume_step is None else resume_step + 1
        self._file = _continued(folder / METRICS_FILE, first)
        self._samples = _continued(folder / SAMPLES_FILE, first) if (folder / SAMPLES_FILE).exists() else None
        self._folder, self._first = folder, first
        self._made: _Events | None = None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends {"step": step, **values} and flushes it.

        Values are numbers, or arrays of one. A value that is not finite becomes null, for standard JSON has no NaN,
        and no event. An evaluation is a row of its own, {"step", "eval_loss"}.
        """
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: number for name, number in numbers.items() if math.isfinite(number)}
        row = {"step": int(step)} | {name: finite.get(name) for name in numbers}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._events.write(int(step), finite)

    def write_samples(self, step: int, texts: Mapping[str, str]) -> None:
        """Appends what each prompt was continued with, and flushes it."""
        self._samples = self._samples or _continued(self._folder / SAMPLES_FILE, 0)
        for number, (prompt, text) in enumerate(texts.items()):
            self._samples.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
            self._events.write_text(step, f"sample/{number}", f"{prompt}\n{text}")
        self._samples.flush()

    @property
    def _events(self) -> "_Events":
        """Made when it is used: tensorboardX is slow to import, and the first step need not wait for it."""
        self._made = self._made or _Events(self._folder, self._first)
        return self._made

    def close(self) -> None:
        """Flushes and closes all files."""
        for file in filter(None, (self._file, self._samples, self._made)):
            file.close()


def _continued(path: pathlib.Path, first: int) -> TextIO:
    """A file of rows to append to, of which those of step `first` and later are gone."""
    kept = [row for row in read_metrics(path) if row["step"] < first] if first else []
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    draft.replace(path)
    return path.open("a", encoding="utf-8")


class _Events:
    """A TensorBoard event file whose first event forgets all events from step `first` on.

    Written in place and not by tensorboardX's SummaryWriter, whose queue loses what a killed run logged last.
    """

    def __init__(self, folder: pathlib.Path, first: int):
        # tensorboardX imports both where they are there, for seconds and 0.15 s, and nothing here needs them.
        with _hidden("torch"), _hidden("google.cloud.storage"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
            from tensorboardX.summary import text

        # Generated modules: their classes are made at import, where no type checker sees them.
        self._event: Any = event_pb2
        self._summary: Any = summary_pb2
        self._text: Any = text
        # Event files are named by the second; the suffix keeps a quick restart from writing over the last one.
        self._writer = EventsWriter(str(folder / "events"), f".{first}")
        self._append(first, session_log=self._event.SessionLog(status=self._event.SessionLog.START))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [self._summary.Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._append(step, summary=self._summary.Summary(value=values))

    def write_text(self, step: int, tag: str, text: str) -> None:
        self._append(step, summary=self._text(tag, textwrap.indent(text, "    ")))  # code, in Markdown

    def close(self) -> None:
        self._writer.close()

    def _append(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event.Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Until it closes, importing that module fails, unless it was imported before."""
    hide = module not in sys.modules
    if hide:
        sys.modules[module] = None  # pyright: ignore[reportArgumentType]: importlib's word for "not to be had"
    try:
        yield
    finally:
        if hide:
            del sys.modules[module]


def read_metrics(path: str | os.PathLike) -> list[Row]:
    """The rows of a metrics.jsonl in order; a torn last line is left out; no file is no rows.

    Raises ValueError if another line is not a JSON object with a step.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    # What follows the last newline was cut off while being written, even where it happens to parse.
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        row = _parsed(line)
        if row is None:
            raise ValueError(f"line {number} of {path} is not a row of metrics; remove that line")
        rows.append(row)
    return rows


def _parsed(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
