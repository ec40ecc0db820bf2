"""The plots of docs/performance.md.

Invariant: drawing touches no global state of matplotlib.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.benchmark_rounds import spread


def _figure(panels: int) -> tuple[Any, Any]:
    """A figure with that many axes side by side."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # the font cache of a first use is no news
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * max(panels, 2), 4), dpi=120, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path)


def _bars(axes: Any, groups: Sequence[str], bars: dict[str, list[float | None]]) -> None:
    """Bars of each name beside one another, in groups; None leaves a gap."""
    width = 0.8 / len(bars)
    for number, (name, values) in enumerate(bars.items()):
        places = [group - 0.4 + (number + 0.5) * width for group in range(len(groups))]
        axes.bar(places, [value or 0 for value in values], width, label=name)
    axes.set_xticks(range(len(groups)), groups)
    axes.legend(frameon=False)


def plot_train(reports: list[list[dict[str, Any]]], path: Path) -> None:
    """Shares of the GEMM peak, which settings of different sizes have in common."""
    results = [found for report in reports for found in report]
    names = list(dict.fromkeys(name for found in results for name in found["contenders"]))
    bars = {
        name: [100 * f["contenders"][name]["mfu"] if name in f["contenders"] else None for f in results]
        for name in names
    }
    figure, (axes,) = _figure(1)
    _bars(axes, [found["setting"] for found in results], bars)
    axes.set(ylabel="% of the GEMM peak")
    _save(figure, path)


def plot_decode(reports: list[list[dict[str, Any]]], path: Path) -> None:
    """Tokens a second, on a logarithmic axis."""
    results = [found for report in reports for found in report]
    names = list(dict.fromkeys(name for found in results for name in found["contenders"]))
    bars = {
        name: [
            found["contenders"][name]["tokens_per_second"] if name in found["contenders"] else None
            for found in results
        ]
        for name in names
    }
    figure, (axes,) = _figure(1)
    _bars(axes, [f"{found['model']}\n× {found['batch_size']}" for found in results], bars)
    axes.set(ylabel="tokens/s", yscale="log")
    axes.tick_params(axis="x", labelsize=7)
    _save(figure, path)


def plot_quality(reports: list[dict[str, Any]], path: Path) -> None:
    """Evaluation loss against seconds, a line a run."""
    figure, (axes,) = _figure(1)
    colors = {"loss": "tab:blue", "time": "tab:orange"}
    for run in (run for report in reports for run in report["runs"]):
        points = run["evaluations"]
        label = f"{run['question']}, seed {run['seed']}"
        color = colors.get(run["question"])
        axes.plot(
            [p[0] for p in points], [p[2] for p in points], "o-", markersize=3, color=color, label=label
        )
    axes.axhline(reports[0]["loss"], color="tab:gray", linestyle=":", linewidth=1)
    axes.set(xlabel="seconds since the start", ylabel="evaluation loss (nats/character)")
    axes.legend(frameon=False, fontsize=7)
    _save(figure, path)


def plot_scaling(reports: list[dict[str, Any]], path: Path) -> None:
    """One panel a part that was measured."""
    results = {part: found for report in reports for part, found in report.items()}
    figure, panels = _figure(len(results))
    for axes, (part, found) in zip(panels, results.items(), strict=True):
        {"devices": _devices, "depth": _depth, "length": _length}[part](axes, found)
    _save(figure, path)


def _devices(axes: Any, found: dict[str, Any]) -> None:
    for strategy in ("pmap", "mesh"):
        points = [
            (int(name.split()[1]), spread(times).median * 1e3)
            for name, times in found["step_seconds"].items()
            if name.startswith(strategy)
        ]
        axes.plot(*zip(*points, strict=True), "o-", label=strategy)
    axes.set(xlabel="simulated devices", ylabel="step (ms)", ylim=(0, None))
    axes.legend(frameon=False)


def _depth(axes: Any, found: dict[str, Any]) -> None:
    layers = [row["layers"] for row in found["rows"]]
    axes.plot(
        layers, [spread(row["compile_seconds"]).median for row in found["rows"]], "o-", label="compile (s)"
    )
    steps = [spread(row["step_seconds"]).median * 10 for row in found["rows"]]
    axes.plot(layers, steps, "o-", label="step (0.1 s)")
    axes.set(xlabel="layers", ylabel="seconds, and tenths of seconds", ylim=(0, None))
    axes.legend(frameon=False)


def _length(axes: Any, found: dict[str, Any]) -> None:
    lengths = [row["length"] for row in found["rows"]]
    axes.plot(lengths, [spread(row["step_seconds"]).median for row in found["rows"]], "o-", label="step (s)")
    memory = [row.get("temporary_bytes", 0) / 2**30 for row in found["rows"]]
    axes.plot(lengths, memory, "o-", label="temporary memory (GiB)")
    axes.set(xlabel="tokens of a sequence", xscale="log", yscale="log")
    axes.legend(frameon=False)
