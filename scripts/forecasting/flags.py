"""The flags of ladder.py's commands.

Invariant: where train.py or plan.py has the same flag, it means the same.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro

from parallax.config import PRESETS, OptimizerConfig, TrainConfig, TransformerConfig
from scripts.training.flags import Preset

OF_A_RUN = ("steps", "eval_interval", "checkpoint_interval", "keep", "schedule_steps")
"""What a ladder chooses for each of its runs."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class DesignFlags:
    output: str = ""
    """The ladder's folder, which is made; needed."""
    dataset: str = "tiny_shakespeare"
    """As train.py's."""
    data_dir: str | None = None
    """Folder to look for the data set in; by default PARALLAX_DATA_DIR."""
    tokenizer: str | None = None
    """char (the default), byte, or bpe[:VOCABULARY], trained on the data set."""
    packing: Literal["concat", "best-fit", "whole", "none"] | None = None
    """How documents of a store fill rows."""
    held_out: str | None = None
    """Evaluate on what this store, or mixture, holds out, and on nothing of --dataset."""
    eval_tokens: int = 2**17
    """Tokens of an evaluation, at the most: the same ones for all runs, however long they are."""
    config: Preset = "tiny"
    """Preset of the target, the model whose loss is to be known; --model.* flags change it."""
    minutes: float | None = None
    """How long all runs may take on this machine, by steps that are timed now."""
    flops: float | None = None
    """Operations of all runs, in place of --minutes."""
    sizes: int = 4
    """How many sizes of the model, each about √2 as wide as the one before."""
    largest: float = 0.5
    """Width of the largest of them, as a share of the target's."""
    lengths: int = 3
    """How many numbers of tokens each size learns from, each twice the one before."""
    seeds: int = 2
    """Runs of each, from other initial weights and batches: what these do to a size, one seed alone does not show."""
    parametrization: Literal["mup", "standard"] = "mup"
    """mup: made so that one rate serves all sizes and the target; its base is the smallest size, unless --model says
    another."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()
    learning: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()
    model: Annotated[TransformerConfig, tyro.conf.FlagConversionOff] = PRESETS["tiny"]

    def __post_init__(self):
        for name in ("minutes", "flops"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, f"{name}={value} must be positive; try --minutes 20")
        _require(self.eval_tokens >= 1, f"eval_tokens={self.eval_tokens} must be at least 1; try 131072")
        _require(self.sizes >= 3, f"sizes={self.sizes} must be at least 3; try 4")
        _require(self.lengths >= 3, f"lengths={self.lengths} must be at least 3; try 4")
        _require(self.seeds >= 1, f"seeds={self.seeds} must be at least 1; try 1")
        _require(0 < self.largest <= 1, f"largest={self.largest} must be in (0, 1]; try 0.5")

    def check_whole(self) -> None:
        """Raises ValueError unless there are an output and one budget, which a default of these flags lacks."""
        _require(bool(self.output), "a ladder needs a folder; try --output ladder")
        _require((self.minutes is None) != (self.flops is None), "give either --minutes or --flops; try --minutes 20")
        for config in (self.train, self.learning):
            for field in dataclasses.fields(config):
                value, flag = getattr(config, field.name), field.name.replace("_", "-")
                chosen = field.name in OF_A_RUN and value != field.default
                _require(not chosen, f"--{flag} {value} differs by run; leave it to the ladder")


@dataclasses.dataclass(frozen=True)
class LadderFlags:
    ladder: tyro.conf.Positional[Path]
    """The folder that design made."""


@dataclasses.dataclass(frozen=True)
class RunFlags(LadderFlags):
    only: tuple[str, ...] = ()
    """Names of the runs to train, by default all; of several hosts each takes its own."""


@dataclasses.dataclass(frozen=True)
class FitFlags(LadderFlags):
    without: tuple[str, ...] = ()
    """Names of runs to leave out, such as those of a size that is too small for the law of the others."""


@dataclasses.dataclass(frozen=True)
class ForecastFlags(LadderFlags):
    tokens: float
    """That the run learns from, such as 20e9."""
    config: Preset | None = None
    """Preset of the model, with the ladder's vocabulary and parametrization; by default the ladder's target."""
    share: float = 1.0
    """Size of the model, as a share of the width of that."""
    topology: str | None = None
    """A machine, as plan.py's; then hours and money come with the loss."""
    batch_size: int | None = None
    """Sequences a step there, by default 256."""
    seq_len: int | None = None
    """Tokens a sequence there; by default the ladder's."""
    price: float | None = None
    """US dollars for a chip or card and an hour, in place of the list price."""
    register: Path | None = None
    """A run folder that is not there yet: the forecast is written into it, and train.py holds the run against it."""
    without: tuple[str, ...] = ()
    """Names of runs to leave out of the fit, as for `fit`."""
    level: float = 0.8
    """Probability that the interval holds the loss."""
    output: Path | None = None
    """Where forecast.json and forecast.png go; by default the ladder's folder."""

    def __post_init__(self):
        _require(0 < self.tokens < math.inf, f"tokens={self.tokens} must be positive; try 1e9")
        _require(0 < self.share <= 1000, f"share={self.share} must be positive and at most 1000; try 1")
        _require(0 < self.level < 1, f"level={self.level} must be between 0 and 1; try 0.8")
        for name in ("batch_size", "seq_len"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name}={value} must be at least 1; try 256")
        price = self.price is None or 0 <= self.price < math.inf
        _require(price, f"price={self.price} must be 0 or more; try 1.20")
        for name in ("batch_size", "seq_len", "price"):
            of_machine = getattr(self, name) is not None and self.topology is None
            _require(not of_machine, f"--{name.replace('_', '-')} needs a machine; add --topology v5litepod-64")


