"""What a job says of itself, and what the processes of a run must have alike before its first step."""

import subprocess
import sys

import pytest

from parallax.training.optimizer import make_learning_rate
from scripts.launching.local import free_port
from scripts.training.flags import read_flags
from scripts.training.job import describe_schedule, facts, prepare_job
from tests.scripts.runs import SCRIPTS, SHORT, SMALL, local_environment

OTHERS = {
    "the text": ["--dataset", "other.txt"],
    "the tokenizer": ["--tokenizer", "byte"],
    "the layout": ["--strategy", "pmap"],
    "the first batch": ["--seed", "1"],
    "--learning-rate": ["--learning-rate", "0.5"],
    "the sample prompts": ["--sample-prompts", "text.txt"],
    "--print-param-hash": ["--print-param-hash"],
}


@pytest.fixture
def facts_of(text, monkeypatch):
    monkeypatch.chdir(text)
    (text / "other.txt").write_text((text / "text.txt").read_text()[::-1])
    (text / "moved.txt").write_bytes((text / "text.txt").read_bytes())

    def facts_of(*flags):
        return facts(prepare_job(read_flags(["--dataset", "text.txt", "--output-dir", "run", *SMALL, *SHORT, *flags])))

    return facts_of


def test_each_difference_that_matters_shows_under_its_name(facts_of):
    first = facts_of()
    assert first["package jax"][0]
    for name, flags in OTHERS.items():
        assert facts_of(*flags)[name][0] != first[name][0]
    moved = facts_of("--dataset", "moved.txt")
    assert [name for name in first if moved[name][0] != first[name][0]] == []  # a path is each machine's own


def test_hosts_with_other_texts_end_before_the_first_step_and_name_both(text):
    """Two machines with one command line."""
    (text / "b").mkdir()
    (text / "b" / "text.txt").write_text((text / "text.txt").read_text().replace("king", "duke"))
    flags = ["--dataset", "text.txt", "--output-dir", str(text / "run"), "--strategy", "pmap", *SMALL, *SHORT]
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPTS / "train.py", *flags, *where, number],
            cwd=folder,
            env=local_environment({}, 1),
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, folder in (("0", text), ("1", text / "b"))
    ]
    ended = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], ended
    assert ended[0] == ended[1]
    line = ended[0].splitlines()[-1]
    assert line.startswith(
        "error: the text must be the same in all processes of a run: process 0 has text file text.txt "
    )
    assert ", process 1 has text file text.txt with sha256 " in line
    assert not (text / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--steps 60", ""),
        ("--steps 90 --schedule-steps 60", "the rate falls until step 60 and stays at 0.0001; --schedule-steps 90"),
        ("--steps 40 --schedule-steps 60", "the rate would fall until step 60 and is cut off at step 40; "),
        ("--steps 4 --schedule-steps 60", "; --schedule-steps 4 --warmup-steps 1 lets it fall"),  # a tenth of 60 is 6
    ],
)
def test_a_schedule_that_is_not_as_long_as_the_run_is_named_with_flags_that_make_it_so(flags, words):
    said = describe_schedule(read_flags(flags.split()))
    assert words in said
    assert bool(said) == bool(words)
    advised = said.partition("; ")[2].partition(" lets")[0]
    settled = read_flags([*flags.split(), *advised.split()])
    assert describe_schedule(settled) == ""
    make_learning_rate(settled.learning, settled.train.steps)
