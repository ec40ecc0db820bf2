"""`benchmark.py quality`: how soon a run is how good, everything included.

Invariant: the clock starts with the process and counts start-up, compilation, evaluations and checkpoints; a loss is
had when it can be read in metrics.jsonl.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from scripts.benchmark_report import expect_quiet, show, write_report
from scripts.benchmark_rounds import progress, spread
from scripts.benchmark_runs import run_train
from scripts.common.command_line import parse

LOSS = 1.88
"""Of nanoGPT's small run on a CPU, in nats a character on the held-out tenth of Tiny Shakespeare."""
SECONDS = 100.0
SHAPE = [
    *("--config", "nano", "--dataset", "tiny_shakespeare", "--seq-len", "64"),
    *("--batch-size", "24", "--optimizer", "muon"),
]
RUNS = {
    "loss": [
        *(*SHAPE, "--learning-rate", "1.2e-2", "--steps", "225"),
        *("--eval-interval", "225", "--checkpoint-interval", "225"),
    ],
    "time": [
        *(*SHAPE, "--learning-rate", "1e-2", "--steps", "850"),
        *("--eval-interval", "850", "--checkpoint-interval", "850"),
    ],
}
"""Flags of train.py for each question: how long to LOSS, and how good after SECONDS."""


@dataclasses.dataclass(frozen=True)
class Flags:
    seeds: str = "0,1,2"
    """One run each, and each question."""
    data_dir: str | None = None
    """Folder of Tiny Shakespeare; by default PARALLAX_DATA_DIR."""
    output: str | None = None
    """The results as JSON; by default benchmarks/quality.json."""

    def __post_init__(self):
        for seed in self.seeds.split(","):
            if not seed.isdecimal():
                raise ValueError(f"seed {seed!r} must be a number from 0; try --seeds 0,1,2")


def quality(args: Sequence[str]) -> int:
    """Trains for both questions with every seed; returns 0."""
    flags = parse(Flags, description="Time real runs to a loss, and their loss after a time.", args=args)
    busy = expect_quiet()
    where = ["--data-dir", flags.data_dir] if flags.data_dir else []
    results: dict[str, Any] = {"loss": LOSS, "seconds": SECONDS, "flags": RUNS, "runs": []}
    for seed in flags.seeds.split(","):
        for question, run in RUNS.items():
            found = _run([*run, *where, "--seed", seed], question)
            results["runs"].append({"question": question, "seed": int(seed), "evaluations": found})
        write_report(flags.output, "quality", results, busy=busy)
    show(TITLE, COLUMNS, table(results))
    return 0


def _run(flags: Sequence[str], question: str) -> list[tuple[float, int, float]]:
    def enough(seconds: float, evaluations: list) -> bool:
        reached = question == "loss" and any(loss <= LOSS for _, _, loss in evaluations)
        return reached or (question == "time" and seconds >= SECONDS)

    with progress("training", int(SECONDS)) as bar:

        def watch(seconds: float, evaluations: list) -> None:
            loss = f", evaluation loss {evaluations[-1][2]:.4f}" if evaluations else ""
            bar.say(f"{question}{loss}", min(int(seconds), int(SECONDS)))

        return run_train(flags, enough=enough, watch=watch).evaluations


def seconds_to(evaluations: Sequence[tuple[float, int, float]], loss: float) -> float | None:
    """When that loss was reached, if it was."""
    return next((seconds for seconds, _, found in evaluations if found <= loss), None)


def loss_at(evaluations: Sequence[tuple[float, int, float]], seconds: float) -> float | None:
    """The least loss known by then, if any."""
    return min((loss for when, _, loss in evaluations if when <= seconds), default=None)


TITLE = "Real runs on Tiny Shakespeare, over seeds: median (least to most)"
COLUMNS = ["what", "value"]


def table(found: dict[str, Any]) -> list[list[str]]:
    """Rows under COLUMNS."""
    of = {
        name: [run["evaluations"] for run in found["runs"] if run["question"] == name]
        for name in ("loss", "time")
    }
    soon = [seconds_to(each, found["loss"]) for each in of["loss"]]
    good = [loss_at(each, found["seconds"]) for each in of["time"]]
    rows = {
        f"seconds to an evaluation loss of {found['loss']}": (soon, 1),
        f"evaluation loss after {found['seconds']:.0f} seconds": (good, 4),
    }
    return [[words, _text(*values)] for words, values in rows.items()]


def _text(values: list[float | None], digits: int) -> str:
    found = [value for value in values if value is not None]
    missing = len(values) - len(found)
    if not found:
        return "not reached"
    return spread(found).text(digits) + (f", {missing} not reached" if missing else "")
