"""Hugging Face folders with random weights, made without transformers."""

import json

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from parallax.interop.hf_config import config_from_hf
from parallax.interop.llama import named
from tests.parallax.interop.tokenizers import byte_level

SMALL = {
    "model_type": "llama",
    "vocab_size": 301,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "eos_token_id": [1, 2],
}


def random_tensors(values, dtype=np.float32):
    """Every tensor of such a model by its name, with values that float16 and bfloat16 hold exactly."""
    rng = np.random.default_rng(0)
    entries = named(config_from_hf(values))
    return {
        name: (rng.integers(-127, 128, entry.shape_there) / 256).astype(dtype) for name, (entry, _) in entries.items()
    }


def write_folder(folder, values=SMALL, tensors=None, files=1):
    """The folder, and its tensors. Several files take turns."""
    tensors = random_tensors(values) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text(json.dumps(byte_level()[0]))
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    names = [f"model-{number:05}-of-{files:05}.safetensors" for number in range(1, files + 1)]
    weight_map = {name: names[at % files] for at, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


BFLOAT16 = np.dtype(jnp.bfloat16)
