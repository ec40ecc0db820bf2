"""Bad input to train.py: one line that names rule, value and remedy, exit status 2, nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import train

TEXT = "the quick brown fox jumps over the lazy dog. " * 60

# Arguments of train.py, and what its one line must say: the value and the remedy.
CASES = {
    "unknown flag": (["--stepz", "5"], ["--stepz", "--help"]),
    "not a number": (["--steps", "many"], ["--steps", "many", "--help"]),
    "missing value": (["--steps"], ["--steps", "--help"]),
    "unknown mode": (["--mode", "turbo"], ["turbo", "overfit"]),
    "unknown strategy": (["--strategy", "magic"], ["magic", "pmap"]),
    "unknown preset": (["--config", "huge"], ["huge", "tiny"]),
    "unknown model field": (["--model.depth", "3"], ["--model.depth", "--help"]),
    "no steps": (["--steps", "0"], ["steps=0", "at least 1", "try 1000"]),
    "no batch": (["--batch-size", "0"], ["batch_size=0", "try 32"]),
    "negative seed": (["--seed", "-1"], ["seed=-1", "try 0"]),
    "negative rate": (["--learning-rate", "-1"], ["learning_rate=-1", "try 1e-3"]),
    "long warm-up": (["--steps", "5", "--warmup-steps", "9"], ["warmup_steps=9", "steps=5", "try 1"]),
    "heads do not group": (["--model.num-kv-heads", "3"], ["num_kv_heads=3", "num_heads=4", "try 2"]),
    "odd head": (["--model.head-dim", "31"], ["head_dim=31", "even", "try 32"]),
    "dropout of one": (["--model.dropout-rate", "1"], ["dropout_rate=1", "[0, 1)", "try 0.1"]),
    "smoothing of one": (["--label-smoothing", "1"], ["label_smoothing=1", "try 0.1"]),
    "uneven accumulation": (["--accumulate", "5"], ["accumulate=5", "batch_size=32", "try 4"]),
    "sequence beyond the model": (
        ["--seq-len", "99", "--model.max-seq-len", "64"],
        ["seq_len=99", "max_seq_len=64", "try --seq-len 64"],
    ),
    "single with pmap": (
        ["--mode", "single", "--strategy", "pmap"],
        ["single", "pmap", "try --mode distributed"],
    ),
    "distributed on one": (
        ["--mode", "distributed", "--strategy", "single"],
        ["single", "try --strategy pmap"],
    ),
    "mesh for pmap": (["--strategy", "pmap", "--mesh", "data=8"], ["data=8", "--strategy mesh"]),
    "unknown mesh axis": (["--mesh", "expert=8"], ["expert", "known are data"]),
    "repeated mesh axis": (["--mesh", "data=2,data=4"], ["data", "twice", "once"]),
    "mesh of too few": (["--mesh", "data=2"], ["data=2", "8 are visible", "try --mesh data=8"]),
    "mesh of nothing": (["--mesh", "data=0"], ["data=0", "positive", "try data=all"]),
    "uneven batch, pmap": (
        ["--strategy", "pmap", "--batch-size", "12"],
        ["batch_size=12", "try --batch-size 16"],
    ),
    "uneven batch, mesh": (
        ["--strategy", "mesh", "--batch-size", "9"],
        ["batch_size=9", "try --batch-size 8"],
    ),
    "indivisible dim": (["--mesh", "fsdp=8", "--model.embed-dim", "100"], ["embed=100", "fsdp=8", "try"]),
    "missing data": (["--dataset", "nowhere.txt"], ["nowhere.txt", "check the spelling"]),
    "missing data folder": (
        ["--dataset", "tiny_shakespeare", "--data-dir", "nowhere"],
        ["--data-dir=nowhere", "create it"],
    ),
    "wrong checksum": (
        ["--dataset", "tiny_shakespeare", "--data-dir", "wrong"],
        ["tiny_shakespeare.txt", "sha256", "delete"],
    ),
    "empty text": (["--dataset", "empty.txt"], ["empty.txt", "empty"]),
    "not text": (["--dataset", "binary.txt"], ["binary.txt", "UTF-8"]),
    "short text": (["--dataset", "short.txt"], ["seq_len=128", "shorter --seq-len"]),
    "unknown tokenizer": (["--tokenizer", "words"], ["words", "char"]),
    "tiny vocabulary": (["--tokenizer", "bpe:3"], ["bpe:3", "257", "try bpe:1024"]),
    "existing folder": (["--output-dir", "taken"], ["taken", "--resume"]),
    "folder that is a file": (["--output-dir", "text.txt"], ["text.txt", "is a file"]),
    "not a run": (["--output-dir", "taken", "--resume"], ["taken", "config.json"]),
    "nothing to resume": (["--resume"], ["--output-dir"]),
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with texts good and bad, from which the scripts are called."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "tiny_shakespeare.txt").write_text("To be, or not to be")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def with_text(args: list[str]) -> list[str]:
    return args if "--dataset" in args else ["--dataset", "text.txt", *args]


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_no_folder(name, workplace, monkeypatch, capsys):
    args, expected = CASES[name]
    before = files(workplace)
    monkeypatch.setattr(sys, "argv", ["train.py", *with_text(args)])
    with pytest.raises(SystemExit) as exit:
        train.main()
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    for words in expected:
        assert words in err
    assert "; " in err, "no remedy"
    assert files(workplace) == before


@pytest.mark.parametrize("name", ["not a number", "uneven accumulation"])
def test_the_same_from_a_shell(name, workplace):
    args, expected = CASES[name]
    script = Path(train.__file__)
    before = files(workplace)
    done = subprocess.run(
        [sys.executable, str(script), *with_text(args)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "40"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    for words in expected:
        assert words in done.stderr
    assert files(workplace) == before
