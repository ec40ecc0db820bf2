"""Imports or exports a model in a process of its own and prints what that took at most, in bytes: one JSON object.

The largest tensor is the table; a matrix of all layers together is half as large again.
"""

import json
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from parallax.config import TransformerConfig
from parallax.interop.folders import export_model, import_model
from parallax.interop.hf_config import config_to_hf
from parallax.interop.llama import named
from parallax.interop.writing import write_params
from parallax.model.transformer import init_params
from tests.parallax.interop.tokenizers import byte_level

SMALL = TransformerConfig(
    vocab_size=400, embed_dim=64, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=96, num_layers=2
)  # fmt: skip
LARGE = TransformerConfig(
    vocab_size=64_000, embed_dim=256, num_heads=4, num_kv_heads=4, head_dim=64, mlp_dim=4096, num_layers=24
)  # fmt: skip


def measure(command: str, folder: Path) -> dict[str, int]:
    """Converts the small model both ways first, so that all is loaded that converting any model takes."""
    import_model(folder / "small", folder / f"{command}-small")
    export_model(str(folder / f"{command}-small"), folder / f"{command}-small-back")
    before = _peak()
    if command == "import":
        import_model(folder / "large", folder / "run")
    else:
        export_model(str(folder / "run"), folder / "back")
    return {
        "used": _peak() - before,
        "parameters": 4 * LARGE.num_params(),
        "largest": 4 * max(math.prod(entry.shape_there) for entry, _ in named(LARGE).values()),
        "of all layers": 4 * LARGE.num_layers * LARGE.embed_dim * LARGE.mlp_dim,
    }


def make(folder: Path) -> None:
    """The Hugging Face folders, by another process, whose memory is its own."""
    for name, config in (("small", SMALL), ("large", LARGE)):
        (folder / name).mkdir()
        shapes = jax.eval_shape(lambda config=config: init_params(config, jax.random.key(0)))
        params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), shapes)  # drawn, they take longer
        write_params(params, config, folder / name)
        (folder / name / "config.json").write_text(json.dumps(config_to_hf(config)))
        (folder / name / "tokenizer.json").write_text(json.dumps(byte_level()[0]))


def _peak() -> int:
    """Of this program alone: what getrusage says may be the peak of the program that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "make":
        make(folder)
    else:
        print(json.dumps(measure(command, folder)))
