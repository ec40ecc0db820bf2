"""The flags that make one config of another, as train.py takes them.

Invariant: train.py with these words has the config that they were made of, but for the vocabulary, its tokenizer's.
"""

import dataclasses
from typing import Any

from parallax.config import LayerSpec
from scripts.common.layer_words import write_layer


def config_words(config: Any, default: Any, prefix: str = "") -> list[str]:
    """Flags for the fields in which a config differs from the one that a command starts from.

    Args:
      prefix: of its flags, such as "model.".
    """
    words: list[str] = []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        name = f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            words += config_words(value, usual, f"{name}.")
        elif value != usual and isinstance(value, tuple):
            words += [f"--{name}", *(write_layer(each) if isinstance(each, LayerSpec) else str(each) for each in value)]
        elif value != usual:
            words += [f"--{name}", str(value)]
    return words
