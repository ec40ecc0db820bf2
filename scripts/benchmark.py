"""Measures speed, alone and against PyTorch: `python scripts/benchmark.py --help`.

Invariant: a command is looked up by its name and does its own work; this file knows no more than that.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

from scripts.common.command_line import dispatch, late

HELP = """usage: benchmark.py COMMAND ...

Measure what Parallax does with this machine. Contenders run in processes of their own, in turn, and a ratio is that of
two measurements that followed each other. Every command prints a table and writes benchmarks/COMMAND.json.

commands:
  train   tokens a second of training, against torch, torch.compile and transformers
  decode  time to the first token and tokens a second, against transformers
  serve   tokens a second of serve.py for one client and for many, against generation without a server
  runs    how soon real runs of train.py reach a loss
  limits  the float32 matmuls and the memory reads that this machine does a second

train, decode and serve --against FOLDER also measure the checkout in that folder, such as the commit before.
benchmark.py COMMAND --help says more. torch and transformers come with pip install -e ".[bench]"."""


COMMANDS = {name: late(f"scripts.benchmarks.{name}", name) for name in ("train", "decode", "serve", "runs", "limits")}


def main() -> int:
    """Exit status: 0 done, 2 bad input or a missing package."""
    return dispatch("benchmark.py", HELP, COMMANDS)


if __name__ == "__main__":
    raise SystemExit(main())
