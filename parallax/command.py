"""The command `parallax`: `parallax train` is `python scripts/train.py`, and so on.

Invariant: the script runs in this process as it would by itself, but for the name that its help has. A checkout's own
scripts run; a wheel holds them in `_command`, with `data`, so that those names stay out of site-packages.
"""

import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

COMMANDS = {
    "train": "train a model on text, or go on with a run",
    "prepare": "text files of any size into a store of tokens to train on",
    "generate": "continue a prompt",
    "evaluate": "perplexity of a text, or scores in benchmarks",
    "convert": "weights of Llama, Mistral and Qwen models in and out",
    "serve": "an OpenAI-compatible server, and a page to talk to it",
    "plan": "what a run takes on TPUs that are not here",
    "ladder": "what a large run will reach, forecast from small ones",
    "launch": "a run as several processes, here or on a TPU",
    "benchmark": "measure speed, alone and against PyTorch",
}


def main() -> int:
    """Exit status: 2 for no such command; a script's own ends the process."""
    name, *args = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        lines = (f"  {command:10} {what}\n" for command, what in COMMANDS.items())
        print(f"usage: parallax COMMAND ...\n\ncommands:\n{''.join(lines)}\nparallax COMMAND --help says more.")
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: command {name!r} is not one of {known}; see parallax --help", file=sys.stderr)
        return 2
    sys.argv = [f"parallax {name}", *args]
    own = Path(__file__).resolve().parent / "_command"
    root = own if own.exists() else own.parent.parent
    script = sys.modules["__main__"] = ModuleType("__main__")
    script.__file__ = str(root / "scripts" / f"{name}.py")
    SourceFileLoader("__main__", script.__file__).exec_module(script)
    return 0
