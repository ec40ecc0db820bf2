"""Bad input to train.py: one line that names rule, value and remedy, exit status 2, nothing left behind."""

import pytest

from scripts import train
from tests.scripts.cases import read_cases
from tests.scripts.runs import run_script

CASES = """
--stepz 5 | --stepz | --help
--steps many | --steps | many | --help
--strategy magic | magic | pmap
--model.depth 3 | --model.depth | --help
--steps 0 | steps=0 | at least 1 | try 1000
--steps 5 --warmup-steps 9 | warmup_steps=9 | steps=5 | try 1
--model.num-kv-heads 3 | num_kv_heads=3 | num_heads=4 | try 2
--model.dropout-rate 1 | dropout_rate=1 | [0, 1) | try 0.1
--accumulate 5 | accumulate=5 | batch_size=32 | try 4
--seq-len 99 --model.max-seq-len 64 | seq_len=99 | max_seq_len=64 | try --seq-len 64
--mode overfit --model.max-seq-len 9 --seq-len 9 | sentence of 60 tokens | max_seq_len=9 | try --model.max-seq-len 60
--mode single --strategy pmap | single | pmap | try --mode distributed
--mode distributed --strategy single | single | try --strategy pmap
--strategy pmap --mesh data=8 | data=8 | --strategy mesh
--mesh data=2 | data=2 | 8 are visible | try JAX_NUM_CPU_DEVICES=2, or --mesh data=8
--schedule-steps 0 | schedule_steps=0 | at least 1 | try 1000
--schedule-steps 5 --warmup-steps 9 | warmup_steps=9 | schedule_steps=5 | try 1
--strategy pmap --batch-size 12 | batch_size=12 | try --batch-size 16
--strategy mesh --batch-size 9 | batch_size=9 | try --batch-size 8
--mesh fsdp=8 --model.embed-dim 100 | embed=100 | fsdp=8 | try
--mesh tensor=8 | kv_heads=4 | tensor=8 | try a mesh with tensor=4 or kv_heads=8
--rules replicated --mesh tensor=8 | tensor=8 | splits nothing | try
--mesh auto --batch-size 9 --seq-len 9 --accumulate 3 | mesh=auto | batch_size=9 | try --batch-size 24
--strategy pmap --mesh auto | auto | not pmap | --strategy mesh
--strategy mesh --rules megatron | megatron | default, replicated | check the spelling
--strategy pmap --rules good.json | good.json | not pmap | --strategy mesh
--rules replicated | replicated | not single | --strategy mesh
--strategy mesh --rules broken.json | broken.json | must be JSON ( | write an object such as
--strategy mesh --rules bytes.json | bytes.json | must be JSON ( | write an object such as
--strategy mesh --rules list.json | list.json | list of mesh axes | write an object such as
--strategy mesh --rules logical.json | 'channels' | known are act_embed | vocab
--strategy mesh --rules axis.json | 'mlp' | 'model' | known are data, fsdp, expert, sequence, tensor
--rules collision.json --mesh fsdp=8 | 'fsdp' | 'mlp' | 'embed' | remove it from one
--reduction exact --mesh data=4,tensor=2 | reduction=exact | tensor=2 | try --mesh data=8
--reduction exact --mesh data=2,fsdp=4 --batch-size 24 | 12 equal shards | data×fsdp=8 | try --batch-size 32
--step-timeout -1 | step_timeout=-1 | must not be negative | try --step-timeout 300
--local-device-ids 0 | --local-device-ids | leave it out
--check-interval 0 | check_interval=0 | at least 1 | try 250
--coordinator 127.0.0.1:8482 | --num-processes is missing | --num-processes and --process-id together
--num-processes 2 --process-id 0 | --coordinator is missing | give
--coordinator 127.0.0.1:8482 --num-processes 2 | --process-id is missing | give
--coordinator 127.0.0.1:8482 --num-processes 2 --process-id 2 | --process-id 2 | from 0 to 1 | try 0
--coordinator 127.0.0.1:8482 --num-processes 0 --process-id 0 | --num-processes 0 | at least 1 | try 2
--coordinator localhost --num-processes 2 --process-id 0 | localhost | must be HOST:PORT | try 127.0.0.1:8482
--coordinator localhost:port --num-processes 2 --process-id 0 | localhost:port | must be HOST:PORT | try 127.0.0.1:8482
--dataset nowhere.txt | nowhere.txt | check the spelling
--dataset tiny_shakespeare --data-dir nowhere | --data-dir=nowhere | create it
--dataset tiny_shakespeare --data-dir wrong | tiny_shakespeare.txt | sha256 | delete
--dataset empty.txt | empty.txt | empty
--dataset binary.txt | binary.txt | UTF-8
--dataset short.txt | seq_len=128 | shorter --seq-len
--tokenizer words | words | char
--tokenizer bpe:3 | bpe:3 | 257 | try bpe:1024
--output-dir taken | taken | --resume
--output-dir text.txt | text.txt | is a file
--output-dir taken --resume | taken | config.json
--resume | --output-dir
"""
FILES = {
    "text.txt": "the quick brown fox jumps over the lazy dog. " * 60,
    "short.txt": "too short",
    "empty.txt": "",
    "binary.txt": b"\xff\xfe\x00\x80",
    "wrong/tiny_shakespeare.txt": "To be, or not to be",
    "taken/notes.txt": "mine",
    "broken.json": "{batch: data}",
    "bytes.json": b"\xff\xfe\x00",
    "list.json": '["batch", "mlp"]',
    "logical.json": '{"batch": ["data"], "channels": ["tensor"]}',
    "axis.json": '{"batch": ["data"], "mlp": ["model"]}',
    "collision.json": '{"batch": ["data"], "embed": ["fsdp"], "mlp": ["fsdp"]}',
    "good.json": '{"batch": ["data"]}',
}


@pytest.fixture
def workplace(tmp_path):
    """A folder with texts and rules, good and bad."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


@pytest.mark.parametrize(("args", "words"), read_cases(CASES))
def test_one_line_and_no_folder(args, words, workplace, refuses):
    refuses(train, ["--dataset", "text.txt", *args], *words)


@pytest.mark.parametrize("args", ["--steps many", "--accumulate 5"])
def test_the_same_from_a_shell(args, workplace):
    before = sorted(workplace.rglob("*"))
    done = run_script("train.py", "--dataset", "text.txt", *args.split(), cwd=workplace, env={"COLUMNS": "40"})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert args.split()[1] in done.stderr
    assert sorted(workplace.rglob("*")) == before
