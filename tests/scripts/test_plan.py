"""What plan.py refuses, before it compiles anything, and the commands that it prints."""

import dataclasses
import importlib.util
import json
import shlex
from unittest.mock import Mock

import jax
import pytest

from parallax.config import PRESETS, OptimizerConfig, RopeScaling
from parallelism.planning.compiler import Report
from parallelism.planning.planner import Choice
from parallelism.strategy import Layout
from scripts import plan
from scripts.planning import compare as comparing
from scripts.planning import plan as planning
from scripts.planning.flags import Flags, first_flags
from scripts.planning.prices import price_of
from scripts.planning.report import run_command
from scripts.training.flags import read_flags
from tests.scripts.cases import read_cases

BAD = """
--topology v3-16 | topology='v3-16' | try v3-8
--topology gpu-8 | topology='gpu-8' | v5p | try v3-8
--config huge | huge | tiny
--mesh data=16 | Unrecognized options: --mesh | see --help
--batch-size 0 | batch_size=0 | try 32
--compile 0 | compile=0 | at least 1
--tokens 0 | tokens=0 | must be positive | try 1e9
--tokens inf | tokens=inf | try 1e9
--tokens many | many | see --help
--price -1 | price=-1 | try 1.20
--price nan | price=nan | try 1.20
--hf missing | missing must be a JSON file
--hf . | config.json must be a JSON file
--hf missing --config nano | --config nano does not go with --hf | leave one out
--maxtext missing.yml | missing.yml cannot be read | choose a .yml file
--maxtext missing.yml --hf missing | missing
--maxtext . | . cannot be read | choose a .yml file
seq=3 | 'seq=3' is a word for --maxtext alone | see --help
--topology h100-7 | topology='h100-7' | try h100-8
--topology h900-8 | topology='h900-8' | h100 | b200
--topology h100-8 | jax_plugins.xla_cuda13 | not installed | pip install -e ".[plan-gpu]"
--batch-size max --seq-len max | no largest pair | give a number
--batch-size max --exhaustive | batch_size=max does not go with --exhaustive | leave one out
--batch-size many | batch-size | max
--seq-len 0 | seq_len=0 | try 128
--seq-len 9000 | seq_len=9000 must not exceed max_seq_len=8192 | try --seq-len 8192
--compare v4-8,h100-8 | needs the tokens of the run | try --tokens 1e9
--compare v4-8,h100-7 --tokens 1e9 | topology='h100-7' | try h100-8
--compare v4-8,z9-3 --tokens 1e9 | topology='z9-3' | try v3-8
--compare , --tokens 1e9 | compare=, must name machines
--compare v4-8 --tokens 1e9 | must name machines, each once | try v5litepod-256,h100-64
--compare v4-8,v4-8 --tokens 1e9 | must name machines, each once
--compare v4-8,h100-8 --topology v4-8 --tokens 1e9 | --topology v4-8 does not go with --compare | leave one out
--compare v4-8,h100-8 --tokens 1e9 --output a.png | --output a.png is what --compare names its drawing | a.json
--topology v4-8 --output . | --output . cannot be written: Is a directory | choose another
--topology v4-8 --output /dev/null/plan.json | /dev/null/plan.json cannot be written: Not a directory | choose another
--model.num-kv-heads 3 | num_kv_heads=3 | try 2
--config tiny | libtpu | not installed | pip install -e ".[plan]"
"""


