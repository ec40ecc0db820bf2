"""Bad input to train.py: one line that names rule, value and remedy, exit status 2, nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import train

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
RULES = {
    "broken.json": "{batch: data}",
    "bytes.json": b"\xff\xfe\x00",
    "list.json": '["batch", "mlp"]',
    "string.json": '{"batch": "data"}',
    "numbers.json": '{"batch": [8]}',
    "logical.json": '{"batch": ["data"], "channels": ["tensor"]}',
    "axis.json": '{"batch": ["data"], "mlp": ["model"]}',
    "collision.json": '{"batch": ["data"], "embed": ["fsdp"], "mlp": ["fsdp"]}',
    "good.json": '{"batch": ["data"]}',
}
SEVERAL = ["--coordinator", "127.0.0.1:8482", "--num-processes", "2"]

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
    "indivisible heads": (
        ["--mesh", "tensor=8"],
        ["kv_heads=4", "tensor=8", "try a mesh with tensor=4 or kv_heads=8"],
    ),
    "indivisible sequence": (
        ["--mesh", "sequence=8", "--seq-len", "100"],
        ["seq_len=100", "divisible by 8", "try --seq-len 104"],
    ),
    "unused mesh axis": (
        ["--rules", "replicated", "--mesh", "tensor=8"],
        ["tensor=8", "splits nothing", "try"],
    ),
    "unused mesh axis, own rules": (
        ["--rules", "good.json", "--mesh", "data=4,sequence=2"],
        ["sequence=2", "splits nothing", "try"],
    ),
    "no mesh to choose": (
        ["--mesh", "auto", "--batch-size", "9", "--seq-len", "9"],
        ["mesh=auto", "8 devices", "batch_size=9", "try --batch-size 8"],
    ),
    "no mesh to choose with microbatches": (
        ["--mesh", "auto", "--batch-size", "9", "--seq-len", "9", "--accumulate", "3"],
        ["mesh=auto", "batch_size=9", "try --batch-size 24"],
    ),
    "auto for pmap": (["--strategy", "pmap", "--mesh", "auto"], ["auto", "not pmap", "--strategy mesh"]),
    "unknown rule set": (
        ["--strategy", "mesh", "--rules", "megatron"],
        ["megatron", "default, replicated", "check the spelling"],
    ),
    "rules for pmap": (
        ["--strategy", "pmap", "--rules", "good.json"],
        ["good.json", "not pmap", "--strategy mesh"],
    ),
    "rules for one device": (["--rules", "replicated"], ["replicated", "not single", "--strategy mesh"]),
    **{
        f"rules in {name}": (
            ["--strategy", "mesh", "--rules", name],
            [name, says, 'write an object such as {"batch"'],
        )
        for name, says in {
            "broken.json": "must be JSON (",
            "bytes.json": "must be JSON (",
            "list.json": "list of mesh axes",
            "string.json": "list of mesh axes",
            "numbers.json": "list of mesh axes",
        }.items()
    },
    "rule for no logical axis": (
        ["--strategy", "mesh", "--rules", "logical.json"],
        ["'channels'", "known are act_embed", "vocab"],
    ),
    "rule with no mesh axis": (
        ["--strategy", "mesh", "--rules", "axis.json"],
        ["'mlp'", "'model'", "known are data, fsdp, sequence, tensor"],
    ),
    "rules that collide": (
        ["--rules", "collision.json", "--mesh", "fsdp=8"],
        ["'fsdp'", "'mlp'", "'embed'", "remove it from one"],
    ),
    "unknown reduction": (["--reduction", "sum"], ["sum", "exact"]),
    "exact with tensor": (
        ["--reduction", "exact", "--mesh", "data=4,tensor=2"],
        ["reduction=exact", "tensor=2", "try --mesh data=8"],
    ),
    "exact with sequence": (
        ["--reduction", "exact", "--mesh", "fsdp=4,sequence=2"],
        ["reduction=exact", "sequence=2", "try --mesh data=8"],
    ),
    "exact without a cut, pmap": (
        ["--reduction", "exact", "--strategy", "pmap", "--batch-size", "24"],
        ["reduction=exact", "batch_size=24", "12 equal shards", "devices=8", "try --batch-size 32"],
    ),
    "exact without a cut, mesh": (
        ["--reduction", "exact", "--mesh", "data=2,fsdp=4", "--batch-size", "24"],
        ["reduction=exact", "batch_size=24", "12 equal shards", "data×fsdp=8", "try --batch-size 32"],
    ),
    "exact muon on shards": (
        ["--reduction", "exact", "--optimizer", "muon", "--mesh", "fsdp=8"],
        ["reduction=exact", "optimizer=muon", "try --mesh data=8"],
    ),
    "no checks": (["--check-interval", "0"], ["check_interval=0", "at least 1", "try 250"]),
    "coordinator alone": (
        ["--coordinator", "127.0.0.1:8482"],
        [
            "--num-processes is missing",
            "give --coordinator HOST:PORT, --num-processes and --process-id together",
        ],
    ),
    "no coordinator": (["--num-processes", "2", "--process-id", "0"], ["--coordinator is missing", "give"]),
    "no process id": (SEVERAL, ["--process-id is missing", "give"]),
    "process id beyond": ([*SEVERAL, "--process-id", "2"], ["--process-id 2", "from 0 to 1", "try 0"]),
    "process id below": ([*SEVERAL, "--process-id", "-1"], ["--process-id -1", "from 0 to 1", "try 0"]),
    "no processes": (
        ["--coordinator", "127.0.0.1:8482", "--num-processes", "0", "--process-id", "0"],
        ["--num-processes 0", "at least 1", "try 2"],
    ),
    **{
        f"coordinator {address!r}": (
            ["--coordinator", address, "--num-processes", "2", "--process-id", "0"],
            [address, "must be HOST:PORT", "try 127.0.0.1:8482"],
        )
        for address in ("localhost", ":8482", "127.0.0.1:", "localhost:port")
    },
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
    for name, content in RULES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
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
