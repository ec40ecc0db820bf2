"""Where a plan goes, and the commands that it ends with."""

import dataclasses
import os
import shlex
from types import SimpleNamespace
from typing import Any

from parallax.config import PRESETS
from parallax.layer_config import LoraConfig
from parallelism.planning.hardware import machine
from parallelism.planning.planner import Choice
from parallelism.strategy import Layout
from scripts.planning.flags import Flags
from scripts.planning.report import commands, plan_file
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


def test_asking_whether_a_plan_can_be_written_changes_nothing(tmp_path):
    there, new = tmp_path / "plan.json", tmp_path / "plans" / "plan.json"
    there.write_text("a plan")
    for path in (there, new):
        assert plan_file(Flags(topology="v3-8", output=str(path)), "a.json") == path
    assert there.read_text() == "a plan"
    assert list(tmp_path.iterdir()) == [there]
    read, write = os.pipe()  # what a shell gives for >(a program)
    plan_file(Flags(topology="v3-8", output=f"/dev/fd/{write}"), "a.json")
    os.write(write, b"a plan")
    assert os.read(read, 10) == b"a plan"
    os.close(read)
    os.close(write)
