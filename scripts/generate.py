"""Continues a prompt with a trained model: `python scripts/generate.py --help`.

Invariant: standard output holds prompts and continuations, as they are; all else goes to standard error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

from scripts.common.command_line import errors_in_one_line, parse
from scripts.common.quick_imports import quick_imports
from scripts.generation.flags import DESCRIPTION, Flags, check


def main() -> int:
    """Exit status: 0 done; 2 bad input."""
    with errors_in_one_line():
        flags = parse(Flags, description=DESCRIPTION)
        check(flags)
        # Late, since these load JAX: help and bad flags answer at once.
        with quick_imports():
            from parallax.run_folder import load_run
            from scripts.common.jax_process import expect_no_gpu, keep_compiled_programs
            from scripts.generation.prompt_loop import Talk, chat_of, converse
            from scripts.generation.writer import Writer

        expect_no_gpu()
        keep_compiled_programs()
        run = load_run(flags.checkpoint, flags.step, param_dtype=flags.param_dtype).prepared()
        draft = load_run(flags.draft, param_dtype=flags.param_dtype).prepared() if flags.draft else None
        writer = Writer(run, draft, flags.draft_tokens, flags.context)
        if flags.chat:
            talk = Talk(writer, chat_of(run, flags.chat_template), flags)
            if flags.prompt:
                talk.say(flags, flags.prompt)
            else:
                converse(writer, flags, talk)
        elif flags.interactive:
            converse(writer, flags)
        elif flags.num_samples == 1:
            writer.stream(flags)
        else:
            writer.write_samples(flags)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
