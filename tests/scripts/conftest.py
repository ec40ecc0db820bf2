"""Small runs of train.py, in this process and in one of their own."""

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import train

TRAIN = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
SMALL = [
    *("--model.num-layers", "1", "--model.embed-dim", "32"),
    *("--model.mlp-dim", "32", "--model.head-dim", "8"),
]
SHORT = [
    *("--steps", "12", "--batch-size", "16", "--seq-len", "16"),
    *("--log-interval", "4", "--eval-interval", "6"),
]


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


@pytest.fixture(scope="session")
def command():
    """What starts the same run in a process of its own; more flags may follow."""
    return [sys.executable, str(TRAIN), "--dataset", "text.txt", *SMALL, *SHORT]


@pytest.fixture(scope="session")
def template(tmp_path_factory, command):
    """The folder of a finished run, trained once."""
    folder = tmp_path_factory.mktemp("template")
    write_text(folder)
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
