"""Text files to a store of tokens, which train.py reads in place: `python scripts/prepare.py --help`.

Invariant: a store that is there is whole; the same command goes on with one that is not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

from scripts.common.command_line import errors_in_one_line, parse
from scripts.preparing.flags import DESCRIPTION, Flags


def main() -> int:
    """Exit status: 0 done; 2 bad input."""
    with errors_in_one_line():
        flags = parse(Flags, description=DESCRIPTION)
        # Late: help and bad flags answer at once, and a process that tokenizes imports this file for nothing.
        from scripts.preparing.make import make
        from scripts.preparing.report import describe, seen, verify

        if flags.describe is not None:
            return describe(flags.describe)
        if flags.verify is not None:
            return verify(flags.verify)
        return make(flags) if flags.seen is None else seen(flags.seen, flags.step, flags.document)


if __name__ == "__main__":
    raise SystemExit(main())
