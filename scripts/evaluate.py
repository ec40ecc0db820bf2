"""Perplexity of a text under a model, or its scores in benchmarks: `python scripts/evaluate.py --help`.

Invariant: a score is that of all the tokens or questions that were asked for, or there is none.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

from scripts.common.command_line import errors_in_one_line, parse
from scripts.evaluation.flags import DESCRIPTION, Flags


def main() -> int:
    """Exit status: 0 done; 2 bad input."""
    with errors_in_one_line():
        flags = parse(Flags, description=DESCRIPTION)
        if flags.json is not None:
            require_room(Path(flags.json))
        # Late, since these load JAX: help and bad flags answer at once.
        from parallax.storage import write_json
        from scripts.common.jax_process import expect_no_gpu, keep_compiled_programs

        expect_no_gpu()
        keep_compiled_programs()
        if flags.tasks:
            from scripts.evaluation.harness import evaluate_tasks, table

            result = evaluate_tasks(flags)
            print(table(result))
        else:
            from scripts.evaluation.score import describe, evaluate

            result = evaluate(flags)
            print(describe(result))
        if flags.json is not None:
            try:
                write_json(Path(flags.json), result)
            except OSError as error:
                raise ValueError(f"--json {flags.json} cannot be written ({error.strerror}); choose another") from None
    return 0


def require_room(path: Path) -> None:
    """Raises ValueError where no file can be: an evaluation of hours is not to end with that."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    room = path.exists() or (above.is_dir() and os.access(above, os.W_OK | os.X_OK))
    if path.is_dir() or not room:
        reason = "a folder" if path.is_dir() else f"below {above}, where no file can be made"
        raise ValueError(f"--json {path} must be a file and is {reason}; choose another")


if __name__ == "__main__":
    raise SystemExit(main())
