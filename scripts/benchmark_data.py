"""`benchmark.py data`: how much faster the pipeline makes tokens than training eats them.

Invariant: both use the pipeline that train.py uses; training has it running as always.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.benchmark_report import expect_quiet, show, write_report
from scripts.benchmark_rounds import Worker, calibrate, interleave, ratio, require_positive, spread
from scripts.benchmark_settings import read_setting
from scripts.common.command_line import parse


@dataclasses.dataclass(frozen=True)
class Flags:
    setting: str = "nano-12x64"
    """What to train, as MODEL-BATCHxLENGTH."""
    rounds: int = 10
    """How often each is measured."""
    seconds: float = 1.5
    """How long a round should last."""
    output: str | None = None
    """The results as JSON; by default benchmarks/data.json."""

    def __post_init__(self):
        require_positive(self, "rounds", "seconds")


def data(args: Sequence[str]) -> int:
    """Measures the pipeline alone and training in turn; returns 0."""
    flags = parse(
        Flags, description="Compare the speed of the data pipeline with that of training.", args=args
    )
    busy = expect_quiet()
    setting = read_setting(flags.setting)
    with contextlib.ExitStack() as stack:
        weights = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "weights.npz")
        pipeline = Worker("pipeline", "pipeline", setting=setting.name)
        stack.callback(pipeline.close)
        training = Worker(
            "training", "train-parallax", setting=setting.name, strategy="single", weights=weights
        )
        stack.callback(training.close)
        workers = [pipeline, training]
        units = {worker.name: calibrate(worker, flags.seconds) for worker in workers}
        found = interleave(workers, [{"units": each} for each in units.values()], flags.rounds, setting.name)
    speeds = {
        name: [units[name] * setting.tokens / each["seconds"] for each in rounds]
        for name, rounds in found.items()
    }
    above = dataclasses.asdict(ratio(speeds["pipeline"], speeds["training"]))
    results = {"setting": setting.name, "tokens_per_second": speeds, "ratio": above}
    show(f"{setting.name}: the pipeline alone, and training with it", COLUMNS, table(results))
    write_report(flags.output, "data", results, busy=busy)
    return 0


COLUMNS = ["what", "tokens/s", "ratio, median", "least", "most"]


def table(found: dict) -> list[list[str]]:
    """Rows under COLUMNS; the ratio is of the pipeline's speed to that of training."""
    speeds = {name: f"{spread(values).median:,.0f}" for name, values in found["tokens_per_second"].items()}
    parts = [f"{found['ratio'][part]:.1f}" for part in ("median", "least", "most")]
    return [["pipeline alone", speeds["pipeline"], *parts], ["training", speeds["training"], "", "", ""]]