@dataclasses.dataclass(frozen=True)
class CheckFlags:
    output: Path
    """Where coordinates.json and coordinates.png go."""
    config: Preset = "tiny"
    """Preset of the family; --model.* flags change it."""
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """embed_dim of its members, of which the first is the base of µP."""
    steps: tuple[int, ...] = (1, 5, 10)
    """After how many of them activations are measured."""
    batch_size: int = 1
    seq_len: int = 4
    """Tokens that are learned; few by the smallest width, see `check`."""
    runs: int = 16
    """Of the smallest width, from other initial values and batches, over which squares are averaged; of the others
    fewer, by as much as they are wider."""
    seed: int = 0
    parametrization: Literal["mup", "standard"] = "mup"
    learning: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()
    model: Annotated[TransformerConfig, tyro.conf.FlagConversionOff] = PRESETS["tiny"]

    def __post_init__(self):
        _require(len(self.widths) >= 2, f"widths={self.widths} must be at least two; try 64 256")
        for width in self.widths:
            K = self.model.head_dim
            _require(width >= K and width % K == 0, f"width {width} must be a multiple of head_dim={K}; try {4 * K}")
        ascend = self.steps == tuple(sorted({*self.steps})) and min(self.steps, default=0) >= 1
        _require(ascend, f"steps={self.steps} must ascend from at least 1; try 1 5 10")
        tokens, V = self.batch_size * (self.seq_len + 1), self.model.vocab_size
        _require(tokens <= V, f"batch_size={self.batch_size} needs {tokens} tokens of {V} that differ; try 1")
        _require(self.runs >= 1, f"runs={self.runs} must be at least 1; try 16")

    def runs_of(self, width: int) -> int:
        """So many that all widths have as many coordinates."""
        return max(1, round(self.runs * self.widths[0] / width))


@dataclasses.dataclass(frozen=True)
class TuneFlags(LadderFlags):
    rates: tuple[float, ...] = tuple(2.0**power for power in range(-11, -4))
    """Learning rates to choose from."""
    batch_sizes: tuple[int, ...] = ()
    """Sequences a step to choose from, with as many tokens in all; by default the ladder's."""
    weight_decays: tuple[float, ...] = ()
    """Weight decays to choose from; by default the ladder's."""
    keep: float = 0.5
    """Share of the settings that goes on to twice the steps."""

    def __post_init__(self):
        _require(len(self.rates) >= 1 and min(self.rates) > 0, f"rates={self.rates} must be positive; try 1e-3 2e-3")
        _require(min(self.batch_sizes, default=1) >= 1, f"batch_sizes={self.batch_sizes} must be at least 1; try 16 32")
        _require(0 < self.keep < 1, f"keep={self.keep} must be between 0 and 1; try 0.5")
