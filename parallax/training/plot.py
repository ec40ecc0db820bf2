"""loss.png: a run's loss curve, drawn from its metrics.jsonl.

Invariant: the file on disk is always a whole picture, and drawing touches no global state of matplotlib.
"""

import logging
import os
import pathlib
from typing import Any

import numpy as np

from parallax.prediction import Prediction, read_prediction
from parallax.training.metric_writers import METRICS_FILE, Row, read_metrics

LOSS_PLOT = "loss.png"
_SMOOTHING = 0.04
"""Width of the moving average, as a share of the curve."""


def plot_loss(run_dir: str | os.PathLike) -> None:
    """Draws the training loss, its moving average and the evaluations in nats a token; nothing if there are none."""
    folder = pathlib.Path(run_dir)
    rows = read_metrics(folder / METRICS_FILE)
    steps, losses = _series(rows, "loss")
    eval_steps, eval_losses = _series(rows, "eval_loss")
    if not len(steps) and not len(eval_steps):
        return
    # The first use on a machine builds a font cache, and matplotlib warns that this takes a while.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    if len(steps):
        axes.plot(steps, losses, color="tab:blue", linewidth=0.8, alpha=0.35, label="training")
        axes.plot(steps, smooth(losses), color="tab:blue", linewidth=1.8, label="training, smoothed")
    if len(eval_steps):
        axes.plot(eval_steps, eval_losses, "o-", color="tab:orange", markersize=4, linewidth=1.2, label="evaluation")
        best = int(np.argmin(eval_losses))
        label = f"best: {eval_losses[best]:.4f} at step {eval_steps[best]:.0f}"
        axes.plot(eval_steps[best], eval_losses[best], "*", color="tab:red", markersize=13, zorder=3, label=label)
    if (prediction := read_prediction(folder)) is not None:
        _draw(axes, prediction, rows)
    axes.set(xlabel="step", ylabel="loss (nats/token)")
    axes.set_title(folder.resolve().name, parse_math=False)  # between two $ of a name it would look for a formula
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    draft = folder / f"{LOSS_PLOT}.draft"
    FigureCanvasAgg(figure).print_png(draft)
    draft.replace(folder / LOSS_PLOT)


def _draw(axes: Any, prediction: Prediction, rows: list[Row]) -> None:
    """What was predicted before the run began: the curve up to its end, and the interval about it."""
    lasts = [row["step"] / row["predicted_share"] for row in rows if row.get("predicted_share")]
    if not lasts:
        return
    shares = np.linspace(prediction.first_share, 1, 50)
    low, middle, high = np.array([prediction.at(share) for share in shares]).T
    steps = shares * lasts[-1]
    axes.plot(steps, middle, "--", color="tab:green", linewidth=1.2, label=f"predicted: {prediction.loss:.4f}")
    axes.fill_between(steps, low, high, color="tab:green", alpha=0.15, linewidth=0)


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a window centred on each of the [n] values and cut at the ends; as long as they are."""
    count, reach = len(values), int(len(values) * _SMOOTHING / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(count)
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, count)
    return (sums[high] - sums[low]) / (high - low)


def _series(rows: list[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one field where it is a number; rows from a step that was not finite have null."""
    points = np.array([(row["step"], row[name]) for row in rows if row.get(name) is not None], np.float64)
    return points.reshape(-1, 2)[:, 0], points.reshape(-1, 2)[:, 1]
