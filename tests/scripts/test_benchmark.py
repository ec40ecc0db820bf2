"""benchmark.py: its statistics, what it refuses, and that contenders do equal work. Nothing here depends on a time."""

import importlib.util
import json
import sys

import pytest

from parallax.model.cost import step_flops
from scripts import benchmark
from scripts.benchmark_checkpoint import table as checkpoint_table
from scripts.benchmark_decode import step_bytes
from scripts.benchmark_quality import loss_at, seconds_to
from scripts.benchmark_quality import table as quality_table
from scripts.benchmark_rounds import Worker, interleave, ratio, spread
from scripts.benchmark_settings import MODELS, SEED, read_setting, samples, training_flags
from scripts.benchmark_train import check_work, result

CURVE = [(10.0, 100, 2.4), (20.0, 200, 1.9), (30.0, 300, 1.8), (40.0, 400, 1.85)]


class Recorded:
    """Stands for a Worker: notes when it is asked."""

    def __init__(self, name, log, facts=None):
        self.name, self.log, self.facts = name, log, facts or {}

    def ask(self, **request):
        self.log.append(self.name)
        return {"seconds": float(len(self.log))} | request


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Calls benchmark.py in this process: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *args])
        try:
            status = benchmark.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return call


def test_a_spread_is_least_median_most():
    assert spread([3.0, 1.0, 2.0, 10.0]) == spread([10.0, 2.0, 1.0, 3.0])
    assert (spread([3.0, 1.0, 9.0]).least, spread([3.0, 1.0, 9.0]).median, spread([3.0, 1.0, 9.0]).most) == (
        1,
        3,
        9,
    )
    with pytest.raises(ValueError, match="at least 1 round"):
        spread([])


def test_a_ratio_is_taken_pair_by_pair():
    """A machine that becomes ten times slower for a round changes both of a pair, and no ratio."""
    assert ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == spread([2.0, 2.0, 2.0])
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_contenders_take_turns_and_the_first_round_does_not_count():
    log = []
    workers = [Recorded(name, log) for name in "ABC"]
    found = interleave(workers, [{"units": 1}, {"units": 2}, {"units": 3}], 2, "test")
    assert "".join(log) == "ABCABCABC"
    assert [each["seconds"] for each in found["B"]] == [5.0, 8.0]
    assert [each["units"] for each in found["C"]] == [3, 3]


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
    workers = [Recorded("A", [], {"params": 10, "losses": [4.0, 3.0]}), Recorded("B", [], facts)]
    if message is None:
        check_work(workers)
    else:
        with pytest.raises(ValueError, match=message):
            check_work(workers)


def test_speed_utilisation_and_ratio_of_a_setting():
    """By hand: 2 steps in 1 s, and 2 in 4 s, on a machine that could do ten times the first's operations."""
    setting = read_setting("trial-4x16")
    facts = {name: {"params": 5, "losses": []} for name in ("single", "torch")} | {"gemm": {"by": "numpy"}}
    peak = 10 * 2 * step_flops(setting.model, 4, 16)
    rounds = {"single": [{"seconds": 1.0}], "torch": [{"seconds": 4.0}], "gemm": [{"flops": peak}]}
    found = result(setting, facts, {"single": 2, "torch": 2, "gemm": 1}, rounds)
    assert found["contenders"]["single"]["tokens_per_second"] == [128.0]
    assert found["contenders"]["single"]["mfu"] == pytest.approx(0.1)
    assert found["contenders"]["torch"]["mfu"] == pytest.approx(0.025)
    assert found["contenders"]["torch"]["ratio"] == {"least": 4.0, "median": 4.0, "most": 4.0}


def test_what_a_token_must_read():
    model = MODELS["trial"]
    cache = 2 * 2 * 2 * 16  # keys and values, of two layers, two heads, of 16
    assert step_bytes(model, 3, 10) == 4 * (model.num_params() + 3 * 10 * cache)


def test_when_a_loss_was_reached():
    assert seconds_to(CURVE, 1.88) == 30.0
    assert seconds_to(CURVE, 1.0) is None
    assert loss_at(CURVE, 35.0) == 1.8
    assert loss_at(CURVE, 5.0) is None


def test_a_loss_that_was_not_reached_is_not_left_out():
    runs = [{"question": "loss", "evaluations": CURVE[:count]} for count in (4, 1)]
    runs += [{"question": "time", "evaluations": CURVE}]
    rows = dict(quality_table({"loss": 1.88, "seconds": 100.0, "runs": runs}))
    assert rows["seconds to an evaluation loss of 1.88"] == "30.0 (30.0 to 30.0), 1 not reached"
    assert rows["evaluation loss after 100 seconds"] == "1.8000 (1.8000 to 1.8000)"


def test_what_checkpoints_take():
    run = {"wall": 20.0, "goodput": 0.5}
    pair = {
        "with": run | {"trained": 10.0, "checkpoint": 0.1},
        "without": run | {"trained": 9.0, "checkpoint": 0.0},
    }
    shares = [row[1] for row in checkpoint_table({"pairs": [pair]})]
    assert shares[:2] == ["10.00 (10.00 to 10.00)", "1.00 (1.00 to 1.00)"]


