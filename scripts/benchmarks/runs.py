"""`benchmark.py runs`: how soon a run of train.py is how good, everything included.

Invariant: the clock starts with the process and counts start-up, compilation, evaluations and checkpoints; a loss is
had when it can be read in metrics.jsonl.
"""

import dataclasses
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallax.training.metric_writers import METRICS_FILE, read_metrics
from scripts.benchmarks.report import begin, show, write_report
from scripts.benchmarks.rounds import TREE, environment, progress
from scripts.common.command_line import parse

LOSS = 1.88
"""Of nanoGPT's small run on a CPU, in nats a character on the held-out tenth of Tiny Shakespeare."""
SECONDS = 100.0
SHAPE = "--config nano --dataset tiny_shakespeare --seq-len 64 --batch-size 24 --optimizer muon"
RUNS = {
    "loss": f"{SHAPE} --learning-rate 1.2e-2 --steps 225 --eval-interval 225 --checkpoint-interval 225",
    "time": f"{SHAPE} --learning-rate 1e-2 --steps 850 --eval-interval 850 --checkpoint-interval 850",
}
"""Flags of train.py for each question: how long to LOSS, and how good after SECONDS."""
LOOK = 0.05
"""Seconds between two looks at the metrics of a run under way."""

Curve = list[tuple[float, int, float]]
"""Seconds since the start, step and evaluation loss."""


@dataclasses.dataclass(frozen=True)
class Flags:
    seeds: str = "0,1,2"
    """One run each, and each question."""
    data_dir: str | None = None
    """Folder of Tiny Shakespeare; by default PARALLAX_DATA_DIR."""
    output: str | None = None
    """The results as JSON; by default benchmarks/runs.json."""

    def __post_init__(self):
        for seed in self.seeds.split(","):
            if not seed.isdecimal():
                raise ValueError(f"seed {seed!r} must be a number from 0; try --seeds 0,1,2")


def runs(args: Sequence[str]) -> int:
    """Trains for both questions with every seed; returns 0."""
    flags = parse(Flags, description="Time real runs to a loss, and their loss after a time.", args=args)
    busy = begin()
    where = ["--data-dir", flags.data_dir] if flags.data_dir else []
    results: dict[str, Any] = {"flags": RUNS, "runs": []}
    for seed in flags.seeds.split(","):
        for question, run in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                found = run_train([*run.split(), *where, "--seed", seed], Path(folder, "run"))
            results["runs"].append({"question": question, "seed": int(seed), "evaluations": found})
        write_report(flags.output, "runs", results, busy=busy)
    show(
        "Runs on Tiny Shakespeare, a seed each, inf where not reached",
        FORMS,
        {SHAPE.split()[1]: result(results["runs"])},
    )
    return 0


def run_train(flags: Sequence[str], folder: Path, limit: float = SECONDS) -> Curve:
    """Runs train.py into `folder` until it ends or `limit` seconds are over. It compiles everything itself.

    Raises ValueError if train.py refused its flags or failed; with its last line.
    """
    log, curve, began = folder.with_name("log"), [], time.monotonic()
    command = [sys.executable, str(TREE / "scripts/train.py"), *flags, "--output-dir", str(folder)]
    mine = {"JAX_COMPILATION_CACHE_DIR": str(folder.with_name("cache"))}
    with log.open("w") as out, progress(int(limit)) as show_progress:
        process = subprocess.Popen(command, env=environment() | mine, stdout=out, stderr=out)  # noqa: S603 - our own
        try:
            running, seconds = True, 0.0
            while running and seconds < limit:
                time.sleep(LOOK)
                running, seconds = process.poll() is None, time.monotonic() - began
                evaluations = [row for row in read_metrics(folder / METRICS_FILE) if "eval_loss" in row]
                curve += [(seconds, row["step"], row["eval_loss"]) for row in evaluations[len(curve) :]]
                show_progress(f"evaluation loss {curve[-1][2]:.4f}" if curve else "training", int(seconds))
        finally:
            process.kill()
            process.wait()
    if process.returncode and not running:
        raise ValueError(f"train.py ended with status {process.returncode}: {last_line(log)}")
    return curve


def last_line(log: Path) -> str:
    """Of what a process wrote."""
    return (log.read_text().splitlines() or ["it wrote nothing"])[-1]


FORMS = {f"seconds to a loss of {LOSS}": ".1f", f"loss after {SECONDS:.0f} seconds": ".4f"}


def result(found: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Under FORMS the answers to both questions; infinite where a run did not come so far."""
    of = {name: [run["evaluations"] for run in found if run["question"] == name] for name in RUNS}
    soon = [min((s for s, _, loss in curve if loss <= LOSS), default=math.inf) for curve in of["loss"]]
    good = [min((loss for s, _, loss in curve if s <= SECONDS), default=math.inf) for curve in of["time"]]
    return dict(zip(FORMS, (soon, good), strict=True))
