"""A run folder around a model that learned nothing, written without compiling or training."""

import json
from pathlib import Path

import jax
import numpy as np

from parallax.config import TransformerConfig, config_to_dict
from parallax.model.transformer import init_params
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.registry import save_tokenizer
from parallax.training.checkpoint import Checkpointer


def one_layer(vocab_size: int, embed_dim: int = 16) -> TransformerConfig:
    """The smallest model with all parts."""
    return TransformerConfig(
        vocab_size=vocab_size, embed_dim=embed_dim, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_dim=24, tie_embeddings=False, max_seq_len=256,
    )  # fmt: skip


def write_untrained(
    folder: Path,
    tokenizer: Tokenizer,
    config: TransformerConfig,
    *,
    step: int,
    mean: float = 0.0,
    deviation: float = 0.4,
    seq_len: int = 128,
) -> None:
    """Makes the folder, with a checkpoint at its last step; all weights are drawn from one normal distribution."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: rng.normal(mean, deviation, leaf.shape).astype(leaf.dtype), shapes)
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model": config_to_dict(config), "train": {"steps": step, "seq_len": seq_len}})
    )
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    checkpoints = Checkpointer(folder / "checkpoints", keep=1)
    checkpoints.save(step, {"params": params}, {"progress": {}}, 0.5)
    checkpoints.close()