def test_all_tables_are_without_padding():
    assert all(model.table_rows == model.vocab_size for model in MODELS.values())


def test_the_text_stays_in_the_vocabulary():
    setting = read_setting("trial-4x16")
    batch = samples(setting).gather(samples(setting).draw(4, SEED, 0))
    assert batch["inputs"].shape == (4, 16)
    assert 0 <= batch["inputs"].min() < batch["inputs"].max() < setting.model.vocab_size
    assert training_flags(setting, "single").train.z_loss == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fly"], "command 'fly' is not one of train"),
        (["train", "--settings", "giant-1x1"], "setting 'giant-1x1' must be MODEL-BATCHxLENGTH"),
        (["train", "--settings", "nano-0x64"], "setting 'nano-0x64' must be"),
        (["train", "--contenders", "single,caffe"], "contender 'caffe' is not one of single"),
        (["train", "--rounds", "0"], "rounds=0 must be positive"),
        (["decode", "--models", "giant"], "model 'giant' is not one of"),
        (["decode", "--batches", "1,x"], "batch 'x' must be a positive number"),
        (["decode", "--contenders", "transformers"], "begin with parallax"),
        (["scaling", "--parts", "width"], "part 'width' is not one of devices"),
        (["quality", "--seeds", "a"], "seed 'a' must be a number"),
        (["checkpoint", "--steps", "5"], "steps=5 must be at least 100"),
        (["page", "--results", "nowhere"], "holds no results"),
    ],
)
def test_bad_input_is_one_line(call, args, message):
    status, out, err = call(*args)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize("args", [["train"], ["decode"]])
def test_a_missing_package_is_named_with_its_remedy(call, monkeypatch, args):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, out, err = call(*args)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "torch is not installed" in err
    assert 'pip install -e ".[bench]"' in err


def test_help_names_every_command(call):
    status, out, _ = call("--help")
    assert status == 0
    assert all(f"\n  {name} " in out for name in benchmark.COMMANDS)


def test_a_worker_that_is_asked_for_nonsense_says_so():
    with pytest.raises(ValueError, match="pipeline: setting 'x' must be"):
        Worker("pipeline", "pipeline", setting="x")


def test_training_from_command_to_page(call, tmp_path):
    """With two contenders that need no torch: equal work is shown, rounds are taken, a page is written."""
    flags = ["--settings", "trial-2x16", "--contenders", "single,pmap", "--rounds", "2", "--seconds", "0.02"]
    status, out, err = call("train", *flags)
    assert status == 0, err
    assert "single" in out
    assert "pmap" in out
    report = json.loads((tmp_path / "benchmarks/train.json").read_text())
    assert report["machine"]["cores"] >= 1
    assert "--settings trial-2x16" in report["command"]
    (found,) = report["results"]
    contenders = found["contenders"]
    assert [len(each["tokens_per_second"]) for each in contenders.values()] == [2, 2]
    assert contenders["single"]["losses"] == pytest.approx(contenders["pmap"]["losses"], rel=1e-6)
    assert found["parameters"] == MODELS["trial"].num_params()
    (tmp_path / "benchmarks/train-again.json").write_text(
        json.dumps(report | {"command": "another", "busy_cores_before": 1.5})
    )
    (tmp_path / "notes.md").write_text("## What the profile showed\n\nNothing yet.\n")
    status, _, err = call("page", "--output", "page.md", "--notes", "notes.md")
    assert status == 0, err
    page = (tmp_path / "page.md").read_text()
    assert page.count("| pmap |") == 2
    assert "`another`" in page
    assert "1.5 cores were busy" in page
    assert page.endswith("Nothing yet.\n")
    assert (tmp_path / "page" / "train.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.external
@pytest.mark.parametrize("contender", ["torch", "transformers"])
def test_torch_does_the_same_work(tmp_path, contender):
    """Losses over four steps: the first shows the model, the others gradients, clipping, decay and AdamW."""
    weights = str(tmp_path / "weights.npz")
    ours = Worker("single", "train-parallax", setting="trial-2x16", strategy="single", weights=weights)
    theirs = Worker(contender, "train-torch", setting="trial-2x16", model=contender, weights=weights)
    check_work([ours, theirs])
    assert theirs.facts["losses"] == pytest.approx(ours.facts["losses"], rel=1e-5)
    for worker in (ours, theirs):
        worker.close()


@pytest.mark.external
def test_transformers_writes_the_same_tokens(tmp_path):
    weights = str(tmp_path / "weights.npz")
    spec = {"model": "trial", "batch_size": 3, "prompt_tokens": 8, "new_tokens": 5, "weights": weights}
    ours, theirs = (
        Worker("parallax", "decode-parallax", **spec),
        Worker("llama", "decode-transformers", **spec),
    )
    assert ours.facts["tokens"] == theirs.facts["tokens"]
    for worker in (ours, theirs):
        worker.close()
