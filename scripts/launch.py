"""Starts training runs as several processes, here or on a TPU: `python scripts/launch.py --help`.

Invariant: a command is looked up by its name and does its own work; this file knows no more than that.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

from scripts.common.command_line import dispatch

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


def main() -> int:
    """Exit status: 2 bad input; else that of the command, as its --help describes it."""
    return dispatch("launch.py", HELP, COMMANDS)


def _local(args: Sequence[str]) -> int:
    from scripts.launching.local import local

    return local(args)


def _run(args: Sequence[str]) -> int:
    from scripts.launching.run import run

    return run(args)


def _tpu(name: str) -> Callable[[Sequence[str]], int]:
    def command(args: Sequence[str]) -> int:
        from scripts.launching import tpu as launch_tpu

        return getattr(launch_tpu, name)(args)

    return command


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "local": _local,
    "up": _tpu("up"),
    "run": _run,
    "status": _tpu("status"),
    "logs": _tpu("logs"),
    "down": _tpu("down"),
}


if __name__ == "__main__":
    raise SystemExit(main())
