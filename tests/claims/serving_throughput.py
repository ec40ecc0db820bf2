"""Tokens a second of a real server, for one client and for many at once: `python tests/claims/serving_throughput.py`.

Invariant: both numbers are of the same server, asked over HTTP by OpenAI's client, and each is the best of three.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parallax.config import PRESETS
from parallax.tokenizers.plain import CharTokenizer
from tests.parallax.serving.server import LETTERS, Served, serving, write_run

ENDLESS = CharTokenizer(LETTERS.alphabet)
"""Without an end of text, so that each answer is as long as asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second of serve.py, with random weights.")
    parser.add_argument("--config", choices=PRESETS, default="small")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    flags = parser.parse_args()
    config = dataclasses.replace(PRESETS[flags.config], vocab_size=ENDLESS.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / flags.config, ENDLESS, config)
        with serving(run, "--slots", str(flags.clients), "--capacity", "256") as server:
            alone = max(measure(server, 1, flags.max_tokens) for _ in range(3))
            together = max(measure(server, flags.clients, flags.max_tokens) for _ in range(3))
    print(f"{alone:8.0f} tokens/s  1 client")
    print(f"{together:8.0f} tokens/s  {flags.clients} clients at once: {together / alone:.1f} times as many")


def measure(server: Served, clients: int, max_tokens: int) -> float:
    """Tokens a second over all clients, from the first request to the last answer."""

    def ask(seed: int) -> int:
        answer = server.complete("ROMEO", max_tokens=max_tokens, temperature=0.8, seed=seed)
        assert answer.usage
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        tokens = sum(pool.map(ask, range(clients)))
        return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
