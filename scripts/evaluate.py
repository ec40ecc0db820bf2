"""Perplexity and bits per byte of a text under a model: `python scripts/evaluate.py --help`.

Invariant: each token is scored once, with at least window - stride tokens of context or all that there are.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

import tyro

from scripts.command_line import errors_in_one_line, parse

DESCRIPTION = (
    "Perplexity and bits per byte of a text under a trained or imported model. A window slides over each document; a "
    "token is scored in one window alone. The first token has nothing before it: it is not scored and its bytes are "
    "not counted, unless the tokenizer begins a text with an id of its own, such as <s>. A document's end is scored "
    "where the tokenizer has an id for it."
)


@dataclasses.dataclass(frozen=True)
class Flags:
    checkpoint: str
    """The run folder that train.py or convert.py wrote, local or on gs://."""
    dataset: str
    """tiny_shakespeare, or a path to a text file or a folder of text files."""
    data_dir: str | None = None
    """Folder to look for the data set in; by default PARALLAX_DATA_DIR."""
    held_out: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Score only what train.py holds out of this data set: its last tenth."""
    window: int | None = None
    """Tokens that the model sees at once; by default as in its training, or 1024 where that is not known."""
    stride: int | None = None
    """Tokens scored in a window, the last ones; by default half the window."""
    batch_size: int = 8
    """Windows at a time."""
    step: int | None = None
    """Which checkpoint; by default the best."""
    mesh: str = ""
    """Spread the model and the windows over a mesh such as data=8; by default one device."""
    json: str | None = None
    """Also write the result to this file."""


def main() -> int:
    """Exit status: 0 done; 2 bad input."""
    with errors_in_one_line():
        flags = parse(Flags, description=DESCRIPTION)
        for name in ("window", "stride", "batch_size"):
            value = getattr(flags, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1; leave it out")
        # Late, since these load JAX: help and bad flags answer at once.
        from parallax.storage import write_json
        from scripts.compilation_cache import keep_compiled_programs
        from scripts.evaluation import evaluate

        keep_compiled_programs()
        result = evaluate(flags)
        print(
            f"perplexity {result['perplexity']:.4f} a token, {result['bits_per_byte']:.4f} bits per byte: "
            f"{result['tokens']:,} tokens of {result['bytes']:,} bytes, window {result['window']}, "
            f"stride {result['stride']}"
        )
        if flags.json is not None:
            try:
                write_json(Path(flags.json), result)
            except OSError as error:
                raise ValueError(
                    f"--json {flags.json} cannot be written ({error.strerror}); choose another"
                ) from None
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
