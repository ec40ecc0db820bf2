"""How rotary wavelengths are stretched, as a frozen value.

Invariant: a scaling that exists is valid, since every rule is checked at construction.
"""

import math
from typing import Literal

import chex

KINDS = ("none", "linear", "llama3", "yarn")


@chex.dataclass(frozen=True)
class RopeScaling:
    """How rotary wavelengths are stretched to reach beyond the length a model was first trained at.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595). `llama3` divides only the
    low ones and blends in between (Llama 3, arXiv:2407.21783); so does `yarn`, which also sharpens attention
    (Peng et al. 2023, arXiv:2309.00071).
    """

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    """llama3: a wave that turns less often than this over the first length is divided by the whole factor."""
    high_freq_factor: float = 4.0
    """llama3: one that turns more often than this is left alone."""
    original_max_seq_len: int = 8192
    """llama3, yarn: the first length, in tokens."""
    beta_fast: float = 32.0
    """yarn: a wave that turns more often than this over the first length is left alone."""
    beta_slow: float = 1.0
    """yarn: one that turns less often than this is divided by the whole factor."""
    attention_factor: float = 0.0
    """yarn: by what queries and keys are multiplied; 0 stands for the paper's 0.1 ln(factor) + 1."""

    def __post_init__(self):
        rules = (
            (self.kind in KINDS, f"kind={self.kind!r} is not one of {', '.join(KINDS)}"),
            (self.factor >= 1, f"factor={self.factor} must be at least 1; try 8"),
            (
                self.low_freq_factor < self.high_freq_factor,
                f"low_freq_factor={self.low_freq_factor} must be below high_freq_factor={self.high_freq_factor}; "
                "try 1 and 4",
            ),
            (
                self.original_max_seq_len >= 1,
                f"original_max_seq_len={self.original_max_seq_len} must be at least 1; try 8192",
            ),
            (
                0 < self.beta_slow < self.beta_fast,
                f"beta_slow={self.beta_slow} must be positive and below beta_fast={self.beta_fast}; try 1 and 32",
            ),
            (
                0 <= self.attention_factor < math.inf,
                f"attention_factor={self.attention_factor} must be finite, and 0 (the paper's) or more; try 0",
            ),
        )
        for holds, message in rules:
            if not holds:
                raise ValueError(f"rope_scaling.{message}")
