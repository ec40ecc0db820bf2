"""The commands that a plan ends with."""

import dataclasses
import shlex
from types import SimpleNamespace
from typing import Any

from parallax.config import PRESETS
from parallax.layer_config import LoraConfig
from parallelism.planning.hardware import machine
from parallelism.planning.planner import Choice
from parallelism.strategy import Layout
from scripts.planning.flags import Flags
from scripts.planning.report import commands
from scripts.training.flags import read_flags


def test_adapters_are_rehearsed_alone_and_trained_beside_a_run():
    lora = LoraConfig(rank=4, alpha=8.0, targets=("query", "value"))
    asked = Flags(topology="v3-8", model=dataclasses.replace(PRESETS["tiny"], lora=lora))
    layout = Layout(strategy="mesh", mesh="fsdp=8", batch_size=16, seq_len=128)
    row: Any = SimpleNamespace(choice=Choice(layout, {}, "full", "bfloat16"))
    command, rehearsal = commands(row, machine("v3-8"), asked)
    assert "--init-from RUN --strategy mesh" in command
    flags = read_flags(shlex.split(rehearsal)[3:])
    assert (flags.model.lora, flags.config, flags.mesh) == (lora, "tiny", "fsdp=8")
