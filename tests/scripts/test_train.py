"""train.py from the outside: what it prints, what it leaves, what it takes from a run that it resumes."""

import functools
import json

import pytest

from parallax.training.plot import plot_loss
from parallelism.exit_status import OUT_OF_MEMORY
from scripts import train
from scripts.training import choices, overfit, record
from scripts.training.flags import read_flags
from tests.scripts.runs import rows

ROW = {"step", "loss", "ce_loss", "z_loss", "grad_norm", "param_norm", "learning_rate"}


def losses(folder):
    return [row["loss"] for row in rows(folder) if "loss" in row]


@pytest.mark.parametrize(
    "layout",
    [
        "--mode distributed --reduction exact",
        "--strategy pmap --accumulate 2",
        "--mesh data=4,tensor=2 --rules rules.json",
    ],
)
def test_a_run_explains_itself(train_small, text, template, layout, monkeypatch):
    """And learns what a run on one device does."""
    is_drawn = "pmap" in layout  # once, since a picture takes as long as a run
    if is_drawn:
        monkeypatch.setattr(record, "plot_loss", plot_loss)
    (text / "rules.json").write_text('{"batch": ["tensor"], "head_dim": ["data"]}')
    layout = layout.split()
    status, out, err = train_small(*layout)
    assert (status, out) == (0, "")
    folder = text / "runs" / "text-tiny"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"checkpoints", "config.json", "tokenizer.json", "metrics.jsonl", "summary.json"}
    assert ("loss.png" in names) == is_drawn
    assert list(folder.glob("events.out.tfevents.*"))
    assert [row["step"] for row in rows(folder) if "loss" in row] == [1, 4, 8, 12]
    assert [row["step"] for row in rows(folder) if "eval_loss" in row] == [6, 12]
    assert all(row.keys() >= ROW for row in rows(folder) if "loss" in row)
    assert "tokens_per_second" in json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])
    assert losses(folder)[-1] < losses(folder)[0]
    assert losses(folder) == pytest.approx(losses(template), rel=1e-5)  # sums in another order
    assert json.loads((folder / "summary.json").read_text())["finished"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["num_layers"] == 1
    for name in ("mesh", "strategy", "mode", "rules"):
        assert f"--{name}" not in layout or config["run"][name] == layout[layout.index(f"--{name}") + 1]
    assert config["train"]["reduction"] == ("exact" if "exact" in layout else "mean")
    assert "finished" in err
    assert ("microbatches" in err) == ("--accumulate" in layout)
    assert "\ntime      " in err


def test_microbatches_that_are_chosen_are_named_and_leave_the_curve_as_it_is(train_small, text, template, monkeypatch):
    monkeypatch.setattr(choices, "MICROBATCH", 128)  # half a batch
    status, _, err = train_small("--output-dir", "run")
    assert status == 0
    assert "in 2 microbatches" in err
    assert losses(text / "run") == pytest.approx(losses(template), rel=1e-5)  # sums in another order
    assert json.loads((text / "run" / "config.json").read_text())["train"]["accumulate"] == 0


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--weight-decay", "0.0123"), ("--model.norm-eps", "0.0123"), ("--z-loss", "0.0123"), ("--reduction", "exact")],
)
def test_resume_refuses_another_run(refuses, finished, flag, value):
    before = (finished / "config.json").read_bytes()
    refuses(train, ["--output-dir", "run", "--resume", flag, value], flag, value)
    assert (finished / "config.json").read_bytes() == before


def test_resume_refuses_fewer_steps_than_are_done(refuses, finished):
    refuses(train, ["--output-dir", "run", "--resume", "--steps", "8"], "--steps 8", "at least 12", "try --steps 12")


@pytest.mark.parametrize("remedy", ["--remat full", "--accumulate 2", "--mesh fsdp=8"])
def test_resume_takes_what_a_lack_of_memory_is_answered_with(remedy, finished, monkeypatch):
    monkeypatch.chdir(finished.parent)
    assert remedy.split()[0] in OUT_OF_MEMORY
    read_flags(["--resume", "--output-dir", "run", *remedy.split()])


def test_resume_refuses_another_text(refuses, text, finished):
    with (text / "text.txt").open("a") as file:
        file.write("crown")
    refuses(train, ["--output-dir", "run", "--resume"], "text.txt", "is not the text")


def test_lower_only_compiles_and_leaves_nothing(train_small, text):
    status, out, err = train_small("--lower-only", "--mesh", "auto")
    assert status == 0
    assert "as data=8 (state of" in err
    assert "blocks/mlp/gate" in out
    assert "FLOPs" in out
    assert not (text / "runs").exists()


def test_a_folder_a_tokenizer_and_a_trace(train_small, text):
    (text / "plays").mkdir()
    for number in range(12):
        words = (text / "text.txt").read_text()[: 90 + 11 * number]
        (text / "plays" / f"{number}.txt").write_text(f"scene {number}: {words}")
    assert train_small("--dataset", "plays", "--tokenizer", "bpe:300", "--optimizer", "muon", "--profile")[0] == 0
    run = text / "runs" / "plays-tiny"
    assert json.loads((run / "config.json").read_text())["model"]["vocab_size"] > 256
    assert list((run / "profile").rglob("*.xplane.pb"))


def test_overfit_passes_and_fails(call, monkeypatch):
    monkeypatch.setattr(overfit, "Generator", functools.cache(overfit.Generator))  # compiles once
    flags = ("--mode", "overfit", "--model.num-layers", "1", "--model.embed-dim", "64", "--model.mlp-dim", "64")
    flags += ("--batch-size", "1", "--learning-rate", "1e-2", "--schedule-steps", "100", "--warmup-steps", "1")
    status, out, _ = call(train, *flags, "--steps", "100")
    assert (status, out.splitlines()[-1]) == (0, "✅ OVERFIT TEST PASSED - Model is mathematically correct!")
    status, out, _ = call(train, *flags, "--steps", "1", "--output-dir", "short")
    assert (status, out.splitlines()[-1][0]) == (1, "❌")
