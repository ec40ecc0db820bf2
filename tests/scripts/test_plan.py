"""What plan.py refuses, before it compiles anything, and the commands that it prints."""

import importlib.util
import json
import shlex

import jax
import pytest

from parallax.config import PRESETS, OptimizerConfig, RopeScaling
from parallelism.planning.compiler import Report
from parallelism.planning.planner import Choice
from parallelism.strategy import Layout
from scripts import plan
from scripts.planning import plan as planning
from scripts.planning.flags import Flags
from scripts.planning.report import run_command
from scripts.training.flags import read_flags
from tests.scripts.cases import read_cases

BAD = """
--topology v3-16 | topology='v3-16' | try v3-8
--topology gpu-8 | topology='gpu-8' | v5p | try v3-8
--config huge | huge | tiny
--batch-size 0 | batch_size=0 | try 32
--compile 0 | compile=0 | at least 1
--model.num-kv-heads 3 | num_kv_heads=3 | try 2
--config tiny | libtpu | not installed | pip install -e ".[plan]"
"""


@pytest.mark.parametrize(("args", "words"), read_cases(BAD))
def test_bad_input_gives_one_line_and_status_2(refuses, monkeypatch, args, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuses(plan, args, *words)


@pytest.fixture
def planned(call, monkeypatch):
    """Rows of a plan, with a fake of libtpu, which takes every program and says that it is small."""
    monkeypatch.setattr(planning, "topology_devices", lambda sliced: [])
    monkeypatch.setattr(planning, "compile_choice", lambda *_: Report(state_bytes=1, temporary_bytes=1, flops=1))

    def planned(*flags):
        given = ("--topology", "v4-16", "--batch-size", "16", *flags, "--output", "plan.json")
        status, _, err = call(plan, *given)
        assert status == 0, err
        with open("plan.json") as file:
            return json.load(file)["rows"]

    yield planned
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize("attention", ["blocks", "splash"])
def test_attention_that_needs_whole_sequences_is_planned_without_meshes_that_cut_them(attention, planned):
    rows = planned("--model.attention", attention)
    assert {row["attention"] for row in rows} == {attention}
    assert {row["axes"].get("sequence", 1) for row in rows} == {1}
    assert len({row["layout"] for row in rows}) > 5
    assert 2 in {row["axes"].get("sequence", 1) for row in planned()}


def test_an_exhaustive_plan_compiles_every_choice(planned):
    rows = planned("--exhaustive")
    assert {row["source"] for row in rows} == {"compiled"}
    tried = {(row["layout"], row["remat"], row["microbatches"]) for row in rows}
    assert len(tried) == len(rows)
    for layout in {row["layout"] for row in rows}:
        assert {remat for name, remat, _ in tried if name == layout} == {"none", "dots", "full"}
    # A device has two rows.
    assert {micro for name, _, micro in tried if name == "data=8"} == {1, 2}


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_command_gives_train_the_layout_and_every_change_of_model_and_optimizer(microbatches):
    layout = Layout(strategy="mesh", mesh="data=2,fsdp=2x2", accumulate=microbatches, batch_size=64, seq_len=32)
    changes = {"num_kv_heads": 2, "qk_norm": True, "rope_scaling": RopeScaling(kind="linear", factor=2.0)}
    config, optimizer = PRESETS["nano"].replace(**changes), OptimizerConfig(optimizer="muon", beta2=0.9)
    flags = Flags(config="nano", batch_size=64, seq_len=32, model=config, optimizer=optimizer)
    command = run_command(Choice(layout, {"data": 2, "fsdp": 4}, "full", "bfloat16"), flags)
    read = read_flags(shlex.split(command)[2:])
    assert read.model == config.replace(remat="full", dtype="bfloat16")
    assert read.learning == optimizer.settled(read.train.steps)
    assert (read.strategy, read.mesh, read.config) == ("mesh", "data=2,fsdp=2x2", "nano")
    assert (read.train.batch_size, read.train.seq_len, read.train.accumulate) == (64, 32, microbatches)
