"""What plan.py refuses, before it compiles anything, and the commands that it prints."""

import importlib.util
import shlex
import sys
import types

import pytest

from parallax.config import PRESETS
from parallelism.planner import Choice
from parallelism.strategy import Layout
from scripts import job, plan
from scripts.plan_flags import Flags
from scripts.plan_report import run_command
from scripts.train_flags import read_flags

CASES = {
    "no such slice": (["--topology", "v3-16"], ["topology='v3-16'", "try v3-8"]),
    "no such generation": (["--topology", "gpu-8"], ["topology='gpu-8'", "v5p", "try v3-8"]),
    "unknown preset": (["--config", "huge"], ["huge", "tiny"]),
    "no batch": (["--batch-size", "0"], ["batch_size=0", "try 32"]),
    "no layouts": (["--compile", "0"], ["compile=0", "at least 1"]),
    "heads do not group": (["--model.num-kv-heads", "3"], ["num_kv_heads=3", "try 2"]),
    "no compiler": ([], ["libtpu", "not installed", 'pip install -e ".[plan]"']),
}


@pytest.mark.parametrize(("flags", "words"), CASES.values(), ids=CASES)
def test_bad_input_gives_one_line_and_status_2(flags, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plan.py", *flags])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        plan.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


def test_a_command_gives_train_the_layout_and_every_change_of_the_model():
    layout = Layout(strategy="mesh", mesh="data=2,fsdp=2x2", accumulate=2, batch_size=64, seq_len=32)
    config = PRESETS["nano"].replace(remat="full", dtype="bfloat16", num_kv_heads=2, qk_norm=True)
    flags = Flags(config="nano", batch_size=64, seq_len=32, model=config)
    command = run_command(Choice(layout, {"data": 2, "fsdp": 4}, "full", "bfloat16"), config, flags)
    read = read_flags(shlex.split(command)[2:])
    assert read.model == config
    assert (read.strategy, read.mesh, read.config) == ("mesh", "data=2,fsdp=2x2", "nano")
    assert (read.train.batch_size, read.train.seq_len, read.train.accumulate) == (64, 32, 2)


@pytest.mark.parametrize(
    ("kind", "changes", "length", "mesh", "expected"),
    [
        ("TPU v4", {}, 256, "", "splash"),
        ("TPU v6 lite", {}, 256, "data=2,tensor=4", "splash"),
        ("TPU v3", {}, 256, "", "xla"),
        ("cpu", {}, 256, "", "xla"),
        ("TPU v4", {}, 200, "", "xla"),
        ("TPU v4", {"dropout_rate": 0.1}, 256, "", "xla"),
        ("TPU v4", {}, 256, "sequence=8", "xla"),
        ("TPU v4", {"attention": "xla"}, 256, "", "xla"),
        ("cpu", {"attention": "splash"}, 256, "", "splash"),
    ],
)
def test_attention_is_the_kernels_where_the_devices_run_it_unless_asked(
    kind, changes, length, mesh, expected, monkeypatch
):
    monkeypatch.setattr(job.jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert job.choose_attention(PRESETS["tiny"].replace(**changes), length, mesh) == expected
