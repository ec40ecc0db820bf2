"""Configs drawn at random, for tests of what holds for all of them."""

import numpy as np

from parallax.config import LayerSpec, RopeScaling, TransformerConfig


def random_config(seed):
    """A small config with every switch thrown at random."""
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 4))
    return TransformerConfig(
        vocab_size=int(rng.integers(2, 50)),
        embed_dim=int(rng.integers(1, 40)),
        num_layers=int(rng.integers(1, 5)),
        num_heads=groups * int(rng.integers(1, 4)),
        num_kv_heads=groups,
        head_dim=2 * int(rng.integers(1, 9)),
        mlp_dim=int(rng.integers(1, 60)),
        sliding_window=int(rng.integers(0, 9)),
        logit_softcap=float(rng.uniform(0, 30)),
        attention_bias=bool(rng.integers(2)),
        qk_norm=bool(rng.integers(2)),
        tie_embeddings=bool(rng.integers(2)),
        remat=str(rng.choice(["none", "dots", "full"])),
        dtype=str(rng.choice(["float32", "bfloat16"])),
        rope_scaling=RopeScaling(
            kind=str(rng.choice(["none", "linear", "llama3", "yarn"])), factor=float(rng.uniform(1, 9))
        ),
        attention_out_bias=bool(rng.integers(2)),
        norms=str(rng.choice(["before", "after", "both"])),
        activation=str(rng.choice(["silu", "gelu_tanh"])),
        qk_norm_over=str(rng.choice(["head", "heads"])),
        attention_softcap=float(rng.choice([0, 3])),
        attention_sinks=bool(rng.integers(2)),
        embedding_scale=float(rng.choice([1, 3])),
        pattern=tuple(random_layer(rng) for _ in range(rng.integers(0, 4))),
    )


def random_layer(rng):
    """What a layer has of its own, parameters too."""
    values = {"sliding_window": int(rng.integers(0, 9)), "attention_sinks": bool(rng.integers(2)), "qk_norm": True}
    return LayerSpec(**{name: value for name, value in values.items() if rng.integers(2)})
