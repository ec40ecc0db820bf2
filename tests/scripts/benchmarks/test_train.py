"""`benchmark.py train`: only equal work is compared, and what a round comes to."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from parallax.model.flops import step_flops
from scripts.benchmarks import rounds
from scripts.benchmarks import train as benchmark_train
from scripts.benchmarks.rounds import TREE
from scripts.benchmarks.settings import MODELS, SEED, read_setting, samples
from scripts.benchmarks.train import check_work, result

SHORT = "train --settings trial-2x16 --rounds 2 --seconds 0.02 --contenders"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"params": 10, "losses": [4.0, 3.0]}, None),
        ({"params": 10, "losses": [4.0, 3.00001]}, None),
        ({"params": 11, "losses": [4.0, 3.0]}, "11 parameters and A 10"),
        ({"params": 10, "losses": [4.0, 3.01]}, "loss 3.01 in step 2 and A 3.0"),
        ({"params": 10, "losses": [float("nan"), 3.0]}, "loss nan in step 1"),
    ],
)
def test_only_equal_work_is_compared(facts, message):
    first = SimpleNamespace(name="A", facts={"params": 10, "losses": [4.0, 3.0]})
    workers = [first, SimpleNamespace(name="B", facts=facts)]
    if message is None:
        check_work(workers)
    else:
        with pytest.raises(ValueError, match=message):
            check_work(workers)


def test_speed_utilisation_and_ratio_of_a_setting():
    """By hand: a step in 0.5 s and in 2 s, on a machine that could do ten times the first's operations."""
    setting = read_setting("trial-4x16")
    peak = 10 * 2 * step_flops(setting.model, 4, 16)
    found = result(setting, {"single": [{"each": 0.5}], "torch": [{"each": 2.0}], "gemm": [{"flops": peak}]})
    assert found["single"]["tokens/s"] == [128.0]
    assert found["single"]["of the GEMM peak"] == [pytest.approx(0.1)]
    assert found["torch"]["of the GEMM peak"] == [pytest.approx(0.025)]
    assert found["torch"]["ratio"] == [4.0]


def test_all_tables_are_without_padding():
    assert all(model.table_rows == model.vocab_size for model in MODELS.values())


def test_the_text_stays_in_the_vocabulary():
    setting = read_setting("trial-4x16")
    batch = samples(setting).gather(samples(setting).draw(4, SEED, 0))
    assert batch["inputs"].shape == (4, 16)
    assert 0 <= batch["inputs"].min() < batch["inputs"].max() < setting.model.vocab_size


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--contenders single --settings giant-1x1", "setting 'giant-1x1' must be MODEL-BATCHxLENGTH"),
        ("--contenders single --settings nano-0x64", "setting 'nano-0x64' must be"),
        ("--contenders single,caffe", "contender 'caffe' is not one of single"),
        ("--rounds 0", "rounds=0 must be positive"),
    ],
)
def test_bad_input_is_one_line(refuse, args, message):
    refuse(f"train {args}", message)


def test_from_command_to_report(call, tmp_path):
    """With two contenders that need no torch, one of them the code of a checkout: equal work is shown, and rounds are
    taken."""
    for package in ("scripts", "parallax", "parallelism", "data"):
        shutil.copytree(TREE / package, tmp_path / "before" / package)
    with (tmp_path / "before/scripts/benchmarks/settings.py").open("a") as settings:
        settings.write("open('before-ran', 'w').close()\n")
    status, out, err = call(*f"{SHORT} single --against before".split())
    assert status == 0, err
    assert (tmp_path / "before-ran").exists()
    assert [line.split()[1] for line in out.splitlines() if line.startswith("| ")][-2:] == ["single", "before"]
    report = json.loads((tmp_path / "benchmarks/train.json").read_text())
    assert report["machine"]["cores"] >= 1
    assert "--settings trial-2x16" in report["command"]
    (found,) = report["results"].values()
    assert [len(each["tokens/s"]) for each in found["contenders"].values()] == [2, 2]
    assert found["parameters"] == MODELS["trial"].num_params()


def test_other_work_is_refused(call, monkeypatch):
    def worker(name, kind, tree, **spec):
        losses = [4.1 if tree == Path("before") else 4.0]
        return SimpleNamespace(name=name, facts={"params": 10, "losses": losses}, close=lambda: None)

    monkeypatch.setattr(benchmark_train, "Worker", worker)
    monkeypatch.setattr(rounds, "find", lambda tree, files: tree)
    status, _, err = call(*f"{SHORT} single --against before".split())
    assert status == 2
    assert "before has the loss 4.1 in step 1 and single 4.0" in err


@pytest.mark.parametrize("command", ["train", "decode", "serve"])
def test_what_is_no_checkout_is_refused(refuse, tmp_path, command):
    refuse(f"{command} --against {tmp_path}", f"--against {tmp_path} holds no scripts/benchmarks/worker.py")
