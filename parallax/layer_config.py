"""What of a layer is a config of its own: rotary scaling, experts, adapters, and in what it differs from other layers.

Invariant: as with every config, one that exists is valid in itself.
"""

import dataclasses
import math
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import chex


def require(holds: bool, message: str) -> None:
    """Raises ValueError with the message unless it holds."""
    if not holds:
        raise ValueError(message)


def require_choices(config: Any, prefix: str = "") -> None:
    """Raises ValueError unless each field with a Literal type has one of its values, or None where it may."""
    for field in dataclasses.fields(config):
        value, is_union = getattr(config, field.name), get_origin(field.type) in (Union, UnionType)
        kinds = get_args(field.type) if is_union else (field.type,)
        choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
        holds = choices is None or value in choices or (value is None and type(None) in kinds)
        require(holds, f"{prefix}{field.name}={value!r} is not one of {', '.join(map(str, choices or ()))}")


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
class ExpertsConfig:
    """A mixture of experts in place of a feed-forward: each token goes to the few that its router chooses.

    A token is never dropped, however uneven the load. Losses are weighted here and added up over layers.
    """

    num_experts: int = 0
    """E: how many there are to choose from; 0 leaves every feed-forward dense."""
    experts_per_token: int = 2
    """k: how many a token goes to."""
    mlp_dim: int = 0
    """F: hidden width of one expert; 0 takes the model's mlp_dim."""
    shared_mlp_dim: int = 0
    """Hidden width of a feed-forward that all tokens go through beside their experts; 0 is none."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """Of the router's logits: over all experts, or of each alone (DeepSeek-V3, arXiv:2412.19437, eq. 15)."""
    renormalize: bool = True
    """Whether the scores of the chosen experts are divided by their sum, to be the weights of what they give."""
    scaling: float = 1.0
    """By what these weights are multiplied."""
    bias: bool = False
    """Whether the router and the projections of each expert add a bias."""
    clamp: float = 0.0
    """The limit of gpt-oss's clamped activation, (up + 1) gate sigmoid(1.702 gate), in place of the model's own; 0 is
    off."""
    balance_loss: float = 0.0
    """Weight of the loss that evens out the load within each row (DeepSeek-V3, eq. 17); 0.01 is usual alone."""
    router_z_loss: float = 0.0
    """Weight of log²Z of the router's logits (ST-MoE, arXiv:2202.08906, eq. 5); 0.001 is usual."""
    balance_bias_rate: float = 0.0
    """How much a step raises the bias of each expert that got too few tokens, and lowers that of the others; the bias
    is added to scores for the choice alone (Wang et al. 2024, arXiv:2408.15664). 0 is none, 0.001 is usual."""

    def __post_init__(self):
        require_choices(self, "experts.")
        count, active = self.num_experts, self.experts_per_token
        require(count >= 0, f"experts.num_experts={count} must not be negative; 0 is off")
        require(active >= 1, f"experts.experts_per_token={active} must be at least 1; try 2")
        require(
            not count or active <= count,
            f"experts.experts_per_token={active} must not exceed num_experts={count}; try {count}",
        )
        for name in ("mlp_dim", "shared_mlp_dim", "clamp", "balance_loss", "router_z_loss", "balance_bias_rate"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"experts.{name}={value} must be finite and not negative; 0 is off")
        require(0 < self.scaling < math.inf, f"experts.scaling={self.scaling} must be positive; try 1")


ADAPTED = ("query", "key", "value", "out", "gate", "up", "down")
"""The matrices of a layer that may have an adapter: of attention, and of a feed-forward."""


@chex.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen matrices, which alone are learned (Hu et al. 2021, arXiv:2106.09685).

    A matrix W computes x W + s (x A) B, where A has `rank` columns and B, which begins at zero, as many rows. Experts
    of a mixture, which a router chooses, have none; a feed-forward that all tokens go through beside them has.
    """

    rank: int = 0
    """r: columns of A; 0 is without adapters, and everything is learned."""
    alpha: float = 16.0
    """s = alpha / rank."""
    rslora: bool = False
    """s = alpha / sqrt(rank), which keeps what a high rank learns as large (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: float = 0.0
    """Probability of dropping a value of x before A."""
    targets: tuple[Literal["query", "key", "value", "out", "gate", "up", "down"], ...] = ()
    """The matrices with an adapter; by default all of attention and of dense feed-forwards."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the frozen parameters are held in; adapters are float32."""

    def __post_init__(self):
        require_choices(self, "lora.")
        require(self.rank >= 0, f"lora.rank={self.rank} must not be negative; 0 is off")
        require(0 < self.alpha < math.inf, f"lora.alpha={self.alpha} must be finite and positive; try 16")
        require(0 <= self.dropout < 1, f"lora.dropout={self.dropout} must be in [0, 1); try 0.05")
        unused = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        rule = f"lora.{''.join(unused[:1])} needs adapters, and lora.rank=0 is off; try lora.rank=16"
        require(self.rank > 0 or not unused, rule)
        for target in self.targets:
            require(target in ADAPTED, f"lora.targets has {target!r}, which is not one of {', '.join(ADAPTED)}")

    @property
    def scale(self) -> float:
        """s"""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def adapts(self, matrix: str) -> bool:
        """Whether a matrix of this name has an adapter."""
        return self.rank > 0 and (not self.targets or matrix in self.targets)


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

    def __post_init__(self):
        require_choices(self)

    def given(self) -> dict[str, Any]:
        """The fields that are not None."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}
