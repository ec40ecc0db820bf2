"""In bfloat16 no sum over tokens, microbatches or devices loses its addends: each gradient is that of float32.

tests/claims/gradients.py does so for TINY and NANO on more tokens and layouts.
"""

import functools

import pytest

from parallax.config import TransformerConfig
from tests.parallax.inference.models import draw_params
from tests.parallelism.zipf import direction_error, gradient, norm_error, zipf_batch

ROWS, LENGTH, V = 128, 128, 65
COMMONEST = slice(0, 3)
SIZES = {"vocab_size": V, "embed_dim": 32, "num_layers": 1, "num_heads": 4, "head_dim": 8, "mlp_dim": 48}
CONFIGS = {
    "tied": TransformerConfig(**SIZES, num_kv_heads=4),
    "untied": TransformerConfig(
        **SIZES, num_kv_heads=2, tie_embeddings=False, qk_norm=True, sliding_window=32, attention_bias=True,
        attention_out_bias=True,
    ),
}  # fmt: skip
LAYOUTS = {
    "one device": ("tied", "single", "", 1),
    "shards, microbatches": ("untied", "mesh", "fsdp=8", 2),
    "sequence, tensor": ("tied", "mesh", "data=2,sequence=2,tensor=2", 1),
}


@functools.cache
def found(name, dtype, *layout):
    config = CONFIGS[name].replace(dtype=dtype)
    return gradient(config, lambda: draw_params(config), zipf_batch(V, ROWS, LENGTH), *layout)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_gradient_has_the_length_and_the_direction_that_it_has_in_float32(layout):
    name, *where = layout
    exact, low = found(name, "float32"), found(name, "bfloat16", *where)
    assert low.keys() == exact.keys()
    for path, leaf in low.items():
        assert norm_error(leaf.ravel(), exact[path].ravel()) < 0.02, path
        assert direction_error(leaf, exact[path]) < 0.02, path
        if path.endswith("table"):
            assert norm_error(leaf[COMMONEST], exact[path][COMMONEST]) < 0.02, path
