"""A plan as a table, as JSON and as commands.

Invariant: a number says whether the compiler or the analytic model gave it.
"""

import dataclasses
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from parallax.config import PRESETS, OptimizerConfig
from parallelism.planning.compiler import NOT_COUNTED
from parallelism.planning.gpus import GIB, USED, Gpus
from parallelism.planning.hardware import Machine
from parallelism.planning.planner import Choice, Row, name_of
from scripts.common.command_line import writing
from scripts.common.config_words import config_words
from scripts.planning.flags import Flags
from scripts.planning.prices import Price, price_of

SHOWN = 20
"""Rows of the table; the JSON has all."""
NUMBERS = ("HBM", "state", "temporary", "TFLOP", "GB sent", "compute", "memory", "links")
EXPECTED = ("expected", "tokens/s", "MFU")
LACKING = 4
"""Rows beside these of layouts that do not fit, of which those that lack the least."""


def plan_file(asked: Flags, name: str) -> Path:
    """Where the plan goes: --output, or a file of this name in plans.

    Raises ValueError if it cannot be written, which is better known before minutes go to compiling.
    """
    path = Path(asked.output or Path("plans") / name)
    with writing(f"--output {path}"):
        if path.exists():  # a pipe too, whose folder takes no other file
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=next(folder for folder in path.parents if folder.exists())).close()
    return path


def plan_table(rows: Sequence[Row], sliced: Machine, asked: Flags, ranked: int) -> Table:
    """The best rows first. Memory in GiB a device; times of a step in milliseconds."""
    table = Table(
        title=f"{asked.name}, {asked.batch_size} × {asked.seq_len} tokens a step, on {sliced.name}: "
        f"{sliced.devices} devices of {sliced.device_memory / GIB:.0f} GiB",
        caption=f"{ranked} choices were ranked. compiled: memory, operations and traffic are the compiler's. "
        "estimate: the analytic model's. HBM: of a step, or of an evaluation or a save (always estimates) where "
        "these need more. GB sent: as if buffers of tokens on their way to experts were full; in parentheses, and in "
        "times, as full as where all experts are used alike. Compute, memory and links by their peaks; as if all "
        "overlapped, the one with a star binds. "
        f"Expected: by what published runs reached of these peaks, ±{_error(rows):.0%}, see docs/planning.md. "
        f"{_uncounted(rows)}{_limits(sliced)} {_priced(price_of(sliced.generation.name, asked.price))}",
    )
    for name in ("layout", *sought(asked), "remat", "micro", "attention", "source", "fits"):
        table.add_column(name, no_wrap=True)
    for name in (*NUMBERS, *EXPECTED, *(("hours", "USD") if asked.tokens else ())):
        table.add_column(name, justify="right", no_wrap=True)
    lacking = [row for row in rows[SHOWN:] if _verdict(row, sliced).startswith(("no", "lacks"))]
    for row in [*rows[:SHOWN], *lacking[:LACKING]]:
        table.add_row(*_cells(row, sliced, asked))
    return table


def sought(asked: Flags) -> tuple[str, ...]:
    """The column of the size of which the largest was asked for, if one was."""
    return (asked.sought.replace("_size", "").replace("seq_len", "length"),) if asked.sought else ()


def _uncounted(rows: Sequence[Row]) -> str:
    """What programs send that is in no number, by name."""
    found = {each.kind for row in rows if row.report for each in row.report.traffic if each.level == NOT_COUNTED}
    return f"Not counted: {', '.join(sorted(found))}. " if found else ""


def _limits(sliced: Machine) -> str:
    """What the numbers do not say."""
    if isinstance(sliced, Gpus):
        return (
            f"Whether a step fits is decided here, by {USED:.0%} of a card: XLA's compiler for GPUs refuses none, and "
            "the rest is kept for CUDA, NCCL and cuDNN. None of this has run on a GPU;"
        )
    return "None of this has run on a TPU. Billing runs until a slice is deleted;"


def environment(sliced: Machine) -> str:
    """What is set before a command on that machine: how much of a card JAX takes, which by itself takes 75%."""
    return f"XLA_CLIENT_MEM_FRACTION={USED} " if isinstance(sliced, Gpus) else ""


def _cells(row: Row, sliced: Machine, asked: Flags) -> list[str]:
    choice, temporary = row.choice, row.needed_bytes - row.parameter_bytes - row.optimizer_bytes
    times = {"compute": row.compute_seconds, "memory": row.memory_seconds, "links": row.link_seconds}
    return [
        name_of(choice),
        *([str(getattr(choice.layout, asked.sought))] if asked.sought else ()),
        choice.remat,
        str(choice.layout.accumulate),
        row.attention,
        row.source,
        _verdict(row, sliced),
        *(f"{size / GIB:.2f}" for size in (row.needed_bytes, row.needed_bytes - temporary, temporary)),
        f"{row.flops / 1e12:.2f}",
        f"{row.sent_bytes / 1e9:.2f}" + (f" ({row.held_bytes / 1e9:.2f})" if row.held_bytes < row.sent_bytes else ""),
        *(f"{seconds * 1e3:.1f}{'*' if name == row.bound else ''}" for name, seconds in times.items()),
        f"{row.expected.seconds * 1e3:.1f}",
        f"{row.tokens / row.expected.seconds:,.0f}",
        f"{row.utilisation:.0%}",
        *(("-" if size is None else f"{size:,.1f}" for size in bill(row, sliced, asked)) if asked.tokens else ()),
    ]


def _error(rows: Sequence[Row]) -> float:
    """What nine of ten runs keep, of the expected time."""
    return max((row.expected.high / row.expected.seconds - 1 for row in rows), default=0.0)


