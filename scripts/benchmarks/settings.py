"""The settings that are measured: shapes of models, sizes of batches, and the optimizer that all contenders share.

Invariant: a setting is the same work for every contender. Vocabularies are multiples of 8, so that no embedding table
has rows of padding, and the learning rate is constant, so that no contender needs a schedule of another's.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from data.samples import Windows
from parallax.config import NANO_CONFIG, NANO_MOE_CONFIG, SMALL_CONFIG, TINY_CONFIG, OptimizerConfig, TransformerConfig

Measure = Callable[[dict[str, Any]], dict[str, Any]]
"""A request to its result, in a contender's process; all work is done when it returns."""

SEED = 0
TOKENS = 2**20
"""Length of the text that is trained on."""
LEARNING = OptimizerConfig(learning_rate=3e-4, warmup_steps=0, final_rate=1.0)
CHECKED_STEPS = 4
"""Steps whose losses are compared before anything is timed: the first by the model, the others by the optimizer too."""

_CHARACTERS = 72  # the rows of the table that the 65 characters of Tiny Shakespeare get
MODELS = {
    "trial": TransformerConfig(
        vocab_size=64, embed_dim=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64
    ),
    "tiny": dataclasses.replace(TINY_CONFIG, vocab_size=_CHARACTERS),
    "nano": dataclasses.replace(NANO_CONFIG, vocab_size=_CHARACTERS),
    "small": dataclasses.replace(SMALL_CONFIG, vocab_size=_CHARACTERS),
    "small-1365": dataclasses.replace(SMALL_CONFIG, vocab_size=32_000, mlp_dim=1365),
    "nano-moe": dataclasses.replace(
        NANO_MOE_CONFIG,
        vocab_size=_CHARACTERS,
        experts=dataclasses.replace(NANO_MOE_CONFIG.experts, balance_loss=0.0, router_z_loss=0.0),
    ),
    "nano-352": dataclasses.replace(NANO_CONFIG, vocab_size=_CHARACTERS, mlp_dim=352),
}
"""small-1365 has about as many parameters a layer as a GPT-2 block of that width, and a vocabulary of 32,000. nano-moe
computes the losses of its routers with weight 0, since those of others have none."""

DENSE = {"nano-moe": "nano-352"}
"""For a model with experts the one without that has as many active parameters, routers aside."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model with a batch of B sequences of T tokens."""

    model_name: str
    batch_size: int
    seq_len: int

    @property
    def name(self) -> str:
        return f"{self.model_name}-{self.batch_size}x{self.seq_len}"

    @property
    def model(self) -> TransformerConfig:
        return MODELS[self.model_name]

    @property
    def tokens(self) -> int:
        """In a batch."""
        return self.batch_size * self.seq_len


def read_setting(name: str) -> Setting:
    """`nano-12x64` as a Setting. Raises ValueError if the model is not in MODELS, or a size is no positive number."""
    model_name, _, sizes = name.rpartition("-")
    numbers = sizes.split("x")
    if model_name not in MODELS or len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers):
        raise ValueError(
            f"setting {name!r} must be MODEL-BATCHxLENGTH with a model of {', '.join(MODELS)}; try nano-12x64"
        )
    return Setting(model_name, int(numbers[0]), int(numbers[1]))


def samples(setting: Setting) -> Windows:
    """A text of drawn tokens, the frequent ones as frequent as words are: there is something to learn."""
    draws = np.random.default_rng(SEED).random(TOKENS)
    ids = (setting.model.vocab_size * draws**3).astype(np.int32)
    return Windows(ids, setting.seq_len, "benchmark text")


def prompts(model: TransformerConfig, batch_size: int, length: int) -> np.ndarray:
    """Token ids to continue, int32 [B, T]."""
    shape = (batch_size, length)
    return np.random.default_rng(SEED).integers(model.vocab_size, size=shape, dtype=np.int32)


def cores() -> int:
    """Those that this process may use: the threads of every contender."""
    return len(os.sched_getaffinity(0))