@pytest.mark.parametrize(("args", "words"), read_cases(BAD))
def test_bad_input_gives_one_line_and_status_2(refuses, monkeypatch, args, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuses(plan, args, *words)


def test_a_compiler_that_is_missing_is_found_before_another_has_begun(refuses, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Mock() if name == "libtpu" else None)
    monkeypatch.setattr(planning, "topology_devices", Mock(side_effect=NotImplementedError))
    refuses(plan, ["--compare", "v4-8,h100-8", "--tokens", "1e9"], "jax_plugins.xla_cuda13", "not installed")


@pytest.fixture
def planned(call, monkeypatch):
    """Rows of a plan, with a fake of libtpu, which takes every program and says that it is small."""
    monkeypatch.setattr(planning, "topology_devices", lambda sliced: [])
    monkeypatch.setattr(comparing, "check_compiler", lambda sliced: None)
    monkeypatch.setattr(planning, "compile_choice", lambda *_: Report(state_bytes=1, temporary_bytes=1, flops=1))

    def planned(*flags):
        given = ("--topology", "v4-16", "--batch-size", "16", *flags, "--output", "plan.json")
        status, _, err = call(plan, *given)
        assert status == 0, err
        with open("plan.json") as file:
            return json.load(file)["rows"]

    yield planned
    jax.config.update("jax_enable_compilation_cache", True)


def test_attention_that_needs_whole_sequences_is_planned_without_meshes_that_cut_them(planned):
    for attention in ("blocks", "splash"):
        rows = planned("--model.attention", attention)
        assert {row["attention"] for row in rows} == {attention}
        assert {row["axes"].get("sequence", 1) for row in rows} == {1}
        assert len({row["layout"] for row in rows}) > 5
    assert 2 in {row["axes"].get("sequence", 1) for row in planned()}


@pytest.mark.parametrize(("flags", "what", "unit"), [(("--batch-size", "max"), "batch_size", 1), ((), "seq_len", 128)])
def test_every_layout_has_its_own_largest_size(flags, what, unit, planned):
    """Everything fits the fake, so the compiler is asked for as much as its tries and the rules allow."""
    given = flags or ("--seq-len", "max", "--batch-size", "8")
    rows = planned(*given, "--compile", "2", "--model.max-seq-len", "4096", "--remat", "full")
    compiled = [row for row in rows if row["source"] == "compiled"]
    assert {row["layout"] for row in compiled} >= {"pmap"}
    assert len(compiled) == 2
    assert all(row["fits"] for row in compiled)
    for row in rows:
        assert row[what] % unit == 0
        assert f"--{what.replace('_', '-')} {row[what]}" in row["command"]
        assert row["microbatches"] == 1 or what == "seq_len"
    assert len({row[what] for row in rows}) > 1 or what == "seq_len"
    assert max(row["seq_len"] for row in rows) <= 4096


def test_no_length_is_sought_beyond_the_models(planned, call):
    """256 tokens suit two devices a sequence, with 128 each, and no four."""
    rows = planned("--seq-len", "max", "--batch-size", "8", "--model.max-seq-len", "256", "--compile", "1")
    assert {row["axes"].get("sequence", 1) for row in rows} == {1, 2}
    assert {row["seq_len"] for row in rows} == {256}
    status, _, err = call(plan, "--seq-len", "max", "--model.max-seq-len", "100")
    assert status == 2
    assert "seq_len=max with max_seq_len=100 leaves no 128 tokens; give a --seq-len" in err


def test_machines_are_compared_by_time_and_by_money(planned, call):
    """H100 is faster and has a price, of L4 none is known."""
    given = ("--compare", "v5litepod-4,l4-4,h100-4", "--tokens", "1e9", "--batch-size", "64", "--compile", "1")
    status, out, err = call(plan, *given, "--output", "compared.json")
    assert status == 0, err
    with open("compared.json") as file:
        rows = json.load(file)
    assert rows[0]["topology"] == "h100-4"
    assert {row["topology"] for row in rows} == {"h100-4", "v5litepod-4", "l4-4"}
    for row in rows:
        assert row["expected_hours"] == pytest.approx(1e9 / row["expected_tokens_per_second"] / 3600)
        priced = row["topology"] != "l4-4"
        assert (row["expected_usd"] is not None) == priced
        assert f" {row['expected_hours']:.2f} " in out
        assert row["command"] in out
        assert f"JAX_NUM_CPU_DEVICES={row['devices']} python scripts/train.py" in out
    assert "no price" in out
    with open("compared.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_a_comparison_says_the_largest_batch_of_each_machine(planned, call):
    given = ("--compare", "v5litepod-4,v6e-4", "--tokens", "1e9", "--batch-size", "max", "--compile", "1")
    status, out, err = call(plan, *given, "--remat", "full", "--output", "compared.json")
    assert status == 0, err
    assert "batch" in out.split("remat")[0].split("layout")[1]
    with open("compared.json") as file:
        rows = json.load(file)
    assert [f" {row['batch_size']} " in out.split("rehearsed")[0] for row in rows] == [True, True]


def test_an_exhaustive_plan_compiles_every_choice(planned):
    rows = planned("--exhaustive")
    assert {row["source"] for row in rows} == {"compiled"}
    tried = {(row["layout"], row["remat"], row["microbatches"]) for row in rows}
    for row in rows:
        assert f"--accumulate {row['microbatches']} --dtype bfloat16 --remat {row['remat']}" in row["command"]
    assert len(tried) == len(rows)
    for layout in {row["layout"] for row in rows}:
        assert {remat for name, remat, _ in tried if name == layout} == {"none", "dots", "full"}
    # A device has two rows.
    assert {micro for name, _, micro in tried if name == "data=8"} == {1, 2}


def test_a_plan_says_hours_and_money_for_tokens(planned, tmp_path):
    """v4-16 is 8 chips; of 16 × 128 tokens a step, 2^30 tokens are 2^19 steps."""
    row = planned("--remat", "none", "--tokens", str(2**30))[0]
    step = row["expected_step_seconds"]
    assert step["low"] < step["seconds"] < step["high"]
    assert step["seconds"] >= row["estimated_step_seconds"]
    assert row["expected_hours"] == pytest.approx(2**19 * step["seconds"] / 3600)
    assert row["expected_usd"] == pytest.approx(row["expected_hours"] * 8 * 3.22)
    assert (price_of("v4", 1.5).usd, price_of("unheard of")) == (1.5, None)


def test_the_model_of_a_hugging_face_config_is_planned_and_its_command_says_it(planned, tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    values = {"model_type": "qwen3", "vocab_size": 512, "max_position_embeddings": 128, "head_dim": 16, **sizes}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**values, "num_key_value_heads": 2}))
    read = read_flags(shlex.split(planned("--hf", "theirs", "--remat", "none")[0]["command"])[2:])
    model = read.model
    assert (model.embed_dim, model.num_layers, model.num_kv_heads, model.qk_norm) == (64, 2, 2, True)
    (default, _), (again, _) = first_flags(["--hf", "theirs"]), first_flags(["--hf", "theirs/config.json"])
    assert default == again
    assert dataclasses.replace(default, hf="theirs/config.json").name == "theirs"


def test_a_maxtext_config_brings_its_batch_and_its_own_layout(planned, tmp_path):
    (tmp_path / "theirs.yml").write_text(
        "base_emb_dim: 64\nbase_num_query_heads: 4\nbase_num_kv_heads: 4\nbase_num_decoder_layers: 2\nhead_dim: 16\n"
        "base_mlp_dim: 128\nvocab_size: 512\nper_device_batch_size: 2.0\nici_fsdp_parallelism: 4\n"
    )
    words = ("--maxtext", "theirs.yml", "max_target_length=256", "ici_tensor_parallelism=2")
    command = planned(*words, "--remat", "none")[0]["command"]
    assert "--seq-len 256" in command
    assert "--model.embed-dim 64" in command
    default, asked = first_flags(["--topology", "v4-16", *words])
    assert (default.batch_size, default.seq_len) == (16, 256)  # 2 rows of each of 8 devices
    assert asked.layout(8) == {"fsdp": 4, "tensor": 2}
    with pytest.raises(ValueError, match="'max_target_length' behind --maxtext must be a key=value; try"):
        Flags(maxtext="theirs.yml", overrides=("max_target_length", "256"))


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
