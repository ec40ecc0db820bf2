"""train.py from the outside: what it prints, what it leaves, what it takes from a run that it resumes."""

import json
import sys
from pathlib import Path

import pytest

from scripts import train

ROW = {"step", "loss", "ce_loss", "z_loss", "grad_norm", "param_norm", "learning_rate"}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


@pytest.mark.parametrize(
    "layout",
    [
        ["--mode", "single"],
        ["--mode", "distributed", "--reduction", "exact"],
        ["--strategy", "pmap", "--accumulate", "2"],
        ["--mesh", "data=4,tensor=2", "--rules", "rules.json"],
        ["--mesh", "fsdp=2,sequence=2,tensor=2"],
    ],
    ids=" ".join,
)
def test_a_run_explains_itself(call, text, template, layout):
    """And learns what a run on one device does."""
    (text / "rules.json").write_text('{"batch": ["tensor"], "head_dim": ["data"]}')
    status, out, err = call(*layout)
    assert (status, out) == (0, "")
    folder = text / "runs" / "text-tiny"
    assert {"checkpoints", "config.json", "tokenizer.json", "metrics.jsonl", "loss.png", "summary.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert list(folder.glob("events.out.tfevents.*"))
    assert [row["step"] for row in rows(folder) if "loss" in row] == [1, 4, 8, 12]
    assert [row["step"] for row in rows(folder) if "eval_loss" in row] == [6, 12]
    assert all(row.keys() >= ROW for row in rows(folder) if "loss" in row)
    assert "tokens_per_second" in rows(folder)[-2]
    assert losses(folder)[-1] < losses(folder)[0]
    assert losses(folder) == pytest.approx(losses(template), rel=1e-5)  # sums in another order
    assert json.loads((folder / "summary.json").read_text())["finished"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["num_layers"] == 1
    for name in ("mesh", "strategy", "mode", "rules"):
        assert f"--{name}" not in layout or config["run"][name] == layout[layout.index(f"--{name}") + 1]
    assert config["train"]["reduction"] == ("exact" if "exact" in layout else "mean")
    assert "finished" in err
    assert "\ntime      " in err


def test_microbatches_that_are_chosen_are_named_and_leave_the_curve_as_it_is(call, text):
    found = {}
    for asked in ("0", "1"):
        run = ("--batch-size", "16", "--seq-len", "256", "--steps", "4", "--accumulate", asked)
        status, _, err = call(*run, "--output-dir", str(text / asked))
        assert status == 0
        assert ("in 2 microbatches" in err) == (asked == "0")
        found[asked] = losses(text / asked)
    assert found["0"] == pytest.approx(found["1"], rel=1e-5)  # sums in another order
    assert json.loads((text / "0" / "config.json").read_text())["train"]["accumulate"] == 0


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--learning-rate", "0.0123"),
        ("--model.norm-eps", "0.0123"),
        ("--z-loss", "0.0123"),
        ("--reduction", "exact"),
    ],
)
def test_resume_refuses_another_run(call, finished, flag, value):
    before = (finished / "config.json").read_bytes()
    status, _, err = call("--output-dir", "run", "--resume", flag, value)
    assert status == 2
    assert flag in err
    assert value in err
    assert err.count("\n") == 1
    assert (finished / "config.json").read_bytes() == before


def test_resume_refuses_another_text(call, text, finished):
    with (text / "text.txt").open("a") as file:
        file.write("crown")
    status, _, err = call("--output-dir", "run", "--resume")
    assert status == 2
    assert "text.txt" in err


def test_lower_only_compiles_and_leaves_nothing(call, text):
    status, out, err = call("--lower-only", "--mesh", "auto")
    assert status == 0
    assert "as data=8 (state of" in err
    assert "blocks/mlp/gate" in out
    assert "FLOPs" in out
    assert not (text / "runs").exists()


def test_profile_writes_a_trace(call, text):
    assert call("--output-dir", "run", "--profile")[0] == 0
    assert list((text / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_folders_and_tokenizers(call, text, tokenizer):
    folder = text / "plays"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(
            f"scene {number}: " + (text / "text.txt").read_text()[: 90 + 11 * number]
        )
    assert call("--dataset", "plays", "--tokenizer", tokenizer, "--optimizer", "muon")[0] == 0
    assert json.loads((text / "runs" / "plays-tiny" / "config.json").read_text())["model"]["vocab_size"] > 256


def test_overfit_passes_and_fails(text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--mode", "overfit", "--steps", "500"])
    assert train.main() == 0
    out, _ = capsys.readouterr()
    assert out.splitlines()[-1] == "✅ OVERFIT TEST PASSED - Model is mathematically correct!"
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--mode", "overfit", "--model.num-layers", "1", "--steps", "1"]
    )
    assert train.main() == 1
    out, _ = capsys.readouterr()
    assert out.splitlines()[-1].startswith("❌")
