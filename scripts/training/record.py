"""What a run writes of itself while it goes: metrics, TensorBoard events, samples and the plot of its loss.

Invariant: a run that was registered is held against its prediction in all of them, and says once that it left it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from parallax.prediction import expected_at, judge
from parallax.training.loop import Row
from parallax.training.metric_writers import MetricsWriter
from parallax.training.plot import plot_loss
from scripts.training.job import say


class Files:
    """metrics.jsonl, TensorBoard events and, at each evaluation, loss.png and samples.jsonl.

    Args:
      start: the step that the run goes on from.
      texts: what the prompts were continued with at the last evaluation.
    """

    def __init__(self, folder: Path, start: int, texts: Callable[[], Mapping[str, str]] = dict):
        self._folder, self._texts = folder, texts
        self._writer = MetricsWriter(folder, resume_step=start)
        self._plotted = False  # with all rows up to the last
        verdict = judge(folder)
        self._left = verdict.get("left_at") is not None
        if differs := verdict.get("differs"):
            say(f"differs   from the run that was predicted in {', '.join(differs)}; it is not judged")

    def step(self, step: int, metrics: Row) -> None:
        pass

    def row(self, row: Row) -> None:
        step = int(row["step"])
        evaluated = "eval_loss" in row
        expected = expected_at(self._folder, step) if evaluated else {}
        self._writer.write(step, {name: value for name, value in (row | expected).items() if name != "step"})
        self._plotted = evaluated
        if evaluated:
            plot_loss(self._folder)
            if texts := self._texts():
                self._writer.write_samples(step, texts)
            self._say_left()

    def _say_left(self) -> None:
        """Once, when an evaluation is outside of the interval of the prediction."""
        left_at = None if self._left else judge(self._folder).get("left_at")
        if left_at is not None:
            self._left = True
            say(f"warning   step {left_at} left the interval of the prediction; see loss.png")

    def close(self) -> None:
        self._writer.close()
        if not self._plotted:
            plot_loss(self._folder)
