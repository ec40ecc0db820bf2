"""What a model is and how it learns, as frozen values, and as the plain values that config.json holds.

Invariant: a config that exists is valid, since every rule is checked at construction; one that went out as plain values
and came in again is equal to what it was.
"""

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin

import chex


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _require_choices(config: Any, prefix: str = "") -> None:
    """That a field with a Literal type has one of its values."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), get_args(field.type)
        holds = get_origin(field.type) is not Literal or value in choices
        _require(holds, f"{prefix}{field.name}={value!r} is not one of {', '.join(map(str, choices))}")


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
        _require_choices(self, "rope_scaling.")
        _require(self.factor >= 1, f"rope_scaling.factor={self.factor} must be at least 1; try 8")
        low, high = self.low_freq_factor, self.high_freq_factor
        _require(low < high, f"rope_scaling.low_freq_factor={low} must be below high_freq_factor={high}; try 1 and 4")
        length = self.original_max_seq_len
        _require(length >= 1, f"rope_scaling.original_max_seq_len={length} must be at least 1; try 8192")
        _require(
            0 < self.beta_slow < self.beta_fast,
            f"rope_scaling.beta_slow={self.beta_slow} must be positive and below beta_fast={self.beta_fast}; "
            "try 1 and 32",
        )
        _require(
            0 <= self.attention_factor < math.inf,
            f"rope_scaling.attention_factor={self.attention_factor} must be finite, and 0 (the paper's) or more; try 0",
        )


@chex.dataclass(frozen=True)
class TransformerConfig:
    """The shape of a decoder-only Transformer. Sizes are counts, not bytes.

    Raises ValueError if a rule is broken; the message names the rule, the value and a remedy.
    """

    vocab_size: int = 65
    """V: how many token ids there are; a script takes it from the tokenizer."""
    embed_dim: int = 128
    """D: width of the residual stream."""
    num_layers: int = 4
    """N: how many blocks."""
    num_heads: int = 4
    """H: query heads."""
    num_kv_heads: int = 4
    """G: key and value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int = 32
    """K: width of a head; even, since rotary embeddings rotate pairs."""
    mlp_dim: int = 344
    """F: hidden width of the feed-forward."""
    max_seq_len: int = 8192
    """Longest sequence the model accepts, in tokens."""
    dropout_rate: float = 0.0
    """Probability of dropping a value after the embedding, in attention and before each residual sum."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    attention_bias: bool = False
    """Whether the query, key and value projections add a bias."""
    attention_out_bias: bool = False
    """Whether the output projection of attention adds a bias."""
    tie_embeddings: bool = True
    """Whether the output embedding is the input embedding."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalised per head before the rotation."""
    sliding_window: int = 0
    """How many tokens back attention sees, itself included; 0 sees them all."""
    logit_softcap: float = 0.0
    """Squash logits to ±this by a tanh; 0 leaves them."""
    attention: Literal["auto", "xla", "blocks", "splash", "cudnn"] = "auto"
    """How training computes attention: all scores by XLA, or skipping what is masked: blocks by XLA, splash by a kernel
    for TPU, cudnn by one for GPUs. A script decides on auto by the devices; the model itself takes it for xla."""
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    """How training goes through the layers: scan compiles one block, whatever the depth, and stacks what the
    backward pass needs; unroll compiles each, and stacks nothing. A script decides on auto by the devices; the model
    itself scans."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matmuls, or whole blocks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters stay float32."""

    def __post_init__(self):
        _require_choices(self)
        sizes = {"vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            holds = field.name not in sizes or value >= 1
            _require(holds, f"{field.name}={value} must be at least 1; try {field.default}")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; "
            f"try {_largest_divisor(self.num_heads, self.num_kv_heads)}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even; try {self.head_dim + 1}")
        _require(self.max_seq_len >= 1, f"max_seq_len={self.max_seq_len} must be at least 1; try 8192")
        _require(0 <= self.dropout_rate < 1, f"dropout_rate={self.dropout_rate} must be in [0, 1); try 0.1")
        _require(
            self.attention not in ("blocks", "splash", "cudnn") or not self.dropout_rate,
            f"attention={self.attention} drops no weights, and dropout_rate={self.dropout_rate}; try xla",
        )
        _require(
            self.layer_loop != "unroll" or self.remat == "none",
            f"layer_loop=unroll keeps what remat={self.remat} would compute again; try scan",
        )
        _require(self.rope_theta > 1, f"rope_theta={self.rope_theta} must be above 1; try 10000")
        _require(self.norm_eps > 0, f"norm_eps={self.norm_eps} must be positive; try 1e-5")
        _require(self.sliding_window >= 0, f"sliding_window={self.sliding_window} must not be negative; 0 is off")
        cap = self.logit_softcap
        _require(0 <= cap < math.inf, f"logit_softcap={cap} must be finite and not negative; 0 is off")

    @property
    def table_rows(self) -> int:
        """W: V rounded up to a multiple of 8, so that 2, 4 or 8 devices can share an embedding table.

        No token has an id of the rows beyond V, and their logits are masked.
        """
        return -(-self.vocab_size // 8) * 8

    def num_params(self) -> int:
        """Count of the parameters, from the sizes alone; equals the count of the initialised tree."""
        heads = self.num_heads + 2 * self.num_kv_heads
        attention = self.embed_dim * self.head_dim * (heads + self.num_heads)
        attention += heads * self.head_dim if self.attention_bias else 0
        attention += self.embed_dim if self.attention_out_bias else 0
        attention += 2 * self.head_dim if self.qk_norm else 0
        block = attention + 3 * self.embed_dim * self.mlp_dim + 2 * self.embed_dim
        tables = 1 if self.tie_embeddings else 2
        return self.num_layers * block + tables * self.table_rows * self.embed_dim + self.embed_dim


def _largest_divisor(number: int, at_most: int) -> int:
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)


