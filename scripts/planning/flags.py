"""The flags of plan.py.

Invariant: where train.py has the same flag, it means the same.
"""

import dataclasses
import math
from typing import Annotated, Literal

import tyro

from parallax.config import PRESETS, OptimizerConfig, TransformerConfig
from scripts.training.flags import Preset, Switch

DESCRIPTION = """Choose a layout for a slice of TPUs, without one. Every legal mesh, rematerialisation and number of
microbatches is ranked by an analytic model; the best are compiled by the real TPU compiler, which says what fits."""


@dataclasses.dataclass(frozen=True)
class Flags:
    topology: str = "v3-8"
    """The slice, by the name one rents it: v3-8, v3-32, v4-64, v5litepod-256, v5p-512, v6e-256 …"""
    config: Preset = "tiny"
    """Preset of the model; --model.* flags change it."""
    batch_size: int = 256
    """Sequences a step, over all devices."""
    seq_len: int = 128
    """Tokens a sequence."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype."""
    remat: Literal["any", "none", "dots", "full"] = "any"
    """What the backward pass recomputes; any tries all three."""
    rules: str = "default"
    """What a mesh axis splits: a rule set or a JSON file of rules."""
    tokens: float | None = None
    """Tokens of the whole run, such as 1e12; then the plan says its hours and its price."""
    price: float | None = None
    """US dollars for a chip or card and an hour, in place of the list price."""
    compile: int = 8
    """How many layouts to compile, the best first, and pmap if it may fit."""
    exhaustive: Switch = False
    """Compile every layout that may fit."""
    output: str | None = None
    """The plan as JSON; by default plans/TOPOLOGY-CONFIG-BATCHxLENGTH.json."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()
    model: Annotated[TransformerConfig, tyro.conf.FlagConversionOff] = PRESETS["tiny"]

    def __post_init__(self):
        if self.compile < 1:
            raise ValueError(f"compile={self.compile} must be at least 1; try 8")
        if self.tokens is not None and not 0 < self.tokens < math.inf:
            raise ValueError(f"tokens={self.tokens} must be positive; try 1e9")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ValueError(f"price={self.price} must be 0 or more; try 1.20")
