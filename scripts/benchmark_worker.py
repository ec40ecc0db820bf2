"""One contender in a process of its own: `python scripts/benchmark_worker.py KIND JSON`, started by benchmark.py.

It says one JSON line when it is ready, `{"facts": …}`, and one for each line that it is given, `{"result": …}`; what
goes wrong with its input is `{"error": …}`. In between it waits and computes nothing.

Invariant: nothing but these lines goes to standard output, whatever the libraries print.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

Measure = Callable[[dict[str, Any]], dict[str, Any]]
"""A request to its result; all work is done when it returns."""

KINDS = {
    "train-parallax": ("scripts.benchmark_parallax", "training"),
    "train-torch": ("scripts.benchmark_torch", "training"),
    "decode-parallax": ("scripts.benchmark_parallax", "decoding"),
    "decode-transformers": ("scripts.benchmark_llama", "decoding"),
    "pipeline": ("scripts.benchmark_parallax", "pipeline"),
    "compiled-step": ("scripts.benchmark_parallax", "compiled_step"),
    "gemm": ("scripts.benchmark_limits", "gemm"),
    "bandwidth": ("scripts.benchmark_limits", "bandwidth"),
}


def main() -> None:
    kind, spec = sys.argv[1], json.loads(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    module, name = KINDS[kind]
    try:
        facts, measure = getattr(importlib.import_module(module), name)(**spec)
        reply(facts=facts)
        for line in sys.stdin:
            reply(result=measure(json.loads(line)))
    except ValueError as error:
        reply(error=" ".join(str(error).split()))


if __name__ == "__main__":
    main()
