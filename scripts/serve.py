"""Serves a trained model: an OpenAI-compatible API, and a page at /: `python scripts/serve.py --help`.

Invariant: standard output holds the address, once the server answers; all else goes to standard error.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

from parallax.serving.access import listen
from scripts.common.command_line import errors_in_one_line, parse, tell
from scripts.common.quick_imports import quick_imports
from scripts.serving.flags import DESCRIPTION, KEY_VARIABLE, Flags, check


def main() -> int:
    """Exit status: 0 ended by a signal; 1 the engine failed; 2 bad input."""
    with errors_in_one_line():
        flags = parse(Flags, description=DESCRIPTION)
        key = flags.api_key or os.environ.get(KEY_VARIABLE, "")
        check(flags, key)
        listener = listen(flags.host, flags.port, key)
        # Late, since it loads JAX: help and bad flags answer at once.
        with quick_imports():
            from parallax.serving.process import serve
            from scripts.common.jax_process import expect_no_gpu, keep_compiled_programs

        expect_no_gpu()
        keep_compiled_programs()
        return serve(
            flags.checkpoint,
            listener,
            adapters=flags.adapters,
            step=flags.step,
            param_dtype=flags.param_dtype,
            slots=flags.slots,
            capacity=flags.capacity,
            context=flags.context,
            prefix_tokens=flags.prefix_tokens,
            limits=flags.limits,
            host=flags.host,
            key=key,
            chat_template=flags.chat_template,
            notify=tell,
        )


if __name__ == "__main__":
    raise SystemExit(main())
