"""`benchmark.py decode`: time to the first token and tokens a second, against `transformers`.

Invariant: both continue the same prompts with the same weights, and begin with the same tokens.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallax.config import TransformerConfig
from scripts.benchmark_report import expect_quiet, show, write_report
from scripts.benchmark_rounds import Worker, calibrate, interleave, ratio, require_positive, spread
from scripts.benchmark_settings import MODELS
from scripts.benchmark_torch import need
from scripts.common.command_line import parse

CONTENDERS = {"parallax": "decode-parallax", "transformers": "decode-transformers"}
MEMORY = "bandwidth"


@dataclasses.dataclass(frozen=True)
class Flags:
    models: str = "tiny,nano,small,small-1365"
    """Which models, with first weights."""
    batches: str = "1,16"
    """How many prompts at once."""
    prompt_tokens: int = 32
    """Length of a prompt."""
    new_tokens: int = 128
    """How many tokens are generated, the likeliest each time."""
    contenders: str = "parallax,transformers"
    """Who takes part, the one that others are compared with first."""
    rounds: int = 10
    """How often each is measured."""
    seconds: float = 1.0
    """How long a round should last; at least one request."""
    output: str | None = None
    """The results as JSON; by default benchmarks/decode.json."""

    def __post_init__(self):
        require_positive(self, "prompt_tokens", "rounds", "seconds")
        if self.new_tokens < 2:
            raise ValueError(f"new_tokens={self.new_tokens} must be at least 2; try 128")
        for name in self.models.split(","):
            if name not in MODELS:
                raise ValueError(f"model {name!r} is not one of {', '.join(MODELS)}; try nano")
        for size in self.batches.split(","):
            if not size.isdecimal() or not int(size):
                raise ValueError(f"batch {size!r} must be a positive number; try --batches 1,16")


def decode(args: Sequence[str]) -> int:
    """Measures every model and batch; returns 0."""
    flags = parse(Flags, description="Compare the speed of generation, contender by contender.", args=args)
    names = flags.contenders.split(",")
    for name in names:
        if name not in CONTENDERS:
            raise ValueError(f"contender {name!r} is not one of {', '.join(CONTENDERS)}")
    if names[0] != "parallax":
        raise ValueError(f"contender {names[0]!r} comes first, and has no weights; begin with parallax")
    if "transformers" in names:
        need("torch")
        need("transformers")
    busy = expect_quiet()
    results = []
    for model in flags.models.split(","):
        for batch_size in map(int, flags.batches.split(",")):
            results.append(measure(model, batch_size, names, flags))
            show(title(results[-1]), COLUMNS, table(results[-1]))
            write_report(flags.output, "decode", results, busy=busy)
    return 0


def measure(model: str, batch_size: int, names: list[str], flags: Flags) -> dict[str, Any]:
    """Starts the contenders one after another, compares their tokens, then measures them in turn."""
    with contextlib.ExitStack() as stack:
        weights = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "weights.npz"
        spec = {"model": model, "batch_size": batch_size, "weights": str(weights)}
        spec |= {"prompt_tokens": flags.prompt_tokens, "new_tokens": flags.new_tokens}
        workers = []
        for name in names:
            workers.append(Worker(name, CONTENDERS[name], **spec))
            stack.callback(workers[-1].close)
        tokens = [worker.facts.pop("tokens") for worker in workers]
        same = [_same(tokens[0], each) for each in tokens]
        memory = Worker(MEMORY, MEMORY)
        stack.callback(memory.close)
        workers.append(memory)
        requests = [{"units": calibrate(worker, flags.seconds)} for worker in workers]
        found = interleave(workers, requests, flags.rounds, f"{model}, batch {batch_size}")
        by = memory.facts
    rates = [each["bytes_per_second"] for each in found.pop(MEMORY)]
    needed = step_bytes(MODELS[model], batch_size, flags.prompt_tokens + flags.new_tokens / 2)
    first = names[0]
    contenders = {}
    for name, share in zip(names, same, strict=True):
        rounds, others = found[name], found[first]
        later = [(each["whole"] - each["first"]) / (flags.new_tokens - 1) for each in rounds]
        contenders[name] = {
            "same_tokens": share,
            "rounds": rounds,
            "first_token_seconds": spread([each["first"] for each in rounds]).median,
            "tokens_per_second": batch_size * flags.new_tokens / spread([x["whole"] for x in rounds]).median,
            "bandwidth_share": spread([needed / s / r for s, r in zip(later, rates, strict=True)]).median,
            "first_token_ratio": _ratio(rounds, others, "first"),
            "ratio": _ratio(rounds, others, "whole"),
        }
    return {
        "model": model,
        "batch_size": batch_size,
        "prompt_tokens": flags.prompt_tokens,
        "new_tokens": flags.new_tokens,
        "step_bytes": needed,
        "bandwidth": {**by, "bytes_per_second": rates},
        "first": first,
        "contenders": contenders,
    }


def step_bytes(config: TransformerConfig, batch_size: int, length: float) -> float:
    """Bytes that a new token of each row cannot do without: all weights once, and the rows' keys and values."""
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * length * batch_size
    return 4 * (config.num_params() + cache)


def _ratio(rounds: list[dict[str, Any]], first: list[dict[str, Any]], what: str) -> dict[str, float]:
    return dataclasses.asdict(ratio([each[what] for each in rounds], [each[what] for each in first]))


def _same(tokens: list[list[int]], others: list[list[int]]) -> float:
    """The share of equal tokens. Raises ValueError where the first token of a row differs."""
    pairs = [pair for row, other in zip(tokens, others, strict=True) for pair in zip(row, other, strict=True)]
    if any(row[0] != other[0] for row, other in zip(tokens, others, strict=True)):
        raise ValueError("contenders begin with different tokens; only equal work is compared")
    return sum(a == b for a, b in pairs) / len(pairs)


COLUMNS = [
    *("contender", "first token ms", "tokens/s", "of the bandwidth", "ratio, median", "least", "most"),
    "ratio of first token",
]


def title(found: dict[str, Any]) -> str:
    """What was measured, in one line."""
    rate = spread(found["bandwidth"]["bytes_per_second"]).median / 1e9
    return (
        f"{found['model']}, batch {found['batch_size']}: {found['new_tokens']} tokens after {found['prompt_tokens']}; "
        f"memory reads {rate:.1f} GB/s by {found['bandwidth']['by']}; ratio = speed of {found['first']} / speed"
    )


def table(found: dict[str, Any]) -> list[list[str]]:
    """Rows under COLUMNS."""
    return [
        [
            name,
            f"{each['first_token_seconds'] * 1e3:.1f}",
            f"{each['tokens_per_second']:,.0f}",
            f"{each['bandwidth_share']:.0%}",
            *(f"{each['ratio'][part]:.3f}" for part in ("median", "least", "most")),
            f"{each['first_token_ratio']['median']:.3f}",
        ]
        for name, each in found["contenders"].items()
    ]
