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

from parallax.model.flops import step_flops
from parallelism.strategies import STRATEGIES
from scripts.benchmarks.report import begin, show, spread, write_report
from scripts.benchmarks.rounds import BEFORE, TREE, Compared, Rounds, Worker, measure, ratio
from scripts.benchmarks.settings import DENSE, Setting, read_setting
from scripts.benchmarks.theirs import NEEDED, require
from scripts.common.command_line import parse

TOLERANCE = 1e-4
"""Relative difference of losses in float32; frameworks add in different orders, and steps amplify it."""
PEAK = "gemm"
COUNTERPART = "dense"
"""Not the same work, and so no part of what is checked."""


@dataclasses.dataclass(frozen=True)
class Flags(Compared):
    settings: str = "nano-12x64,nano-32x256,small-1365-4x256,nano-4x1024"
    """What to train, as MODEL-BATCHxLENGTH; the models are trial, tiny, nano, small, small-1365, and nano-moe with its
    dense counterpart nano-352."""
    contenders: str = "single,pmap,mesh,torch,torch-compiled,transformers"
    """Who takes part: the strategies of Parallax, then torch, torch-compiled and transformers, and for experts dense,
    the model without that has as many active parameters. The first is what the others are compared with, and gives
    `before` its strategy."""


def train(args: Sequence[str]) -> int:
    """Measures every setting; returns 0."""
    flags = parse(Flags, description="Compare the speed of training, contender by contender.", args=args)
    check_contenders(flags.contenders.split(","))
    settings = [read_setting(name) for name in flags.settings.split(",")]
    for setting in settings:
        check_model(flags.contenders.split(","), setting)
    busy, results = begin(), {}
    for setting in settings:
        results[setting.name] = compare(setting, flags)
        write_report(flags.output, "train", results, busy=busy)
    return 0


def check_contenders(names: list[str]) -> None:
    """Raises ValueError for a contender that is unknown, missing on this machine, or has no weights to begin with."""
    for name in names:
        known = (*STRATEGIES, *NEEDED, COUNTERPART)
        if name not in known:
            raise ValueError(f"contender {name!r} is not one of {', '.join(known)}; leave it out")
        if name in NEEDED:
            require(name)
    if names[0] not in STRATEGIES:
        raise ValueError(
            f"contender {names[0]!r} comes first and is none of Parallax; begin with single, as in single,{names[0]}"
        )


def check_model(names: list[str], setting: Setting) -> None:
    """Raises ValueError for a contender that has no such model."""
    has_experts = setting.model_name in DENSE
    for name in names:
        if name == COUNTERPART and not has_experts:
            raise ValueError(f"contender {name} is for experts, and {setting.name} has none; try nano-moe-12x64")
        if has_experts and name.startswith("torch"):
            raise ValueError(f"contender {name} has no experts, and {setting.name} has; leave it out of --contenders")


def compare(setting: Setting, flags: Flags) -> dict[str, Any]:
    """Starts the contenders one after another, compares their work, measures them in turn and shows the table.

    Raises ValueError if two contenders do not do the same work.
    """
    first, *others = flags.contenders.split(",")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(name: str, kind: str, tree: Path = TREE, weights: str = "weights", **spec: Any) -> Worker:
            spec = {"setting": setting.name, "weights": str(folder / weights)} | spec
            return stack.enter_context(contextlib.closing(Worker(name, kind, tree, **spec)))

        workers = [start(first, "train-parallax", strategy=first)]
        if flags.against:
            workers.append(start(BEFORE, "train-parallax", Path(flags.against), BEFORE, strategy=first))
        for name in others:
            if name == COUNTERPART:
                continue
            if name in STRATEGIES:
                workers.append(start(name, "train-parallax", strategy=name))
            else:
                workers.append(start(name, "train-torch", model=name))
        check_work(workers)
        if COUNTERPART in others:
            counterpart = f"{DENSE[setting.model_name]}-{setting.batch_size}x{setting.seq_len}"
            workers.append(
                start(COUNTERPART, "train-parallax", weights=COUNTERPART, strategy=first, setting=counterpart)
            )
        peak = Worker(PEAK, "gemm", torch=not NEEDED.keys().isdisjoint(others))
        stack.callback(peak.close)
        found = measure([*workers, peak], flags, setting.name)
    rows = result(setting, found)
    parameters, by = workers[0].facts["params"], peak.facts["by"]
    rate = spread([each["flops"] / 1e9 for each in found[PEAK]], ",.0f")
    title = f"{setting.name}, {parameters:,} parameters; peak {rate} GFLOP/s by {by}"
    show(f"{title}; ratio = speed of {first} / speed", FORMS, rows)
    return {"parameters": parameters, "peak_by": by, "losses": workers[0].facts["losses"], "contenders": rows}


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


FORMS = {"tokens/s": ",.0f", "of the GEMM peak": ".1%", "ratio": ".3f"}


def result(setting: Setting, found: Rounds) -> dict[str, dict[str, list[float]]]:
    """Under FORMS what a setting came to, round by round, for each contender."""
    flops = step_flops(setting.model, setting.batch_size, setting.seq_len) / setting.tokens
    peaks = [each["flops"] for each in found[PEAK]]
    speeds = {
        name: [setting.tokens / each["each"] for each in rounds] for name, rounds in found.items() if name != PEAK
    }
    first = next(iter(speeds.values()))
    return {
        name: {
            "tokens/s": rounds,
            "of the GEMM peak": [flops * each for each in ratio(rounds, peaks)],
            "ratio": ratio(first, rounds),
        }
        for name, rounds in speeds.items()
    }
