"""train.py up to its first finished step, with the times of its stages: `benchmark_first_step.py SPAWNED FLAGS …`.

Started by `benchmark.py startup`; SPAWNED is when, in seconds since 1970. It prints one JSON line and ends.

Invariant: train.py itself runs, and is only looked at: an observer that notes when the first step's metrics are read.
"""

# ruff: noqa: E402 (the clock is read between imports)
import json
import os
import sys
import time
from pathlib import Path

INTERPRETER = time.time()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

from scripts import train  # first, as train.py itself is what Python comes to first

# isort: split
from parallax.training.loop import Row
from scripts.training import attempt

IMPORTED = time.time()


class FirstStep(attempt.Terminal):
    """The person at the terminal, who leaves after the first step."""

    spawned = 0.0

    def step(self, step: int, metrics: Row) -> None:
        now = time.time()
        times = {
            "interpreter": INTERPRETER - self.spawned,
            "imports": IMPORTED - INTERPRETER,
            "first_step": now - self.spawned,
        }
        print(json.dumps(times), flush=True)
        os._exit(0)


def main() -> int:
    FirstStep.spawned = float(sys.argv.pop(1))
    attempt.Terminal = FirstStep
    return train.main()


if __name__ == "__main__":
    raise SystemExit(main())
