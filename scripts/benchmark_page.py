"""`benchmark.py page`: docs/performance.md, its tables and plots, from the results of the other commands.

Invariant: every number on the page comes from a result file; what was learned from them stands in a file of its own,
written by hand, and is taken over word for word.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts import (
    benchmark_checkpoint,
    benchmark_data,
    benchmark_decode,
    benchmark_quality,
    benchmark_scaling,
    benchmark_startup,
    benchmark_train,
)
from scripts.benchmark_plot import plot_decode, plot_quality, plot_scaling, plot_train
from scripts.benchmark_report import FOLDER, QUIET, read_report
from scripts.common.command_line import parse

Lines = list[str]


@dataclasses.dataclass(frozen=True)
class Flags:
    results: str = FOLDER
    """Folder of the result files, named by their commands: train.json, train-long.json and so on."""
    output: str = "docs/performance.md"
    """The page; its plots go to a folder beside it, of the same name."""
    notes: str = "docs/performance_notes.md"
    """The section that is written by hand."""


def page(args: Sequence[str]) -> int:
    """Writes the page; returns 0."""
    flags = parse(Flags, description="Write a page of tables and plots from results.", args=args)
    reports = {name: _reports(Path(flags.results), name) for name in SECTIONS}
    if not any(reports.values()):
        raise ValueError(
            f"--results {flags.results} holds no results; run benchmark.py train first, or name their folder"
        )
    output, notes = Path(flags.output), Path(flags.notes)
    lines = ["# Performance", "", *INTRODUCTION, ""]
    try:
        for name, found in reports.items():
            if found:
                lines += _section(name, found, output.with_suffix(""))
        if notes.exists():
            lines += [notes.read_text().rstrip(), ""]
        output.write_text("\n".join(lines))
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written: {error.strerror}; choose another") from None
    print(f"page      {output}", file=sys.stderr)
    return 0


def _reports(folder: Path, name: str) -> list[dict[str, Any]]:
    """Of a command: its file, and those whose names go on from it, as train-long.json."""
    return [
        read_report(path) for path in sorted({*folder.glob(f"{name}.json"), *folder.glob(f"{name}-*.json")})
    ]


def _section(name: str, reports: list[dict[str, Any]], plots: Path) -> Lines:
    title, section = SECTIONS[name]
    lines = [f"## {title}", ""]
    for report in reports:
        lines += [*_origin(report), "", *section(report["results"]), ""]
    if name in PLOTS:
        plots.mkdir(parents=True, exist_ok=True)
        words, plot = PLOTS[name]
        path = plots / f"{name}.png"
        plot([report["results"] for report in reports], path)
        lines += [f"![{words}]({plots.name}/{path.name})", ""]
    return lines


INTRODUCTION = [
    "`scripts/benchmark.py` measured this. Contenders are processes of their own that take turns, so that two",
    "measurements of a pair follow each other; a ratio is taken pair by pair, and stands here as its median with the",
    "least and the most. All contenders use all cores and the same settings of the allocator. Before anything is timed",
    "they have shown to have as many parameters and, from the same weights, the same losses or tokens.",
]


def _origin(report: dict[str, Any]) -> Lines:
    machine, versions = report["machine"], report["versions"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, {machine['system']}"
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    line = f"`{report['command']}`, {report['began']}: {where}; {named}."
    busy = report["busy_cores_before"]
    return [line if busy <= QUIET else f"{line} Measured while {busy} cores were busy with other work."]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Lines:
    """A table; the first column is words, the others are numbers."""
    ruler = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(row)} |" for row in (columns, ruler, *rows)]


def _train(results: Any) -> Lines:
    lines: Lines = [
        "The share of the GEMM peak counts the",
        "arithmetic of the model (parallax/model/cost.py) against the float32 products measured in the same rounds.",
    ]
    for found in results:
        lines += ["", f"{benchmark_train.title(found)}.", ""]
        lines += markdown(benchmark_train.COLUMNS, benchmark_train.table(found))
    return lines


def _decode(results: Any) -> Lines:
    lines: Lines = [
        "Greedy, with a cache. The bandwidth share counts the weights and the keys and values that a step cannot do",
        "without, against reading a buffer of 2 GiB with all cores; what a cache holds can be read faster than that.",
    ]
    for found in results:
        lines += ["", f"{benchmark_decode.title(found)}.", ""]
        lines += markdown(benchmark_decode.COLUMNS, benchmark_decode.table(found))
    return lines


def _startup(results: Any) -> Lines:
    return [
        f"{benchmark_startup.TITLE}. Files have been read before.",
        "",
        *_table(benchmark_startup, results),
    ]


def _data(results: Any) -> Lines:
    return [f"Setting {results['setting']}.", "", *_table(benchmark_data, results)]


def _checkpoint(results: Any) -> Lines:
    flags = " ".join(results["flags"])
    how = f"`train.py {flags}` with `{' '.join(results['with'])}`, and with `{' '.join(results['without'])}`."
    return [how, f"{benchmark_checkpoint.TITLE}.", "", *_table(benchmark_checkpoint, results)]


def _quality(results: Any) -> Lines:
    runs = [f"`train.py {' '.join(flags)}`" for flags in results["flags"].values()]
    return [
        f"{benchmark_quality.TITLE}; nothing was compiled before. Runs: {' and '.join(runs)}.",
        *("", *_table(benchmark_quality, results)),
    ]


def _scaling(results: Any) -> Lines:
    lines: Lines = []
    for part, found in results.items():
        columns, rows = benchmark_scaling.COLUMNS[part], benchmark_scaling.TABLES[part](found)
        lines += [f"{benchmark_scaling.TITLES[part]}.", "", *markdown(columns, rows), ""]
    return lines[:-1]


def _table(module: Any, results: Any) -> Lines:
    return markdown(module.COLUMNS, module.table(results))


SECTIONS: dict[str, tuple[str, Callable[[Any], Lines]]] = {
    "train": ("Training", _train),
    "quality": ("Time to a loss", _quality),
    "decode": ("Generation", _decode),
    "startup": ("Start-up", _startup),
    "data": ("Data pipeline", _data),
    "checkpoint": ("Checkpoints and logging", _checkpoint),
    "scaling": ("Devices, depth and length", _scaling),
}
PLOTS: dict[str, tuple[str, Callable[[list[Any], Path], None]]] = {
    "train": ("Speed of training by setting and contender", plot_train),
    "quality": ("Evaluation loss by seconds since the start", plot_quality),
    "decode": ("Speed of generation by model, batch and contender", plot_decode),
    "scaling": ("A step by devices, depth and length", plot_scaling),
}
