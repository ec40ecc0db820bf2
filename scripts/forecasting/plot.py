"""The pictures of a ladder: losses against FLOPs, and activations against width."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

from scripts.forecasting.fitting import Fitted
from scripts.forecasting.ladder import point_of


def plot_forecast(fitted: Fitted, target: Any, path: Path) -> None:
    """Loss against FLOPs: the runs of each size, the law along them, and the forecast with its interval.

    Args:
      target: a `Forecast`.
    """
    figure = matplotlib.figure.Figure((8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    by_size: dict[int, list] = {}
    for result in fitted.finished:
        by_size.setdefault(result.member.params, []).append(result)
    law = fitted.fit.law
    for number, (params, results) in enumerate(sorted(by_size.items())):
        color = f"C{number}"
        results.sort(key=lambda result: result.member.flops)
        flops = np.array([result.member.flops for result in results])
        points = [point_of(fitted.ladder, result) for result in results]
        axes.plot(flops, [point.loss for point in points], "o", color=color, label=f"{params:,} parameters")
        axes.plot(flops, [law.loss(point.params, point.worth) for point in points], color=color, linewidth=1)
    error = [[target.loss - target.low], [target.high - target.loss]]
    axes.errorbar([target.flops], [target.loss], error, fmt="s", color="black", capsize=4, label="forecast")
    axes.axhline(law.E, color="grey", linestyle=":", label=f"E = {law.E:.3f}")
    axes.set(xlabel="FLOPs of training", ylabel="held-out loss (nats/token)", xscale="log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def plot_sizes(sizes: Mapping[str, Mapping[int, Sequence[float]]], steps: Sequence[int], path: Path) -> None:
    """Root mean squares against width, a panel an activation, a line a number of steps.

    A panel spans a factor of ten or more, so that what hardly changes looks flat.

    Args:
      sizes: by activation and width, one for each of `steps`.
    """
    columns = min(4, len(sizes))
    rows = math.ceil(len(sizes) / columns)
    figure = matplotlib.figure.Figure((3 * columns, 2.4 * rows), dpi=150, layout="constrained")
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for panel, (name, by_width) in zip(panels, sizes.items(), strict=False):
        for position, step in enumerate(steps):
            panel.plot(list(by_width), [values[position] for values in by_width.values()], "o-", label=f"step {step}")
        found = np.array(list(by_width.values()))
        centre = np.sqrt(found.min() * found.max())
        reach = max(10**0.5, 1.1 * found.max() / centre)
        panel.set(title=name, xscale="log", yscale="log", ylim=(centre / reach, centre * reach))
    for panel in panels[len(sizes) :]:
        panel.set_visible(False)
    panels[0].legend(frameon=False)
    figure.supxlabel("width")
    figure.savefig(path)
