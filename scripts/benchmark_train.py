"""`benchmark.py train`: tokens a second of one training step, against PyTorch.

Invariant: before anything is timed all contenders have shown to do the same work: as many parameters, and the same
losses from the same weights and batches, over steps of the same optimizer.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallax.model.cost import step_flops
from parallelism.strategies import STRATEGIES
from scripts.benchmark_report import expect_quiet, show, write_report
from scripts.benchmark_rounds import Worker, calibrate, interleave, ratio, require_positive, spread
from scripts.benchmark_settings import Setting, read_setting
from scripts.benchmark_torch import MODELS, need
from scripts.common.command_line import parse

TOLERANCE = 1e-4
"""Relative difference of losses in float32; frameworks add in different orders, and steps amplify it."""
PEAK = "gemm"


@dataclasses.dataclass(frozen=True)
class Flags:
    settings: str = "nano-12x64,nano-32x256,small-1365-4x256,nano-4x1024"
    """What to train, as MODEL-BATCHxLENGTH; the models are trial, tiny, nano, small and small-1365."""
    contenders: str = "single,pmap,mesh,torch,transformers"
    """Who takes part: the strategies of Parallax, then torch, torch-compiled and transformers. The first is what the
    others are compared with."""
    rounds: int = 10
    """How often each is measured."""
    seconds: float = 1.5
    """How long a round should last."""
    output: str | None = None
    """The results as JSON; by default benchmarks/train.json."""

    def __post_init__(self):
        require_positive(self, "rounds", "seconds")


def train(args: Sequence[str]) -> int:
    """Measures every setting; returns 0."""
    flags = parse(Flags, description="Compare the speed of training, contender by contender.", args=args)
    names, settings = flags.contenders.split(","), [read_setting(name) for name in flags.settings.split(",")]
    check_contenders(names)
    busy = expect_quiet()
    results = []
    for setting in settings:
        results.append(measure(setting, names, flags.rounds, flags.seconds))
        show(title(results[-1]), COLUMNS, table(results[-1]))
        write_report(flags.output, "train", results, busy=busy)
    return 0


def check_contenders(names: list[str]) -> None:
    """Raises ValueError for a contender that is unknown, missing on this machine, or has no weights to begin with."""
    for name in names:
        if name not in (*STRATEGIES, *MODELS):
            raise ValueError(f"contender {name!r} is not one of {', '.join((*STRATEGIES, *MODELS))}")
        if name in MODELS:
            need("torch")
        if name == "transformers":
            need(name)
    if names[0] not in STRATEGIES:
        raise ValueError(
            f"contender {names[0]!r} comes first and is none of Parallax; begin with single, as in single,{names[0]}"
        )


def measure(setting: Setting, names: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Starts the contenders one after another, compares their work, then measures them in turn.

    Raises:
      ValueError: two contenders do not do the same work.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = []
        for name in names:
            workers.append(start(name, setting, folder / "weights.npz"))
            stack.callback(workers[-1].close)
        check_work(workers)
        peak = Worker(PEAK, "gemm", torch=any(name in MODELS for name in names))
        stack.callback(peak.close)
        workers.append(peak)
        units = [calibrate(worker, seconds) for worker in workers]
        found = interleave(workers, [{"units": each} for each in units], rounds, setting.name)
        facts = {worker.name: worker.facts for worker in workers}
    return result(setting, facts, dict(zip(facts, units, strict=True)), found)


def start(name: str, setting: Setting, weights: Path) -> Worker:
    """A contender that has taken its first steps."""
    if name in STRATEGIES:
        return Worker(name, "train-parallax", setting=setting.name, strategy=name, weights=str(weights))
    return Worker(name, "train-torch", setting=setting.name, model=name, weights=str(weights))


def check_work(workers: list[Worker]) -> None:
    """Raises ValueError where parameters or losses differ."""
    first, *others = workers
    for other in others:
        if other.facts["params"] != first.facts["params"]:
            raise ValueError(
                f"{other.name} has {other.facts['params']:,} parameters and {first.name} {first.facts['params']:,}; "
                "only equal work is compared"
            )
        for step, (a, b) in enumerate(zip(first.facts["losses"], other.facts["losses"], strict=True), 1):
            if not abs(a - b) <= TOLERANCE * abs(a):
                raise ValueError(
                    f"{other.name} has the loss {b} in step {step} and {first.name} {a}; only equal work is compared"
                )


def result(
    setting: Setting, facts: dict[str, Any], units: dict[str, int], found: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """What a setting came to: for each contender its tokens a second, round by round, and what follows from them."""
    flops = step_flops(setting.model, setting.batch_size, setting.seq_len) / setting.tokens
    peaks = [each["flops"] for each in found.pop(PEAK)]
    speeds = {
        name: [units[name] * setting.tokens / each["seconds"] for each in rounds]
        for name, rounds in found.items()
    }
    first = next(iter(speeds))
    contenders = {
        name: {
            **facts[name],
            "steps_per_round": units[name],
            "tokens_per_second": rounds,
            "median_tokens_per_second": spread(rounds).median,
            "mfu": spread([speed * flops / peak for speed, peak in zip(rounds, peaks, strict=True)]).median,
            "ratio": dataclasses.asdict(ratio(speeds[first], rounds)),
        }
        for name, rounds in speeds.items()
    }
    return {
        "setting": setting.name,
        "parameters": facts[first]["params"],
        "tolerance": TOLERANCE,
        "peak": {**facts[PEAK], "flops": peaks},
        "first": first,
        "contenders": contenders,
    }


COLUMNS = ["contender", "tokens/s", "of the GEMM peak", "ratio, median", "least", "most"]


def table(found: dict[str, Any]) -> list[list[str]]:
    """Rows under COLUMNS; the ratio is the speed of the first contender over that of the row's."""
    return [
        [
            name,
            f"{each['median_tokens_per_second']:,.0f}",
            f"{each['mfu']:.1%}",
            *(f"{each['ratio'][part]:.3f}" for part in ("median", "least", "most")),
        ]
        for name, each in found["contenders"].items()
    ]


def title(found: dict[str, Any]) -> str:
    """What was measured, in one line."""
    peak = spread(found["peak"]["flops"]).median / 1e9
    shape = f"{found['setting']}, {found['parameters']:,} parameters"
    return f"{shape}; peak {peak:,.0f} GFLOP/s by {found['peak']['by']}; ratio = speed of {found['first']} / speed"
