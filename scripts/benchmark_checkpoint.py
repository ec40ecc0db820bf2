"""`benchmark.py checkpoint`: what checkpoints and logging cost a run.

Invariant: the runs of a pair differ in nothing else, and take turns. Both save and log at their last step.
"""

import dataclasses
from collections.abc import Sequence

from scripts.benchmark_report import expect_quiet, show, write_report
from scripts.benchmark_rounds import progress, spread
from scripts.benchmark_runs import Run, run_train
from scripts.common.command_line import parse

RUN = ["--config", "nano", "--seq-len", "64", "--batch-size", "12", "--eval-interval", "1000000"]
WITH = ["--checkpoint-interval", "100", "--log-interval", "10"]
WITHOUT = ["--checkpoint-interval", "1000000", "--log-interval", "1000000"]


@dataclasses.dataclass(frozen=True)
class Flags:
    steps: int = 1000
    """Of each run; a checkpoint every 100 and a row of metrics every 10, or neither."""
    rounds: int = 3
    """How many pairs of runs."""
    data_dir: str | None = None
    """Folder of Tiny Shakespeare; by default PARALLAX_DATA_DIR."""
    output: str | None = None
    """The results as JSON; by default benchmarks/checkpoint.json."""

    def __post_init__(self):
        if self.steps < 100 or self.rounds < 1:
            raise ValueError(
                f"steps={self.steps} must be at least 100 and rounds={self.rounds} at least 1; try 1000 and 3"
            )


def checkpoint(args: Sequence[str]) -> int:
    """Trains with and without, in turn; returns 0."""
    flags = parse(Flags, description="Time runs with and without checkpoints and logging.", args=args)
    busy = expect_quiet()
    run = [*RUN, "--steps", str(flags.steps), *(["--data-dir", flags.data_dir] if flags.data_dir else [])]
    pairs = []
    with progress("training", 2 * flags.rounds) as bar:
        for _ in range(flags.rounds):
            pair = {}
            for name, extra in (("with", WITH), ("without", WITHOUT)):
                bar.say(f"{name} checkpoints")
                pair[name] = _times(run_train([*run, *extra]))
                bar.advance()
            pairs.append(pair)
    results = {"flags": run, "with": WITH, "without": WITHOUT, "pairs": pairs}
    show(TITLE, COLUMNS, table(results))
    write_report(flags.output, "checkpoint", results, busy=busy)
    return 0


def _times(run: Run) -> dict[str, float]:
    """Of a run: the whole, what came after start-up and compilation, and where the summary says it went."""
    seconds = run.summary["seconds"]
    before = seconds["startup"] + seconds["compile"]
    return {
        "wall": run.wall_seconds,
        "trained": run.summary["wall_seconds"] - before - seconds.get("evaluation", 0.0),
        "checkpoint": seconds.get("checkpoint", 0.0),
        "goodput": run.summary["goodput"],
    }


TITLE = "Of the time after start-up, compilation and the last evaluation: median (least to most)"
COLUMNS = ["what", "value"]


def table(found: dict) -> list[list[str]]:
    """Rows under COLUMNS."""
    pairs = found["pairs"]
    slower = [100 * (1 - pair["without"]["trained"] / pair["with"]["trained"]) for pair in pairs]
    waited = [100 * pair["with"]["checkpoint"] / pair["with"]["trained"] for pair in pairs]
    rows = {
        "share that checkpoints and logging take, from the pairs, %": slower,
        "share that the loop waits for checkpoints, from summary.json, %": waited,
        "seconds with": [pair["with"]["trained"] for pair in pairs],
        "seconds without": [pair["without"]["trained"] for pair in pairs],
        "goodput of the whole run with": [pair["with"]["goodput"] for pair in pairs],
    }
    return [[words, str(spread(values))] for words, values in rows.items()]
