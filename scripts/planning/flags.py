"""The flags of plan.py.

Invariant: where train.py has the same flag, it means the same.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro

from parallax.config import PRESETS, OptimizerConfig, TransformerConfig
from parallax.interop.folders import read_config
from parallelism.planning.hardware import machine
from scripts.common.command_line import Switch, flag_value
from scripts.planning.maxtext import MaxText, read_maxtext
from scripts.planning.search import MAX, What
from scripts.training.flags import Preset, preset_of

DESCRIPTION = """Choose a layout for TPUs or GPUs, without one. Every legal mesh, rematerialisation and number of
microbatches is ranked by an analytic model; the best are compiled by the machine's own compiler."""


@dataclasses.dataclass(frozen=True)
class Flags:
    topology: str = "v3-8"
    """The slice, by the name one rents it: v3-8, v4-64, v5litepod-256, v5p-512, v6e-256, tpu7x-128 …; several of them
    as 2xv5litepod-256; or GPUs by card and number, such as h100-64."""
    config: Preset = "tiny"
    """Preset of the model; --model.* flags change it."""
    hf: str | None = None
    """A Hugging Face folder or its config.json, whose model is planned for instead."""
    maxtext: str | None = None
    """A MaxText config, whose model, batch, length and dtype are planned for, beside its own layout. Words of the form
    key=value behind it count more than the file."""
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()
    """key=value for --maxtext."""
    batch_size: int | Literal["max"] = 256
    """Sequences a step, over all devices; max finds the most that each layout fits, without microbatches."""
    seq_len: int | Literal["max"] = 128
    """Tokens a sequence; max finds the most that each layout fits, up to --model.max-seq-len."""
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
    compare: str | None = None
    """Machines instead of --topology, such as v5litepod-256,v6e-64,h100-64: the best plan of each, ranked by time and
    by money to --tokens."""
    compile: int = 8
    """How many layouts to compile, the best first, and pmap if it may fit."""
    exhaustive: Switch = False
    """Compile every layout that may fit."""
    output: str | None = None
    """The plan as JSON; by default plans/TOPOLOGY-CONFIG-BATCHxLENGTH.json."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()
    model: Annotated[TransformerConfig, tyro.conf.FlagConversionOff] = PRESETS["tiny"]

    @property
    def name(self) -> str:
        """Of the model, for a person to read."""
        path = Path(self.hf or self.maxtext or self.config)
        path = path if path.name else path.resolve()
        return path.parent.resolve().name if path.name == "config.json" else path.name.removesuffix(".yml")

    @property
    def compared(self) -> list[str]:
        """The machines of --compare."""
        return self.compare.split(",") if self.compare else []

    @property
    def sought(self) -> What | None:
        """The size of which each layout's largest is wanted."""
        return "batch_size" if self.batch_size == MAX else "seq_len" if self.seq_len == MAX else None

    def __post_init__(self):
        if self.hf and self.maxtext:
            raise ValueError(f"--hf {self.hf} does not go with --maxtext {self.maxtext}; leave one out")
        if self.overrides and not self.maxtext:
            raise ValueError(f"{self.overrides[0]!r} is a word for --maxtext alone; see --help")
        if unread := [word for word in self.overrides if "=" not in word]:
            raise ValueError(f"{unread[0]!r} behind --maxtext must be a key=value; try max_target_length=2048")
        if self.batch_size == MAX and self.seq_len == MAX:
            raise ValueError("batch_size=max with seq_len=max has no largest pair; give a number for one of the two")
        for flag in ("exhaustive", "maxtext"):
            if self.sought and getattr(self, flag):
                raise ValueError(f"{self.sought}=max does not go with --{flag}; leave one out")
        if self.compare is not None:
            self._check_compared(self.compared)
        if self.compile < 1:
            raise ValueError(f"compile={self.compile} must be at least 1; try 8")
        if self.tokens is not None and not 0 < self.tokens < math.inf:
            raise ValueError(f"tokens={self.tokens} must be positive; try 1e9")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ValueError(f"price={self.price} must be 0 or more; try 1.20")

    def _check_compared(self, names: list[str]) -> None:
        if self.tokens is None:
            raise ValueError(f"--compare {self.compare} needs the tokens of the run; try --tokens 1e9")
        if self.maxtext:
            raise ValueError("--compare does not go with --maxtext, whose batch depends on the machine; leave one out")
        if len(set(names)) != len(names) or len(names) < 2:
            raise ValueError(f"compare={self.compare} must name machines, each once; try v5litepod-256,h100-64")
        if self.output and Path(self.output).suffix == ".png":
            other = Path(self.output).with_suffix(".json")
            raise ValueError(f"--output {self.output} is what --compare names its drawing; try --output {other}")
        for name in names:
            machine(name)


def first_flags(args: list[str]) -> tuple[Flags, MaxText | None]:
    """What the flags change: a preset, or the model of somebody else, with the batch that MaxText gives it.

    Raises ValueError if the file is none, or its model is none that can be planned.
    """
    if flag_value(args, "--compare") and (topology := flag_value(args, "--topology")):
        raise ValueError(f"--topology {topology} does not go with --compare, which names all machines; leave one out")
    if source := flag_value(args, "--hf"):
        _refuse_preset(args, "--hf")
        return Flags(model=read_config(Path(source))), None
    if source := flag_value(args, "--maxtext"):
        _refuse_preset(args, "--maxtext")
        asked = read_maxtext(source, [word for word in args if "=" in word and not word.startswith("-")])
        devices = machine(flag_value(args, "--topology") or Flags.topology).devices
        batch_size = round(asked.per_device * devices * asked.accumulate)
        return Flags(model=asked.model, batch_size=batch_size, seq_len=asked.seq_len, dtype=asked.dtype), asked
    return Flags(model=preset_of(args)), None


def _refuse_preset(args: list[str], flag: str) -> None:
    if preset := flag_value(args, "--config"):
        raise ValueError(f"--config {preset} does not go with {flag}, which brings its own model; leave one out")