def describe(row: Row, sliced: Machine) -> str:
    """A row in one line."""
    parts = row.choice.layout.accumulate
    micro = f", {parts} microbatches" if parts > 1 else ""
    return (
        f"{name_of(row.choice)}, remat {row.choice.remat}{micro}: {_verdict(row, sliced)}, "
        f"{row.needed_bytes / GIB:.2f} GiB; expected {row.expected.seconds * 1e3:.1f} ms a step, "
        f"MFU {row.utilisation:.0%}"
    )


def bill(row: Row, sliced: Machine, asked: Flags) -> tuple[float | None, float | None]:
    """Hours of the run's steps and what they cost, in the expected time of a step.

    Evaluations, checkpoints and restarts come on top.
    """
    if asked.tokens is None:
        return None, None
    taken = asked.tokens / row.tokens * row.expected.seconds / 3600
    price = price_of(sliced.generation.name, asked.price)
    return taken, price and price.usd * sliced.chips * taken


def _priced(price: Price | None) -> str:
    return f"USD {price.usd:.2f} a chip and hour ({price.source})" if price else "no price is known; give --price"


def _verdict(row: Row, sliced: Machine) -> str:
    if row.report is None:
        lack = row.needed_bytes - sliced.device_memory
        return "may fit" if lack <= 0 else f"lacks {lack / GIB:.1f} GiB"
    if not row.report.fits:
        return f"no: {row.report.error}"
    parts = ("a step", row.peak_bytes), ("an evaluation", row.evaluation_bytes), ("a save", row.save_bytes)
    what, needed = max(parts, key=lambda pair: pair[1])
    lack = needed - sliced.device_memory
    return "yes" if lack <= 0 else f"no: {what} lacks {lack / GIB:.1f} GiB"


def plan_to_json(rows: Sequence[Row], sliced: Machine, asked: Flags) -> dict[str, Any]:
    """All rows, best first: sizes in bytes and times in seconds, a device's share."""
    return {
        "topology": sliced.name,
        "devices": sliced.devices,
        "device_memory_bytes": sliced.device_memory,
        "config": asked.name,
        "batch_size": asked.batch_size,
        "seq_len": asked.seq_len,
        "rows": [row_to_json(row, sliced, asked) | {"command": run_command(row.choice, asked)} for row in rows],
    }


def row_to_json(row: Row, sliced: Machine, asked: Flags) -> dict[str, Any]:
    choice = row.choice
    return {
        "layout": name_of(choice),
        "batch_size": choice.layout.batch_size,
        "seq_len": choice.layout.seq_len,
        "axes": dict(choice.sizes),
        "remat": choice.remat,
        "dtype": choice.dtype,
        "microbatches": choice.layout.accumulate,
        "attention": row.attention,
        "source": row.source,
        "fits": row.fits(sliced.device_memory) if row.report else None,
        "error": row.report.error if row.report else "",
        "peak_bytes": row.peak_bytes,
        "estimated_peak_bytes": row.estimated_bytes,
        "evaluation_bytes": row.evaluation_bytes,
        "save_bytes": row.save_bytes,
        "parameter_bytes": row.parameter_bytes,
        "optimizer_bytes": row.optimizer_bytes,
        "flops": row.flops,
        "sent_bytes": row.sent_bytes,
        "sent_bytes_at_even_load": row.held_bytes,
        "sent_bytes_along": dict(row.wire_bytes),
        "collectives": [dataclasses.asdict(each) for each in row.report.traffic] if row.report else [],
        "compute_seconds": row.compute_seconds,
        "memory_seconds": row.memory_seconds,
        "link_seconds": row.link_seconds,
        "bound": row.bound,
        "estimated_step_seconds": row.seconds,
        "estimated_tokens_per_second": row.tokens / row.seconds,
        "expected_step_seconds": dataclasses.asdict(row.expected),
        "expected_tokens_per_second": row.tokens / row.expected.seconds,
        "expected_utilisation": row.utilisation,
        **dict(zip(("expected_hours", "expected_usd"), bill(row, sliced, asked), strict=True)),
    }


def commands(row: Row, sliced: Machine, asked: Flags) -> tuple[str, str]:
    """The train.py that runs a row on the machine, and the same rehearsed here on simulated devices."""
    command = rehearsed = run_command(row.choice, asked)
    if asked.model.lora.rank:  # adapters are learned beside a model that is there
        command = command.replace(f"--config {asked.config}", "--init-from RUN")
    return f"{environment(sliced)}{command}", f"JAX_NUM_CPU_DEVICES={sliced.devices} {rehearsed} --lower-only"


def run_command(choice: Choice, asked: Flags) -> str:
    """The train.py that runs a choice."""
    layout = choice.layout
    words = ["python", "scripts/train.py", "--config", asked.config, "--strategy", layout.strategy]
    if layout.mesh:
        words += ["--mesh", layout.mesh]
    if asked.rules != "default" and layout.mesh:
        words += ["--rules", asked.rules]
    words += ["--batch-size", str(layout.batch_size), "--seq-len", str(layout.seq_len)]
    # Said always: by itself a rehearsal on CPUs would take as many as suit them.
    words += ["--accumulate", str(layout.accumulate)]
    words += ["--dtype", choice.dtype, "--remat", choice.remat]
    words += config_words(asked.optimizer, OptimizerConfig())
    preset = PRESETS[asked.config]
    model = dataclasses.replace(asked.model, vocab_size=preset.vocab_size)  # the tokenizer's, in train.py
    return shlex.join(words + config_words(model, preset, "model."))
