"""Plans a run on TPUs that are not here: `python scripts/plan.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

import jax

from parallax.config import PRESETS
from scripts.common.command_line import errors_in_one_line, parse
from scripts.planning.flags import DESCRIPTION, Flags
from scripts.planning.plan import Plan
from scripts.training.flags import flag_value


def main() -> int:
    """Exit status: 0 a plan that fits, 1 none fits, 2 bad input."""
    jax.config.update("jax_platforms", "cpu")  # the TPU is only compiled for
    with errors_in_one_line():
        preset = PRESETS.get(flag_value(sys.argv[1:], "--config"), PRESETS["tiny"])
        flags = parse(Flags, default=Flags(model=preset), description=DESCRIPTION)
        return Plan(flags).run()


if __name__ == "__main__":
    raise SystemExit(main())
