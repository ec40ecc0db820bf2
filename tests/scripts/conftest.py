"""What tests of scripts share: a script's main called in this process, and small runs of train.py."""

import contextlib
import functools
import inspect
import io
import random
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest

from parallelism import reduction
from parallelism.pmap import Pmap
from scripts import launch as launch_script
from scripts import train
from scripts.launching.run import run
from scripts.training import job, record
from tests.scripts.cloud import Cloud
from tests.scripts.runs import SHORT, SMALL


@pytest.fixture(autouse=True, scope="session")
def shared_programs():
    """Runs of train.py in this process that take the same steps of the same model trace and compile them once.

    What a run binds its step from are frozen values, and JAX compiles a function that it knows no second time.
    """
    compiled, compile_pmap = {}, Pmap.compile

    def compile_once(self, step):
        return compiled.setdefault((step, *self.devices), compile_pmap(self, step))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pmap, "compile", compile_once)
        for module, names in ((job, ("bind_state", "bind_step", "make_evaluation")), (reduction, ("mean", "pmean"))):
            for name in names:
                patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


@pytest.fixture(autouse=True, scope="session")
def sources_are_read_once():
    """For each command line tyro looks for the comments of flags in their classes, whose files Python parses for that:
    half of the time of a command line that is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        yield


@contextlib.contextmanager
def calling(folder: Path, patch: pytest.MonkeyPatch):
    """Calls a script's main in this process, in the folder; signal handlers are put back afterwards.

    Gives its exit status. Runs draw no loss.png, which takes half of a short one's time.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    patch.chdir(folder)
    patch.setattr(record, "plot_loss", lambda folder: None)

    def call(script, *args, stdin="") -> int:
        patch.setattr(sys, "argv", [f"{script.__name__.rpartition('.')[2]}.py", *map(str, args)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            return script.main()
        except SystemExit as exit:
            return exit.code

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """`calling` in a folder of the test's own: (exit status, standard output, standard error)."""
    with calling(tmp_path, monkeypatch) as called:
        yield lambda script, *args, stdin="": (called(script, *args, stdin=stdin), *capfd.readouterr())


@pytest.fixture
def paste(call):
    """Runs a command for train.py that was printed: what `call` gives."""

    def paste(command: str) -> tuple[int, str, str]:
        words = [word for word in shlex.split(command) if not word.startswith("JAX_NUM_CPU_DEVICES=")]
        assert words[:2] == ["python", "train.py"]
        return call(train, *words[2:])

    return paste


@pytest.fixture
def refuses(call, tmp_path):
    """Checks that a script ends with one line that holds all of the words and a remedy, and leaves nothing behind."""

    def files():
        return sorted(tmp_path.rglob("*"))

    def check(script, args, *words):
        before = files()
        status, out, err = call(script, *args)
        assert (status, out) == (2, "")
        *notices, error = err.splitlines()
        assert error.startswith("error: ")
        assert not any(line.startswith("error: ") for line in notices)
        assert "; " in error, "no remedy"
        for word in words:
            assert word in error
        assert files() == before

    return check


@pytest.fixture
def text(tmp_path):
    """A folder to work in, with a text to learn."""
    write_text(tmp_path)
    return tmp_path


@pytest.fixture
def train_small(text, call):
    """Calls train.py with a small model for a few steps on the text."""

    def train_small(*flags: str) -> tuple[int, str, str]:
        return call(train, "--dataset", "text.txt", *SMALL, *SHORT, *flags)

    return train_small


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """The folder of a finished run, trained once."""
    folder = tmp_path_factory.mktemp("template")
    write_text(folder)
    flags = ["--dataset", "text.txt", *SMALL, *SHORT, "--output-dir", "run"]
    with pytest.MonkeyPatch.context() as patch, calling(folder, patch) as call:
        assert call(train, *flags) == 0
    return folder / "run"


@pytest.fixture
def finished(template, text):
    """The finished run, copied beside the text that it was trained on."""
    return Path(shutil.copytree(template, text / "run"))


def write_text(folder: Path) -> None:
    rng = random.Random(0)
    words = ["king", "queen", "crown", "sword", "night", "and", "the"]
    (folder / "text.txt").write_text(" ".join(rng.choice(words) for _ in range(600)))


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A cloud of fakes that launch.py sees, called in this process, and a checkout for it to ship."""
    cloud = Cloud(tmp_path)
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(launch_script.COMMANDS, "run", functools.partial(run, checkout=cloud.checkout))
    yield cloud
    cloud.close()


@pytest.fixture
def launch(call):
    """Calls launch.py: (exit status, lines of output, lines of standard error)."""

    def launch(*args):
        status, out, err = call(launch_script, *args)
        return status, out.splitlines(), err.splitlines()

    return launch
