"""benchmark.py, called in this process. No test depends on a time."""

import os
import sys

import pytest

from scripts import benchmark
from scripts.benchmarks import rounds


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    """What is measured is compiled as everything in tests is, since no time counts here."""
    monkeypatch.setitem(rounds.DEVICE, "XLA_FLAGS", os.environ["XLA_FLAGS"])


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Calls benchmark.py in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *args])
        try:
            status = benchmark.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def refuse(call):
    """Calls benchmark.py with bad input, which is answered by one line that holds `message`."""

    def refuse(args, message):
        status, out, err = call(*args.split())
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert message in err

    return refuse
