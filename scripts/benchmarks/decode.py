"""`benchmark.py decode`: time to the first token and tokens a second, against `transformers`.

Invariant: all contenders continue the same prompts with the same weights, and begin with the same tokens.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallax.config import TransformerConfig
from scripts.benchmarks.report import begin, show, spread, write_report
from scripts.benchmarks.rounds import BEFORE, TREE, Compared, Rounds, Worker, measure, ratio, require_positive
from scripts.benchmarks.settings import MODELS
from scripts.benchmarks.theirs import require
from scripts.common.command_line import parse

MEMORY = "bandwidth"


@dataclasses.dataclass(frozen=True)
class Flags(Compared):
    models: str = "tiny,nano,small,small-1365"
    """Which models, with first weights."""
    batches: str = "1,16"
    """How many prompts at once."""
    prompt_tokens: int = 32
    """Length of a prompt."""
    new_tokens: int = 128
    """How many tokens are generated, greedily."""
    contenders: str = "parallax,transformers"
    """Who takes part: parallax alone, or with transformers."""

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "prompt_tokens")
        if self.new_tokens < 2:
            raise ValueError(f"new_tokens={self.new_tokens} must be at least 2; try 128")
        if self.contenders not in ("parallax", "parallax,transformers"):
            raise ValueError(
                f"contenders {self.contenders!r} must be parallax, or parallax,transformers; leave them out"
            )
        for name in self.models.split(","):
            if name not in MODELS:
                raise ValueError(f"model {name!r} is not one of {', '.join(MODELS)}; try nano")
        for size in self.batches.split(","):
            if not size.isdecimal() or not int(size):
                raise ValueError(f"batch {size!r} must be a positive number; try --batches 1,16")


def decode(args: Sequence[str]) -> int:
    """Measures every model and batch; returns 0."""
    flags = parse(Flags, description="Compare the speed of generation, contender by contender.", args=args)
    if "transformers" in flags.contenders:
        require("transformers")
    busy, results = begin(), {}
    for model in flags.models.split(","):
        for batch_size in map(int, flags.batches.split(",")):
            results[f"{model} × {batch_size}"] = compare(model, batch_size, flags)
            write_report(flags.output, "decode", results, busy=busy)
    return 0


def compare(model: str, batch_size: int, flags: Flags) -> dict[str, Any]:
    """Starts the contenders one after another, compares their tokens, measures them in turn and shows the table.

    Raises ValueError if two contenders begin with different tokens.
    """
    spec = {"model": model, "batch_size": batch_size}
    spec |= {"prompt_tokens": flags.prompt_tokens, "new_tokens": flags.new_tokens}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(name: str, kind: str, tree: Path = TREE, weights: str = "weights") -> Worker:
            worker = Worker(name, kind, tree, weights=str(folder / weights), **spec)
            return stack.enter_context(contextlib.closing(worker))

        workers = [start("parallax", "decode-parallax")]
        if flags.against:
            workers.append(start(BEFORE, "decode-parallax", Path(flags.against), BEFORE))
        if "transformers" in flags.contenders:
            workers.append(start("transformers", "decode-transformers"))
        same = {each.name: same_tokens(workers[0].facts["tokens"], each.facts["tokens"]) for each in workers}
        memory = stack.enter_context(contextlib.closing(Worker(MEMORY, MEMORY)))
        what = f"{model}, batch {batch_size}"
        found = measure([*workers, memory], flags, what)
    needed = step_bytes(MODELS[model], batch_size, flags.prompt_tokens + flags.new_tokens / 2)
    rows = result(batch_size, flags.new_tokens, needed, found)
    rate = spread([each["bytes_per_second"] / 1e9 for each in found[MEMORY]], ".1f")
    title = f"{what}: {flags.new_tokens} tokens after {flags.prompt_tokens}; memory reads {rate} GB/s"
    show(f"{title}; ratio = speed of parallax / speed", FORMS, rows)
    return {"step_bytes": needed, "same_tokens": same, "contenders": rows}


FORMS = {
    "first token ms": ".1f",
    "tokens/s": ",.0f",
    "of the bandwidth": ".0%",
    "ratio": ".3f",
    "ratio of the first token": ".3f",
}


def result(batch_size: int, new_tokens: int, needed: float, found: Rounds) -> dict[str, dict[str, list[float]]]:
    """Under FORMS what was measured, round by round, for each contender; a step reads `needed` bytes."""
    rates = [each["bytes_per_second"] for each in found[MEMORY]]
    first, whole = (
        {name: [each[what] for each in rounds] for name, rounds in found.items() if name != MEMORY}
        for what in ("first", "whole")
    )
    steps = {
        name: [(all - one) / (new_tokens - 1) for one, all in zip(first[name], whole[name], strict=True)]
        for name in whole
    }
    return {
        name: {
            "first token ms": [1e3 * each for each in first[name]],
            "tokens/s": [batch_size * new_tokens / each for each in whole[name]],
            "of the bandwidth": [needed / s / rate for s, rate in zip(steps[name], rates, strict=True)],
            "ratio": ratio(whole[name], whole["parallax"]),
            "ratio of the first token": ratio(first[name], first["parallax"]),
        }
        for name in whole
    }


def step_bytes(config: TransformerConfig, batch_size: int, length: float) -> float:
    """Bytes that a new token of each row cannot do without: all weights once, and the rows' keys and values."""
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * length * batch_size
    return 4 * (config.num_params() + cache)


def same_tokens(tokens: list[list[int]], others: list[list[int]]) -> float:
    """The share of equal tokens. Raises ValueError where the first token of a row differs."""
    pairs = [pair for row, other in zip(tokens, others, strict=True) for pair in zip(row, other, strict=True)]
    if any(row[0] != other[0] for row, other in zip(tokens, others, strict=True)):
        raise ValueError("contenders begin with different tokens; only equal work is compared")
    return sum(a == b for a, b in pairs) / len(pairs)
