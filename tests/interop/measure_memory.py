"""Reads and writes a model in a process of its own and prints what it took at most, in bytes: one JSON object.

The largest tensor is the table; a matrix of all layers together is twice as large.
"""

import json
import math
import re
import sys
from pathlib import Path

import jax

from parallax.config import TransformerConfig
from parallax.interop.files import TensorFiles
from parallax.interop.llama import named
from parallax.interop.reading import read_params
from parallax.interop.writing import write_params
from parallax.model.transformer import init_params

SMALL = {"embed_dim": 64, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "mlp_dim": 96, "num_layers": 2}
LARGE = TransformerConfig(
    vocab_size=48_000, embed_dim=256, num_heads=4, num_kv_heads=4, head_dim=64, mlp_dim=4096, num_layers=24
)  # fmt: skip


def main(folder: Path, dtype: str) -> dict[str, int]:
    small = TransformerConfig(vocab_size=99, **SMALL)
    (folder / "small").mkdir()
    write_params(_initial(small), small, folder / "small")
    read_params(TensorFiles(folder / "small"), small, _abstract(small))  # what is loaded and compiled once
    before = _peak()
    params = read_params(TensorFiles(folder / "large"), LARGE, _abstract(LARGE))
    read = _peak() - before
    (folder / "back").mkdir()
    write_params(params, LARGE, folder / "back", dtype)
    largest = 4 * max(math.prod(entry.shape_there) for entry, _ in named(LARGE).values())
    return {
        "read": read,
        "written": _peak() - before,
        "parameters": 4 * LARGE.num_params(),
        "largest": largest,
        "of all layers": params["blocks"]["mlp"]["up"].nbytes,
    }


def make(folder: Path) -> None:
    """The files of the large model, by another process, whose memory is its own."""
    (folder / "large").mkdir()
    write_params(_initial(LARGE), LARGE, folder / "large")


def _initial(config):
    return jax.jit(lambda: init_params(config, jax.random.key(0)))()


def _abstract(config):
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def _peak() -> int:
    """Of this program alone: what getrusage says may be the peak of the program that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    if sys.argv[1] == "make":
        make(folder)
    else:
        print(json.dumps(main(folder, sys.argv[1])))
