"""What a model is and how it learns, as frozen values.

Invariant: a config that exists is valid, since every rule is checked at construction.
"""

import dataclasses
import math
from typing import Literal, get_args

import chex

from parallax.rope_scaling import RopeScaling


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@chex.dataclass(frozen=True)
class TransformerConfig:
    """The shape of a decoder-only Transformer. Sizes are counts, not bytes.

    Raises:
      ValueError: a rule is broken; the message names the rule, the value and a remedy.
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
    """K: width of a head; even, since rotary embeddings turn pairs."""
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
    attention: Literal["auto", "xla", "blocks", "splash"] = "auto"
    """How training computes attention: all scores by XLA, or skipping what is masked: blocks by XLA, splash by a kernel
    for TPU. A script decides on auto by the devices; the model itself takes it for xla."""
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    """How training goes through the layers: scan compiles one block, whatever the depth, and stacks what the way back
    needs; unroll compiles each, and stacks nothing. A script decides on auto by the devices; the model itself scans."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or whole blocks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters stay float32."""

    def __post_init__(self):
        sizes = {"vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            holds = field.name not in sizes or value >= 1
            _require(holds, f"{field.name}={value} must be at least 1; try {field.default}")
            values = get_args(field.type)  # of a Literal
            _require(
                not values or value in values, f"{field.name}={value!r} is not one of {', '.join(values)}"
            )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; "
            f"try {_largest_divisor(self.num_heads, self.num_kv_heads)}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even; try {self.head_dim + 1}")
        _require(self.max_seq_len >= 1, f"max_seq_len={self.max_seq_len} must be at least 1; try 8192")
        _require(0 <= self.dropout_rate < 1, f"dropout_rate={self.dropout_rate} must lie in [0, 1); try 0.1")
        _require(
            self.attention not in ("blocks", "splash") or not self.dropout_rate,
            f"attention={self.attention} drops no weights, and dropout_rate={self.dropout_rate}; try attention xla",
        )
        _require(
            self.layer_loop != "unroll" or self.remat == "none",
            f"layer_loop=unroll keeps what remat={self.remat} would compute again; try scan",
        )
        _require(self.rope_theta > 1, f"rope_theta={self.rope_theta} must be above 1; try 10000")
        _require(self.norm_eps > 0, f"norm_eps={self.norm_eps} must be positive; try 1e-5")
        _require(
            self.sliding_window >= 0, f"sliding_window={self.sliding_window} must not be negative; 0 is off"
        )
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
    final_rate: float = 0.1
    """The cosine ends at this share of the peak rate."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases are never decayed."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    """Largest global norm of the averaged gradient; 0 leaves it."""

    def __post_init__(self):
        _require(
            self.optimizer in ("adamw", "muon"), f"optimizer={self.optimizer!r} is not one of adamw, muon"
        )
        _require(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive; try 1e-3")
        _require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"warmup_steps={self.warmup_steps} must not be negative; try 100",
        )
        _require(0 <= self.final_rate <= 1, f"final_rate={self.final_rate} must lie in [0, 1]; try 0.1")
        _require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative; try 0.1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name}={value} must lie in [0, 1); try 0.9")
        _require(self.clip_norm >= 0, f"clip_norm={self.clip_norm} must not be negative; 0 is off")


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
    devices: one, but on CPUs, without dropout, so many that each keeps 1,536 tokens, so that caches hold its arrays."""
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
    """Steps between checkpoints."""
    check_interval: int = 250
    """Steps between comparisons of all replicas of the state, and of the data of all hosts."""
    keep: int = 3
    """How many of the newest checkpoints stay, beside the best one."""
    max_bad_steps: int = 5
    """Steps in a row with a loss or gradient that is not finite before the run stops."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            counts = field.type is int and field.name not in ("seed", "accumulate")
            _require(
                not counts or value >= 1, f"{field.name}={value} must be at least 1; try {field.default}"
            )
        _require(0 <= self.seed < 2**31, f"seed={self.seed} must lie in [0, 2^31); try 0")
        _require(
            self.reduction in ("mean", "exact"), f"reduction={self.reduction!r} is not one of mean, exact"
        )
        _require(self.accumulate >= 0, f"accumulate={self.accumulate} must not be negative; try 0")
        if self.accumulate:
            _require(
                self.batch_size % self.accumulate == 0,
                f"accumulate={self.accumulate} must divide batch_size={self.batch_size}; "
                f"try {_largest_divisor(self.batch_size, self.accumulate)}",
            )
        _require(
            0 <= self.label_smoothing < 1,
            f"label_smoothing={self.label_smoothing} must lie in [0, 1); try 0.1",
        )
        _require(self.z_loss >= 0, f"z_loss={self.z_loss} must not be negative; 0 is off")


TINY_CONFIG = TransformerConfig(mlp_dim=96)
NANO_CONFIG = TransformerConfig()
SMALL_CONFIG = TransformerConfig(
    embed_dim=512, num_layers=6, num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=2048
)
BASE_CONFIG = TransformerConfig(
    embed_dim=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64, mlp_dim=2048
)
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
