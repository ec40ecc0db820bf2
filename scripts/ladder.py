"""What a large run will reach, told by small ones: `python scripts/ladder.py --help`.

Invariant: a command is looked up by its name and does its own work; this file knows no more than that.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

from scripts.common.command_line import dispatch, late

HELP = """usage: ladder.py COMMAND ...

Train a ladder of small models, fit the law of their losses, and forecast a large run with an interval.

commands:
  design    choose the runs of a ladder by the time they may take here
  tune      find the learning rate on its smallest size
  run       train all of its runs; the same command goes on after a kill
  fit       the law L(N, D) = E + A/N^a + B/D^b of their losses
  forecast  loss, hours and money of a larger run, with an interval
  report    what of a ladder is done, and how forecast runs ended
  check     how large activations get with width, in and without muP

ladder.py COMMAND --help says more; docs/forecasting.md tells how they go together."""

COMMANDS = {
    "design": late("scripts.forecasting.design", "design"),
    "tune": late("scripts.forecasting.tune", "tune"),
    "run": late("scripts.forecasting.running", "run"),
    "fit": late("scripts.forecasting.fitting", "fit"),
    "forecast": late("scripts.forecasting.forecast", "forecast"),
    "report": late("scripts.forecasting.report", "report"),
    "check": late("scripts.forecasting.check", "check"),
}


def main() -> int:
    """Exit status: 0 done; 2 bad input; of run that of train.py where that failed through something outside it."""
    return dispatch("ladder.py", HELP, COMMANDS)


if __name__ == "__main__":
    raise SystemExit(main())
