"""Tokens a second of completions, alone and side by side: `python tests/scripts/batching_throughput.py --help`.

Invariant: nothing is timed before it is compiled, and every number is the best of three.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import jax
import numpy as np

from parallax.config import PRESETS
from parallax.inference.batching import Batcher
from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.model.transformer import init_params

PROMPT = np.arange(16, dtype=np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Tokens a second of the Batcher and of generate, with random weights."
    )
    parser.add_argument("--config", choices=PRESETS, default="small")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--capacity", type=int, default=256, help="tokens a slot can hold")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--tokens-per-step", type=int, nargs="+", default=[1, 4, 8])
    flags = parser.parse_args()
    config = PRESETS[flags.config]
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    generator = Generator(config)
    for rows in (1, flags.slots):
        request = Request(
            prompts=[PROMPT] * rows,
            settings=SamplingSettings.create(rows, temperature=0.8),
            seeds=range(rows),
            max_tokens=flags.max_tokens,
        )
        tell(
            f"generate, {rows} rows",
            rows * flags.max_tokens,
            lambda request=request: generator.generate(params, request),
        )
    for tokens_per_step in flags.tokens_per_step:
        batcher = Batcher(
            config, params, slots=flags.slots, capacity=flags.capacity, tokens_per_step=tokens_per_step
        )
        batcher.warm_up()
        for rows in (1, flags.slots):
            tell(
                f"batcher of {flags.slots} slots, {tokens_per_step} tokens a step, {rows} busy",
                rows * flags.max_tokens,
                lambda batcher=batcher, rows=rows: run(batcher, rows, flags.max_tokens),
            )


def run(batcher: Batcher, rows: int, max_tokens: int) -> None:
    for ticket in range(rows):
        batcher.admit(ticket, Request.one(PROMPT, max_tokens=max_tokens, temperature=0.8, seed=ticket))
    while batcher.step():
        pass


def tell(name: str, tokens: int, work: Callable[[], object]) -> None:
    work()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    print(f"{tokens / min(seconds):8.0f} tokens/s  {name}", flush=True)


if __name__ == "__main__":
    main()
