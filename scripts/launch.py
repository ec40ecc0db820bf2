"""Starts training runs as several processes, here or on a TPU: `python scripts/launch.py --help`.

Invariant: a command is looked up by its name and does its own work; this file knows no more than that.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

from scripts.common.command_line import dispatch, late

HELP = """usage: launch.py COMMAND ...

Start a training run as several processes, which end together.

commands:
  local   on this machine, with simulated devices
  up      create a TPU on Google Cloud
  run     train on a TPU: on all of its hosts, again after it was preempted
  status  what the TPU and its hosts do, and whether anything bills
  logs    what a host printed
  down    delete the TPU

launch.py COMMAND --help says more; docs/launch.md tells how they go together."""


COMMANDS = {
    "local": late("scripts.launching.local", "local"),
    "up": late("scripts.launching.tpu", "up"),
    "run": late("scripts.launching.run", "run"),
    "status": late("scripts.launching.tpu", "status"),
    "logs": late("scripts.launching.tpu", "logs"),
    "down": late("scripts.launching.tpu", "down"),
}


def main() -> int:
    """Exit status: 2 bad input; else that of the command, as its --help describes it."""
    return dispatch("launch.py", HELP, COMMANDS)


if __name__ == "__main__":
    raise SystemExit(main())
