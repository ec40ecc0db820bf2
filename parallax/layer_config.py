"""What of a layer is a config of its own: the scaling of its rotary embedding, and in what it differs from others.

Invariant: as with every config, one that exists is valid in itself.
"""

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin

import chex


def require(holds: bool, message: str) -> None:
    """Raises ValueError with the message unless it holds."""
    if not holds:
        raise ValueError(message)


def require_choices(config: Any, prefix: str = "") -> None:
    """Raises ValueError unless each field with a Literal type has one of its values."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), get_args(field.type)
        holds = get_origin(field.type) is not Literal or value in choices
        require(holds, f"{prefix}{field.name}={value!r} is not one of {', '.join(map(str, choices))}")


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
    whole_ends: bool = True
    """yarn: whether the ramp between them begins and ends at whole numbers of pairs."""
    attention_factor: float = 0.0
    """yarn: by what queries and keys are multiplied; 0 stands for the paper's 0.1 ln(factor) + 1."""

    def __post_init__(self):
        require_choices(self, "rope_scaling.")
        require(self.factor >= 1, f"rope_scaling.factor={self.factor} must be at least 1; try 8")
        low, high = self.low_freq_factor, self.high_freq_factor
        require(low < high, f"rope_scaling.low_freq_factor={low} must be below high_freq_factor={high}; try 1 and 4")
        length = self.original_max_seq_len
        require(length >= 1, f"rope_scaling.original_max_seq_len={length} must be at least 1; try 8192")
        require(
            0 < self.beta_slow < self.beta_fast,
            f"rope_scaling.beta_slow={self.beta_slow} must be positive and below beta_fast={self.beta_fast}; "
            "try 1 and 32",
        )
        require(
            0 <= self.attention_factor < math.inf,
            f"rope_scaling.attention_factor={self.attention_factor} must be finite, and 0 (the paper's) or more; try 0",
        )


@chex.dataclass(frozen=True)
class LayerSpec:
    """In what a layer differs from what its TransformerConfig says of all; a field that is None does not.

    Each field means what the field of the TransformerConfig with its name means.
    """

    sliding_window: int | None = None
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    qk_norm: bool | None = None
    attention_bias: bool | None = None
    attention_out_bias: bool | None = None
    attention_softcap: float | None = None
    attention_sinks: bool | None = None
    norms: Literal["before", "after", "both"] | None = None
    activation: Literal["silu", "gelu_tanh"] | None = None
    feed_forward: Literal["dense", "experts"] | None = None

    def given(self) -> dict[str, Any]:
        """The fields that are not None."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}
