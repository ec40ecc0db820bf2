"""train.py from the outside: what it prints, what it leaves, how it resumes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import train

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = [
    "--model.num-layers",
    "1",
    "--model.embed-dim",
    "32",
    "--model.mlp-dim",
    "32",
    "--model.head-dim",
    "8",
]
SHORT = [
    "--steps",
    "12",
    "--batch-size",
    "16",
    "--seq-len",
    "16",
    "--log-interval",
    "4",
    "--eval-interval",
    "6",
]
ROW = {"step", "loss", "ce_loss", "z_loss", "grad_norm", "param_norm", "learning_rate"}


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A folder to work in, with a text to learn; signal handlers are put back afterwards."""
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def call(text, monkeypatch, capsys):
    """Calls train.py in this process: (exit status, standard output, standard error)."""

    def call(*flags: str) -> tuple[int, str, str]:
        dataset = [] if {"overfit", "--dataset"} & set(flags) else ["--dataset", "text.txt"]
        monkeypatch.setattr(sys, "argv", ["train.py", *dataset, *SMALL, *SHORT, *flags])
        try:
            status = train.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A finished run, trained once: the flags of `call`, and its folder."""
    folder = tmp_path_factory.mktemp("template")
    write_text(folder)
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--dataset", "text.txt", *SMALL, *SHORT]
    subprocess.run([*command, "--output-dir", "run"], cwd=folder, check=True, capture_output=True)
    return folder / "run"


@pytest.fixture
def finished(template, text):
    """The finished run, copied beside the text that it was trained on."""
    return Path(shutil.copytree(template, text / "run"))


def write_text(folder: Path) -> None:
    rng = random.Random(0)
    words = ["king", "queen", "crown", "sword", "night", "and", "the"]
    (folder / "text.txt").write_text(" ".join(rng.choice(words) for _ in range(600)))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


@pytest.mark.parametrize(
    "layout",
    [
        ["--mode", "single"],
        ["--mode", "distributed"],
        ["--strategy", "pmap", "--accumulate", "2"],
        ["--strategy", "mesh"],
        ["--mesh", "data=2,fsdp=4"],
    ],
    ids=" ".join,
)
def test_a_run_explains_itself(call, text, layout):
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
    assert json.loads((folder / "summary.json").read_text())["finished"]
    assert json.loads((folder / "config.json").read_text())["model"]["num_layers"] == 1
    assert "finished" in err


def test_a_finished_run_stays_as_it_is(call, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*.json*") if path.name != "summary.json"}
    first, again = (call("--output-dir", "run", "--resume", "--print-param-hash") for _ in range(2))
    assert (first[0], again[0]) == (0, 0)
    assert first[1] == again[1]
    assert first[1].startswith("params sha256 ")
    assert before == {path: path.read_bytes() for path in before}


def test_resume_takes_its_settings_from_the_run_and_may_go_on(text, finished, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--output-dir", "run", "--steps", "15"])
    assert train.main() == 0
    assert rows(finished)[-1]["step"] == 15
    assert json.loads((finished / "config.json").read_text())["model"]["embed_dim"] == 32


@pytest.mark.parametrize("flag", ["--learning-rate", "--model.norm-eps", "--z-loss"])
def test_resume_refuses_another_run(call, finished, flag):
    before = (finished / "config.json").read_bytes()
    status, _, err = call("--output-dir", "run", "--resume", flag, "0.0123")
    assert status == 2
    assert flag in err
    assert "0.0123" in err
    assert err.count("\n") == 1
    assert (finished / "config.json").read_bytes() == before


def test_resume_refuses_another_text(call, text, finished):
    with (text / "text.txt").open("a") as file:
        file.write("crown")
    status, _, err = call("--output-dir", "run", "--resume")
    assert status == 2
    assert "text.txt" in err


def test_resume_on_another_layout_goes_on_with_the_same_curve(call, text):
    fixed = ["--final-rate", "1", "--warmup-steps", "2"]  # a rate that does not depend on where a part ends
    call("--output-dir", "whole", "--log-interval", "1", *fixed)
    for steps, layout in (("5", ["--mesh", "fsdp=8"]), ("9", ["--strategy", "pmap"]), ("12", [])):
        flags = ["--log-interval", "1", *fixed, *layout]
        assert call("--output-dir", "moved", "--resume", "--steps", steps, *flags)[0] == 0
    assert losses(text / "moved") == pytest.approx(losses(text / "whole"), rel=1e-5)  # sums in another order


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(call, finished):
    _, expected, _ = call("--output-dir", "run", "--resume", "--print-param-hash")
    newest = finished / "checkpoints" / "12"
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    status, found, err = call("--output-dir", "run", "--resume", "--print-param-hash")
    assert status == 0
    assert found == expected
    assert file.name in err
    assert "from step 6" in err
    assert [path.name for path in newest.parent.glob("12.damaged*")]


def test_steps_that_are_not_finite_stop_the_run(call, text):
    status, _, err = call(
        "--output-dir", "run", "--learning-rate", "1e30", "--max-bad-steps", "3", "--clip-norm", "0"
    )
    assert status == 1
    assert "3 steps in a row" in err
    assert "Traceback" not in err
    assert json.loads((text / "run" / "summary.json").read_text())["finished"] is False


def test_lower_only_compiles_and_leaves_nothing(call, text):
    status, out, _ = call("--lower-only", "--mesh", "fsdp=8")
    assert status == 0
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


def test_sigterm_saves_and_exits_well(text):
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--dataset", "text.txt", *SMALL]
    flags = ["--steps", "100000", "--log-interval", "1", "--output-dir", "run"]
    process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = text / "run" / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count("\n") > 5:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "--resume" in err
    saved = max(int(path.name) for path in (text / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert saved >= rows(text / "run")[-1]["step"]
