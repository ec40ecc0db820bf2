"""Plans a run on TPUs or GPUs that are not here: `python scripts/plan.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

import jax

from scripts.common.command_line import errors_in_one_line, parse
from scripts.common.layer_words import REGISTRY
from scripts.planning.compare import compare
from scripts.planning.flags import DESCRIPTION, Flags, first_flags
from scripts.planning.plan import Plan


def main() -> int:
    """Exit status: 0 a plan that fits, 1 none fits, 2 bad input."""
    jax.config.update("jax_platforms", "cpu")  # the machine is only compiled for
    with errors_in_one_line():
        default, maxtext = first_flags(sys.argv[1:])
        flags = parse(Flags, default=default, description=DESCRIPTION, registry=REGISTRY)
        return compare(flags) if flags.compare else Plan(flags, maxtext).run()


if __name__ == "__main__":
    raise SystemExit(main())
