"""What a model is and how it learns, as frozen values, and as the plain values that config.json holds.

Invariant: a config that exists is valid, since every rule is checked at construction; one that went out as plain values
and came in again is equal to what it was.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import chex

from parallax.layer_config import ExpertsConfig, LayerSpec, LoraConfig, RopeScaling, require, require_choices
from parallax.parametrization import Parametrization


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
    experts: ExpertsConfig = ExpertsConfig()
    lora: LoraConfig = LoraConfig()
    parametrization: Parametrization = Parametrization()
    max_seq_len: int = 8192
    """Longest sequence the model accepts, in tokens."""
    dropout_rate: float = 0.0
    """Probability of dropping a value after the embedding, in attention and before each residual sum."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    norms: Literal["before", "after", "both"] = "before"
    """Where a block normalises: what its branches read, what they add to the residual stream, or both."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Of the gate of the feed-forward, and of experts unless they have a clamp."""
    embedding_scale: float = 1.0
    """By what embeddings are multiplied when they are looked up."""
    attention_bias: bool = False
    """Whether the query, key and value projections add a bias."""
    attention_out_bias: bool = False
    """Whether the output projection of attention adds a bias."""
    tie_embeddings: bool = True
    """Whether the output embedding is the input embedding."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalised before the rotation."""
    qk_norm_over: Literal["head", "heads"] = "head"
    """Over what that norm takes its mean: each head, or all heads at once."""
    attention_scale: float = 0.0
    """By what scores are multiplied; 0 stands for 1/√K."""
    attention_softcap: float = 0.0
    """Squash scores to ±this by a tanh; 0 leaves them."""
    attention_sinks: bool = False
    """Whether each head has a learned score that takes weight from all keys."""
    sliding_window: int = 0
    """How many tokens back attention sees, itself included; 0 sees them all."""
    logit_softcap: float = 0.0
    """Squash logits to ±this by a tanh; 0 leaves them."""
    feed_forward: Literal["auto", "dense", "experts"] = "auto"
    """What follows attention: one network for all tokens, or experts that a router chooses; auto: experts if any."""
    pattern: tuple[LayerSpec, ...] = ()
    """In what layers differ, one after another: the first of them stands for a layer, the next for the layer behind it,
    and behind the last it begins again. Without any, all layers are alike."""
    first_layers: tuple[LayerSpec, ...] = ()
    """In what the first layers differ; the pattern begins behind them."""
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
        require_choices(self)
        sizes = {"vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            holds = field.name not in (*sizes, "max_seq_len") or value >= 1
            require(holds, f"{field.name}={value} must be at least 1; try {field.default}")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; "
            f"try {_largest_divisor(self.num_heads, self.num_kv_heads)}",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even; try {self.head_dim + 1}")
        require(0 <= self.dropout_rate < 1, f"dropout_rate={self.dropout_rate} must be in [0, 1); try 0.1")
        require(
            self.attention != "cudnn" or not (self.attention_softcap or self.attention_sinks),
            f"attention={self.attention} has neither soft caps nor sinks, and attention_softcap="
            f"{self.attention_softcap}, attention_sinks={self.attention_sinks}; try blocks",
        )
        require(
            self.attention not in ("blocks", "splash", "cudnn") or not self.dropout_rate,
            f"attention={self.attention} drops no weights, and dropout_rate={self.dropout_rate}; try xla",
        )
        require(
            self.layer_loop != "unroll" or self.remat == "none",
            f"layer_loop=unroll keeps what remat={self.remat} would compute again; try scan",
        )
        require(1 < self.rope_theta < math.inf, f"rope_theta={self.rope_theta} must be finite and above 1; try 10000")
        require(0 < self.norm_eps < math.inf, f"norm_eps={self.norm_eps} must be finite and positive; try 1e-5")
        require(0 <= self.sliding_window < 2**31, f"sliding_window={self.sliding_window} must be in [0, 2^31); try 0")
        for name in ("logit_softcap", "attention_softcap", "attention_scale"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name}={value} must be finite and not negative; 0 is off")
        scale = self.embedding_scale
        require(0 < scale < math.inf, f"embedding_scale={scale} must be finite and positive; try 1")
        first = len(self.first_layers)
        require(
            first <= self.num_layers,
            f"first_layers of {first} layers must not exceed num_layers={self.num_layers}; give fewer",
        )
        for spec in (*self.first_layers, *self.pattern):
            self._of(spec)  # which checks it
        require(
            self.feed_forward != "experts" or self.experts.num_experts > 0,
            f"feed_forward=experts needs experts, and experts.num_experts={self.experts.num_experts}; try 8",
        )

    @property
    def table_rows(self) -> int:
        """W: V rounded up to a multiple of 8, so that 2, 4 or 8 devices can share an embedding table.

        No token has an id of the rows beyond V, and their logits are masked.
        """
        return -(-self.vocab_size // 8) * 8

    @property
    def layers(self) -> tuple["TransformerConfig", ...]:
        """The config of each layer, as of a model in which all were like it."""
        return _layers(self)

    @property
    def period(self) -> int:
        """After how many layers the pattern begins again."""
        return max(1, len(self.pattern))

    def _of(self, spec: LayerSpec) -> "TransformerConfig":
        alone: dict[str, Any] = {"pattern": (), "first_layers": ()} | spec.given()
        if self.feed_forward == "auto":
            alone.setdefault("feed_forward", "experts" if self.experts.num_experts else "dense")
        return dataclasses.replace(self, **alone)

    @property
    def expert_dim(self) -> int:
        """Hidden width of one expert."""
        return self.experts.mlp_dim or self.mlp_dim

    def num_params(self, *, active: bool = False) -> int:
        """Count of the parameters but adapters, from the sizes alone; equals the count of the initialised tree without
        them. If `active`, only as many experts are counted as a token goes to."""
        tables = 1 if self.tie_embeddings else 2
        outside = tables * self.table_rows * self.embed_dim + self.embed_dim
        return sum(layer._layer_params(active) for layer in self.layers) + outside

    def _layer_params(self, active: bool) -> int:
        """Parameters of one layer that is as this config says."""
        heads = self.num_heads + 2 * self.num_kv_heads
        attention = self.embed_dim * self.head_dim * (heads + self.num_heads)
        attention += heads * self.head_dim if self.attention_bias else 0
        attention += self.embed_dim if self.attention_out_bias else 0
        normed_heads = 2 if self.qk_norm_over == "head" else self.num_heads + self.num_kv_heads
        attention += normed_heads * self.head_dim if self.qk_norm else 0
        attention += self.num_heads if self.attention_sinks else 0
        fed = 3 * self.embed_dim * self.mlp_dim
        if self.feed_forward == "experts":
            experts, biases = self.experts, self.experts.bias
            one = 3 * self.embed_dim * self.expert_dim + biases * (2 * self.expert_dim + self.embed_dim)
            router = experts.num_experts * (self.embed_dim + biases + (experts.balance_bias_rate > 0))
            fed = (experts.experts_per_token if active else experts.num_experts) * one + router
            fed += 3 * self.embed_dim * experts.shared_mlp_dim
        norms = 4 if self.norms == "both" else 2
        return attention + fed + norms * self.embed_dim


@functools.lru_cache(maxsize=256)
def _layers(config: TransformerConfig) -> tuple[TransformerConfig, ...]:
    first, pattern = config.first_layers, config.pattern or (LayerSpec(),)
    behind = (pattern[number % len(pattern)] for number in range(config.num_layers - len(first)))
    specs = (*first, *behind)
    of = {spec: config._of(spec) for spec in set(specs)}
    return tuple(of[spec] for spec in specs)


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
        require_choices(self)
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive; try 1e-3")
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"warmup_steps={self.warmup_steps} must not be negative; try 100",
        )
        require(
            self.schedule_steps is None or self.schedule_steps >= 1,
            f"schedule_steps={self.schedule_steps} must be at least 1; try 1000",
        )
        require(0 <= self.final_rate <= 1, f"final_rate={self.final_rate} must be in [0, 1]; try 0.1")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative; try 0.1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value} must be in [0, 1); try 0.9")
        require(self.clip_norm >= 0, f"clip_norm={self.clip_norm} must not be negative; 0 is off")

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
        require_choices(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            counts = field.type is int and field.name not in ("seed", "accumulate")
            require(not counts or value >= 1, f"{field.name}={value} must be at least 1; try {field.default}")
        require(0 <= self.seed < 2**31, f"seed={self.seed} must be in [0, 2^31); try 0")
        require(self.accumulate >= 0, f"accumulate={self.accumulate} must not be negative; try 0")
        if self.accumulate:
            require(
                self.batch_size % self.accumulate == 0,
                f"accumulate={self.accumulate} must divide batch_size={self.batch_size}; "
                f"try {_largest_divisor(self.batch_size, self.accumulate)}",
            )
        require(0 <= self.label_smoothing < 1, f"label_smoothing={self.label_smoothing} must be in [0, 1); try 0.1")
        require(self.z_loss >= 0, f"z_loss={self.z_loss} must not be negative; 0 is off")


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
GEMMA3_4B_CONFIG = TransformerConfig(
    vocab_size=262_208, embed_dim=2560, num_layers=34, num_heads=8, num_kv_heads=4, head_dim=256, mlp_dim=10_240,
    rope_theta=1_000_000.0, rope_scaling=RopeScaling(kind="linear", factor=8.0), norm_eps=1e-6, norms="both",
    qk_norm=True, activation="gelu_tanh", embedding_scale=2560**0.5,
    pattern=5 * (LayerSpec(sliding_window=1024, rope_theta=10_000.0, rope_scaling=RopeScaling()),) + (LayerSpec(),),
)  # fmt: skip
_EIGHT = ExpertsConfig(num_experts=8, balance_loss=0.01, router_z_loss=1e-3)
NANO_MOE_CONFIG = TransformerConfig(mlp_dim=176, experts=_EIGHT)
MIXTRAL_8X7B_CONFIG = TransformerConfig(
    vocab_size=32_000, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14_336,
    rope_theta=1e6, tie_embeddings=False, experts=ExpertsConfig(num_experts=8, balance_loss=0.01),
)  # fmt: skip
QWEN3_30B_A3B_CONFIG = TransformerConfig(
    vocab_size=151_936, embed_dim=2048, num_layers=48, num_heads=32, num_kv_heads=4, head_dim=128, mlp_dim=6144,
    rope_theta=1e6, norm_eps=1e-6, qk_norm=True, tie_embeddings=False,
    experts=ExpertsConfig(num_experts=128, experts_per_token=8, mlp_dim=768, balance_loss=0.001),
)  # fmt: skip
GPT_OSS_20B_CONFIG = TransformerConfig(
    vocab_size=201_088, embed_dim=2880, num_layers=24, num_heads=64, num_kv_heads=8, head_dim=64, mlp_dim=2880,
    rope_theta=150_000.0, attention_bias=True, attention_out_bias=True, attention_sinks=True, tie_embeddings=False,
    rope_scaling=RopeScaling(kind="yarn", factor=32.0, original_max_seq_len=4096, whole_ends=False),
    pattern=(LayerSpec(sliding_window=128), LayerSpec()),
    experts=ExpertsConfig(num_experts=32, experts_per_token=4, bias=True, clamp=7.0, balance_loss=0.001),
)  # fmt: skip
PRESETS = {
    "tiny": TINY_CONFIG,
    "nano": NANO_CONFIG,
    "small": SMALL_CONFIG,
    "base": BASE_CONFIG,
    "llama-1b": LLAMA_1B_CONFIG,
    "llama-8b": LLAMA_8B_CONFIG,
    "gemma3-4b": GEMMA3_4B_CONFIG,
    "nano-moe": NANO_MOE_CONFIG,
    "mixtral-8x7b": MIXTRAL_8X7B_CONFIG,
    "qwen3-30b-a3b": QWEN3_30B_A3B_CONFIG,
    "gpt-oss-20b": GPT_OSS_20B_CONFIG,
}


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready values, nested configs as nested objects; of a LayerSpec what it gives."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: _plain(x) for name, x in (config.given() if isinstance(config, LayerSpec) else fields).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return config_to_dict(value) if dataclasses.is_dataclass(value) else value


def config_from_dict(values: dict[str, Any]) -> TransformerConfig:
    """The model config that `config_to_dict` wrote. Raises ValueError if a field is unknown or a rule is broken."""
    _refuse_unknown(values, TransformerConfig, "model config")
    for name in ("rope_scaling", "experts", "lora", "parametrization"):
        values = values | {name: _nested(values, name, type(getattr(TransformerConfig, name)))}
    for name in ("pattern", "first_layers"):
        specs = values.get(name) or ()
        require(isinstance(specs, list | tuple), f"{name}={specs!r} must be a list of layers; restore the file")
        values[name] = tuple(map(_layer_from_dict, specs))
    return TransformerConfig(**values)


def _layer_from_dict(values: dict[str, Any]) -> LayerSpec:
    _refuse_unknown(values, LayerSpec, "layer of a pattern")
    given = {} if values.get("rope_scaling") is None else {"rope_scaling": _nested(values, "rope_scaling", RopeScaling)}
    return LayerSpec(**values | given)


def _nested(values: dict[str, Any], name: str, kind: type) -> Any:
    given = values.get(name) or {}
    _refuse_unknown(given, kind, name)
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def _refuse_unknown(values: Any, kind: type, what: str) -> None:
    require(isinstance(values, dict), f"{what} must be an object, and is {values!r}; restore the file")
    known = sorted(field.name for field in dataclasses.fields(kind))
    unknown = ", ".join(sorted(set(values) - set(known)))
    require(not unknown, f"{what} has unknown field {unknown}; known are {', '.join(known)}")
