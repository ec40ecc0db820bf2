"""One contender in a process of its own: `python scripts/benchmarks/worker.py KIND JSON`, started by benchmark.py.

It writes one JSON line when it is ready, `{"facts": …}`, and one for each line that it reads, `{"result": …}`; wrong
input is answered by `{"error": …}`. In between it waits and computes nothing. Releases are compared by these lines:
a kind keeps its name and its arguments.

Invariant: nothing but these lines goes to standard output, whatever the libraries print.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

KINDS = {
    "train-parallax": ("scripts.benchmarks.ours", "training"),
    "train-torch": ("scripts.benchmarks.theirs", "training"),
    "decode-parallax": ("scripts.benchmarks.ours", "decoding"),
    "decode-transformers": ("scripts.benchmarks.theirs", "decoding"),
    "gemm": ("scripts.benchmarks.limits", "gemm"),
    "bandwidth": ("scripts.benchmarks.limits", "bandwidth"),
}


def main() -> None:
    # A checkout runs, installed or not; not this folder, whose file names are common words.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
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
