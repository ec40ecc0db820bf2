"""`benchmark.py scaling`: a step on more simulated devices, of a deeper model, on longer sequences.

Invariant: one size changes at a time. Simulated devices share this machine's cores: their step times say what dividing
a step costs or saves on these cores, and nothing of real devices.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.benchmark_report import expect_quiet, show, write_report
from scripts.benchmark_rounds import Worker, calibrate, interleave, progress, ratio, require_positive, spread
from scripts.benchmark_settings import Setting
from scripts.common.command_line import parse

DEVICES = (1, 2, 4, 8)
DEPTHS = (2, 4, 8, 12, 24, 48)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
SPREAD_OUT = Setting("nano", 32, 64)
DEEP = Setting("nano", 8, 64)
PARTS = ("devices", "depth", "length")


@dataclasses.dataclass(frozen=True)
class Flags:
    parts: str = ",".join(PARTS)
    """What to change: devices, depth, length."""
    rounds: int = 5
    """How often each is measured; compiling, in a process of its own each time, three times."""
    seconds: float = 1.0
    """How long a round should last; at least one step."""
    output: str | None = None
    """The results as JSON; by default benchmarks/scaling.json."""

    def __post_init__(self):
        require_positive(self, "rounds", "seconds")
        for part in self.parts.split(","):
            if part not in PARTS:
                raise ValueError(f"part {part!r} is not one of {', '.join(PARTS)}; try --parts depth")


def scaling(args: Sequence[str]) -> int:
    """Measures the parts asked for; returns 0."""
    flags = parse(Flags, description="Measure a step against devices, depth and sequence length.", args=args)
    busy = expect_quiet()
    results: dict[str, Any] = {}
    for part in flags.parts.split(","):
        results[part] = {"devices": _devices, "depth": _depth, "length": _length}[part](flags)
        show(TITLES[part], COLUMNS[part], TABLES[part](results[part]))
        write_report(flags.output, "scaling", results, busy=busy)
    return 0


def _devices(flags: Flags) -> dict[str, Any]:
    """One global batch on 1, 2, 4 and 8 devices by every strategy, in turn."""
    layouts = {"single 1": ("single", 1)}
    layouts |= {f"{name} {count}": (name, count) for name in ("pmap", "mesh") for count in DEVICES}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = []
        with progress("compiling", len(layouts)) as bar:
            for number, (name, (strategy, devices)) in enumerate(layouts.items()):
                spec = {
                    "setting": SPREAD_OUT.name,
                    "strategy": strategy,
                    "weights": str(folder / str(number)),
                }
                workers.append(Worker(name, "train-parallax", devices, **spec))
                stack.callback(workers[-1].close)
                bar.advance()
        units = [calibrate(worker, flags.seconds) for worker in workers]
        found = interleave(workers, [{"units": each} for each in units], flags.rounds, "devices")
    times = {
        name: [each["seconds"] / count for each in found[name]]
        for name, count in zip(layouts, units, strict=True)
    }
    return {
        "setting": SPREAD_OUT.name,
        "step_seconds": times,
        "ratio": {name: dataclasses.asdict(ratio(each, times["single 1"])) for name, each in times.items()},
    }


def _depth(flags: Flags) -> dict[str, Any]:
    rows = []
    with progress("depth", 3 * len(DEPTHS)) as bar:
        for layers in DEPTHS:
            facts = []
            for last in (False, False, True):
                spec = {"setting": DEEP.name, "num_layers": layers, "remat": "none"}
                found = _step(spec, flags, rounds=flags.rounds if last else 0)
                facts.append(found)
                bar.advance()
            compiled = [each["compile_seconds"] for each in facts]
            traced = [each["trace_seconds"] for each in facts]
            rows.append(facts[-1] | {"layers": layers, "compile_seconds": compiled, "trace_seconds": traced})
    return {"setting": DEEP.name, "rows": rows}


def _length(flags: Flags) -> dict[str, Any]:
    rows = []
    with progress("length", len(LENGTHS)) as bar:
        for length in LENGTHS:
            spec = {"setting": Setting("nano", 1, length).name, "num_layers": 4, "remat": "dots"}
            rows.append({"length": length, **_step(spec, flags, rounds=flags.rounds)})
            bar.advance()
    return {"setting": "nano-1xT, remat dots", "rows": rows}


def _step(spec: dict[str, Any], flags: Flags, rounds: int) -> dict[str, Any]:
    """Facts of a compiled step, and the seconds of a step in each round."""
    with contextlib.closing(Worker("step", "compiled-step", **spec)) as worker:
        if not rounds:
            return worker.facts
        units = calibrate(worker, flags.seconds)
        times = [worker.ask(units=units)["seconds"] / units for _ in range(rounds)]
        return worker.facts | {"step_seconds": times}


def _devices_table(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            f"{spread(times).median * 1e3:.1f}",
            *(f"{found['ratio'][name][p]:.2f}" for p in PARTS_OF_RATIO),
        ]
        for name, times in found["step_seconds"].items()
    ]


def _depth_table(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            str(row["layers"]),
            str(spread(row["trace_seconds"])),
            str(spread(row["compile_seconds"])),
            f"{spread(row['step_seconds']).median * 1e3:.1f}",
            f"{spread(row['step_seconds']).median * 1e3 / row['layers']:.2f}",
        ]
        for row in found["rows"]
    ]


def _length_table(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            f"{row['length']:,}",
            f"{spread(row['step_seconds']).median * 1e3:,.1f}",
            f"{row['length'] / spread(row['step_seconds']).median:,.0f}",
            f"{row.get('temporary_bytes', 0) / 2**20:,.0f}",
        ]
        for row in found["rows"]
    ]


PARTS_OF_RATIO = ("median", "least", "most")
TITLES = {
    "devices": f"{SPREAD_OUT.name} on simulated devices that share the cores; ratio = step time / that of single",
    "depth": f"{DEEP.name} by depth; seconds to trace and compile, median (least to most)",
    "length": "nano, one sequence a step, remat dots",
}
COLUMNS = {
    "devices": ["strategy, devices", "step ms", "ratio, median", "least", "most"],
    "depth": ["layers", "trace s", "compile s", "step ms", "step ms a layer"],
    "length": ["tokens", "step ms", "tokens/s", "temporary MiB"],
}
TABLES = {"devices": _devices_table, "depth": _depth_table, "length": _length_table}
