"""Perplexity and bits per byte of a text under a model: `python scripts/evaluate.py --help`.

Invariant: each token is scored once, with at least window - stride tokens of context or all that there are.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

from scripts.common.command_line import errors_in_one_line, parse
from scripts.evaluation.flags import DESCRIPTION, Flags


def main() -> int:
    """Exit status: 0 done; 2 bad input."""
    with errors_in_one_line():
        flags = parse(Flags, description=DESCRIPTION)
        # Late, since these load JAX: help and bad flags answer at once.
        from parallax.storage import write_json
        from scripts.common.jax_process import keep_compiled_programs
        from scripts.evaluation.score import evaluate

        keep_compiled_programs()
        result = evaluate(flags)
        for name, of in result.get("sources", {}).items():
            print(f"{name}: perplexity {of['perplexity']:.4f} a token, {of['bits_per_byte']:.4f} bits per byte")
        print(
            f"perplexity {result['perplexity']:.4f} a token, {result['bits_per_byte']:.4f} bits per byte: "
            f"{result['tokens']:,} tokens of {result['bytes']:,} bytes, window {result['window']}, "
            f"stride {result['stride']}, trained at {result['trained_length']}"
        )
        if flags.json is not None:
            try:
                write_json(Path(flags.json), result)
            except OSError as error:
                raise ValueError(f"--json {flags.json} cannot be written ({error.strerror}); choose another") from None
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
