"""Serves a trained model: an OpenAI-compatible completions API, and a page at /: `python scripts/serve.py --help`.

Invariant: standard output holds the address, once the server answers; all else goes to standard error.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

import tyro

from parallax.serving.access import Limits, listen
from scripts.common.command_line import errors_in_one_line, parse, tell

DESCRIPTION = (
    "Serve a trained model: an OpenAI-compatible completions API under /v1, and a page to talk to it at /. "
    "The address goes to standard output once the server answers."
)
KEY_VARIABLE = "PARALLAX_API_KEY"


@dataclasses.dataclass(frozen=True)
class Flags:
    checkpoint: str
    """The run folder that train.py wrote, local or on gs://."""
    step: int | None = None
    """Which checkpoint; by default the best."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """What parameters are held in; by default as the checkpoint has them: float32 after training, an imported model's
    own."""
    host: str = "127.0.0.1"
    """The address to listen on; any but this machine's own needs --api-key."""
    port: int = 8000
    """The port to listen on; 0 takes a free one."""
    api_key: str = ""
    """What clients must send as Authorization: Bearer KEY; by default $PARALLAX_API_KEY, which hides it
    from lists of processes."""
    slots: int = 16
    """How many answers are computed at once."""
    capacity: int = 1024
    """The tokens that a slot holds, prompt and answer together."""
    context: Literal["crop", "extend"] = "crop"
    """crop: a slot holds no more tokens than the model was trained at; extend: up to max_seq_len, where text decays."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Limits)


def main() -> int:
    """Exit status: 0 ended by a signal; 1 the engine failed; 2 bad input."""
    with errors_in_one_line():
        flags = parse(Flags, description=DESCRIPTION)
        key = flags.api_key or os.environ.get(KEY_VARIABLE, "")
        check(flags, key)
        listener = listen(flags.host, flags.port, key)
        # Late, since it loads JAX: help and bad flags answer at once.
        from parallax.serving.process import serve
        from scripts.common.jax_process import keep_compiled_programs

        keep_compiled_programs()
        return serve(
            flags.checkpoint,
            listener,
            step=flags.step,
            param_dtype=flags.param_dtype,
            slots=flags.slots,
            capacity=flags.capacity,
            context=flags.context,
            limits=flags.limits,
            host=flags.host,
            key=key,
            notify=tell,
        )


def check(flags: Flags, key: str) -> None:
    """Raises ValueError for flags that cannot be meant."""
    if not 0 <= flags.port < 65536:
        raise ValueError(f"--port {flags.port} must be in [0, 65535]; 0 takes a free one")
    for name, value in (("slots", flags.slots), ("capacity", flags.capacity)):
        if value < 1:
            raise ValueError(f"--{name} {value} must be at least 1; try {getattr(Flags, name)}")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("--api-key must be printable ASCII without spaces; try letters and digits")


if __name__ == "__main__":
    raise SystemExit(main())