@chex.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    """Peak rate, reached after the warm-up."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; by default min(100, steps / 10)."""
    schedule_steps: int | None = None
    """Steps until the cosine ends; the rate stays there after it. By default the steps of the run as it was begun."""
    final_rate: float = 0.1
    """The cosine ends at this share of the peak rate."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases are never decayed."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    """Largest global norm of the averaged gradient; 0 leaves it."""

    def __post_init__(self):
        _require_choices(self)
        _require(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive; try 1e-3")
        _require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"warmup_steps={self.warmup_steps} must not be negative; try 100",
        )
        _require(
            self.schedule_steps is None or self.schedule_steps >= 1,
            f"schedule_steps={self.schedule_steps} must be at least 1; try 1000",
        )
        _require(0 <= self.final_rate <= 1, f"final_rate={self.final_rate} must be in [0, 1]; try 0.1")
        _require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative; try 0.1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name}={value} must be in [0, 1); try 0.9")
        _require(self.clip_norm >= 0, f"clip_norm={self.clip_norm} must not be negative; 0 is off")

    def settled(self, steps: int) -> "OptimizerConfig":
        """With the warm-up and the schedule of a run of so many steps, which stay if that gets longer."""
        length = self.schedule_steps or steps
        warmup = min(100, length // 10) if self.warmup_steps is None else self.warmup_steps
        return dataclasses.replace(self, schedule_steps=length, warmup_steps=warmup)


@chex.dataclass(frozen=True)
class TrainConfig:
    """How long, on how much, and how often to look."""

    steps: int = 1000
    """Optimizer steps in the whole run."""
    batch_size: int = 32
    """Sequences a step, over all devices and hosts."""
    seq_len: int = 128
    """T: tokens a sequence."""
    seed: int = 0
    """From which initial weights, batches and dropout all follow."""
    accumulate: int = 0
    """Microbatches a step; the gradient is the same, the memory of activations smaller. A script decides on 0 by the
    devices: one, but on CPUs so many that each keeps 1,536 tokens, so that caches hold its arrays."""
    reduction: Literal["mean", "exact"] = "mean"
    """How gradients are added up. exact: in one order on every layout, so that parameters have the same bits."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the vocabulary."""
    z_loss: float = 1e-4
    """Weight of log²Z, which keeps the softmax normaliser near 1."""
    log_interval: int = 10
    """Steps between rows of metrics.jsonl."""
    eval_interval: int = 250
    """Steps between evaluations of the held-out text."""
    checkpoint_interval: int = 250
    """Steps between checkpoints. An evaluation better than the best one is saved too, at most once an interval."""
    check_interval: int = 250
    """Steps between comparisons of all replicas of the state, and of the data of all hosts."""
    keep: int = 3
    """How many of the newest checkpoints stay, beside the best one."""
    max_bad_steps: int = 5
    """Steps in a row with a loss or gradient that is not finite before the run stops."""

    def __post_init__(self):
        _require_choices(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            counts = field.type is int and field.name not in ("seed", "accumulate")
            _require(not counts or value >= 1, f"{field.name}={value} must be at least 1; try {field.default}")
        _require(0 <= self.seed < 2**31, f"seed={self.seed} must be in [0, 2^31); try 0")
        _require(self.accumulate >= 0, f"accumulate={self.accumulate} must not be negative; try 0")
        if self.accumulate:
            _require(
                self.batch_size % self.accumulate == 0,
                f"accumulate={self.accumulate} must divide batch_size={self.batch_size}; "
                f"try {_largest_divisor(self.batch_size, self.accumulate)}",
            )
        _require(0 <= self.label_smoothing < 1, f"label_smoothing={self.label_smoothing} must be in [0, 1); try 0.1")
        _require(self.z_loss >= 0, f"z_loss={self.z_loss} must not be negative; 0 is off")


TINY_CONFIG = TransformerConfig(mlp_dim=96)
NANO_CONFIG = TransformerConfig()
SMALL_CONFIG = TransformerConfig(embed_dim=512, num_layers=6, num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=2048)
BASE_CONFIG = TransformerConfig(embed_dim=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64, mlp_dim=2048)
LLAMA_1B_CONFIG = TransformerConfig(
    vocab_size=128_256, embed_dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64, mlp_dim=8192,
    rope_theta=500_000.0, rope_scaling=RopeScaling(kind="llama3", factor=32.0),
)  # fmt: skip
LLAMA_8B_CONFIG = TransformerConfig(
    vocab_size=128_256, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14_336,
    rope_theta=500_000.0, rope_scaling=RopeScaling(kind="llama3", factor=8.0), tie_embeddings=False,
)  # fmt: skip
PRESETS = {
    "tiny": TINY_CONFIG,
    "nano": NANO_CONFIG,
    "small": SMALL_CONFIG,
    "base": BASE_CONFIG,
    "llama-1b": LLAMA_1B_CONFIG,
    "llama-8b": LLAMA_8B_CONFIG,
}


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready values, nested configs as nested objects."""
    fields = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {name: config_to_dict(x) if dataclasses.is_dataclass(x) else x for name, x in fields}


def config_from_dict(values: dict[str, Any]) -> TransformerConfig:
    """The model config that `config_to_dict` wrote. Raises ValueError if a field is unknown or a rule is broken."""
    _refuse_unknown(values, TransformerConfig, "model config")
    scaling = values.get("rope_scaling") or {}
    _refuse_unknown(scaling, RopeScaling, "rope_scaling")
    return TransformerConfig(**{**values, "rope_scaling": RopeScaling(**scaling)})


def _refuse_unknown(values: dict[str, Any], kind: type, what: str) -> None:
    known = sorted(field.name for field in dataclasses.fields(kind))
    unknown = ", ".join(sorted(set(values) - set(known)))
    if unknown:
        raise ValueError(f"{what} has unknown field {unknown}; known are {', '.join(known)}")
