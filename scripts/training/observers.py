"""Who watches a run: its files, its plot and the person at the terminal.

Invariant: observers only listen; a run without them takes the same steps.
"""

from pathlib import Path

from parallax.training.loop import Row
from parallax.training.metrics import MetricsWriter
from parallax.training.plot import plot_loss
from parallax.training.progress import TrainingProgress


class Files:
    """metrics.jsonl, TensorBoard events and, at each evaluation, loss.png."""

    def __init__(self, folder: Path, start: int):
        self._folder = folder
        self._writer = MetricsWriter(folder, resume_step=start)

    def step(self, step: int, metrics: Row) -> None:
        pass

    def row(self, row: Row) -> None:
        self._writer.write(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
        if "eval_loss" in row:
            plot_loss(self._folder)

    def close(self) -> None:
        self._writer.close()
        plot_loss(self._folder)


class Terminal:
    """A progress bar, or a plain line a logged step where standard error is no terminal."""

    def __init__(self, start: int, total: int):
        self._progress = TrainingProgress()
        self._progress.start(start, total)

    def step(self, step: int, metrics: Row) -> None:
        self._progress.update(step)

    def row(self, row: Row) -> None:
        self._progress.update(**{**row, "step": int(row["step"])})

    def close(self) -> None:
        self._progress.close()
