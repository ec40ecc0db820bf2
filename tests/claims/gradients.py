"""Compares each gradient in bfloat16 with that in float32, and prints how far they are apart on each layout.

    python tests/claims/gradients.py

Ids are as common as words: of 65 the first is a fifth of all tokens. All arrays of a model are compared, by length and
by direction, and of the tables the rows of the three commonest ids. Exit status 1: a bound is broken.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import jax

from parallax.config import NANO_CONFIG, TINY_CONFIG
from parallax.model.transformer import init_params
from tests.parallelism.zipf import direction_error, gradient, norm_error, zipf_batch

BOUND = 0.02
LENGTH = 256
VARIANTS = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "grouped heads": {"num_kv_heads": 2},
    "QK-norm": {"qk_norm": True},
    "window": {"sliding_window": 64},
    "biases": {"attention_bias": True, "attention_out_bias": True},
}
LAYOUTS = {
    "one device": ("single", "", 1),
    "accumulate 8": ("single", "", 8),
    "pmap 8": ("pmap", "", 1),
    "fsdp 8": ("mesh", "fsdp=8", 1),
    "tensor 2": ("mesh", "data=4,tensor=2", 1),
}


def compare(found: dict, exact: dict) -> tuple[float, float, float]:
    """The worst of all arrays by length and by direction, and of the tables' commonest rows."""
    tables = [path for path in exact if path.endswith("table")]
    return (
        max(norm_error(found[path].ravel(), exact[path].ravel()) for path in exact),
        max(direction_error(found[path], exact[path]) for path in exact),
        max(norm_error(found[path][:3], exact[path][:3]) for path in tables),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 65_536])
    parser.add_argument("--models", nargs="+", default=["tiny", "nano"], choices=["tiny", "nano"])
    flags = parser.parse_args()
    models, holds = {"tiny": TINY_CONFIG, "nano": NANO_CONFIG}, True
    print("| model | tokens | layout | length | direction | three commonest rows |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    for model in flags.models:
        for name, changes in VARIANTS.items():
            config = dataclasses.replace(models[model], attention="blocks", **changes)
            params = jax.device_get(jax.jit(lambda config=config: init_params(config, jax.random.key(0)))())
            for tokens in flags.tokens:
                batch = zipf_batch(config.vocab_size, tokens // LENGTH, LENGTH)
                exact = gradient(config, lambda params=params: params, batch)
                low = dataclasses.replace(config, dtype="bfloat16")
                for layout, where in LAYOUTS.items():
                    errors = compare(gradient(low, lambda params=params: params, batch, *where), exact)
                    holds = holds and max(errors) < BOUND
                    cells = " | ".join(f"{100 * each:.2f}%" for each in errors)
                    print(f"| {model}, {name} | {tokens:,} | {layout} | {cells} |", flush=True)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
