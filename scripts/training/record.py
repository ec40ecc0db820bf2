"""What a run writes of itself while it goes: metrics, TensorBoard events, samples and the plot of its loss."""

from collections.abc import Callable, Mapping
from pathlib import Path

from parallax.training.loop import Row
from parallax.training.metrics import MetricsWriter
from parallax.training.plot import plot_loss


class Files:
    """metrics.jsonl, TensorBoard events and, at each evaluation, loss.png and samples.jsonl.

    Args:
      start: the step that the run goes on from.
      texts: what the prompts were continued with at the last evaluation.
    """

    def __init__(self, folder: Path, start: int, texts: Callable[[], Mapping[str, str]] = dict):
        self._folder, self._texts = folder, texts
        self._writer = MetricsWriter(folder, resume_step=start)

    def step(self, step: int, metrics: Row) -> None:
        pass

    def row(self, row: Row) -> None:
        step = int(row["step"])
        self._writer.write(step, {name: value for name, value in row.items() if name != "step"})
        if "eval_loss" in row:
            plot_loss(self._folder)
            if texts := self._texts():
                self._writer.write_samples(step, texts)

    def close(self) -> None:
        self._writer.close()
        plot_loss(self._folder)
