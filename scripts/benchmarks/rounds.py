"""Contenders measured in turn, A B B A, and what their numbers say.

Invariant: no two contenders compute at the same time, ratios are taken within a round, and every other round goes
backwards, so that neither a machine whose speed drifts nor a place in the order favours anybody.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

TREE = Path(__file__).resolve().parents[2]
"""This checkout."""
WORKERS = ("scripts/benchmarks/worker.py", "scripts/benchmark_worker.py")
"""The program of a contender in a checkout; the second is where it was until November 2026."""
BEFORE = "before"
"""The contender that runs the checkout of --against; it comes second, right after what it is compared with."""
DEVICE = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
"""Environment of whatever is measured."""
ALLOCATOR = {
    # That of train.py, for every worker: freed memory is kept; and huge pages, which it does not ask for.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
OFFLINE = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

Rounds = dict[str, list[dict[str, Any]]]
"""Results by contender, one a round."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Flags of the commands that measure in rounds."""

    rounds: int = 10
    """How often each contender is measured."""
    seconds: float = 1.5
    """How long a round of a contender should last."""
    output: str | None = None
    """The results as JSON; by default benchmarks/COMMAND.json."""

    def __post_init__(self):
        require_positive(self, "rounds", "seconds")


@dataclasses.dataclass(frozen=True)
class Compared(Timing):
    """Flags of the commands that also measure another checkout."""

    against: str | None = None
    """A folder with another checkout of this project, measured as `before` beside this one."""

    def __post_init__(self):
        super().__post_init__()
        if self.against:
            find(Path(self.against), WORKERS)


def require_positive(flags: Any, *names: str) -> None:
    """Raises ValueError for the first of these flags that is not above 0, with its default as the remedy."""
    for name in names:
        if getattr(flags, name) <= 0:
            default = getattr(type(flags), name)
            raise ValueError(f"{name}={getattr(flags, name)} must be positive; try {default}")


class Contender(Protocol):
    """Something that is measured."""

    @property
    def name(self) -> str: ...

    def ask(self, units: int) -> dict[str, Any]:
        """Does so many units of work, in {"seconds": …}, and reports what else it measured."""
        ...


class Worker:
    """A contender's process, from its start until `close`; ready when the constructor returns.

    Args:
      kind: of work, as worker.py names it, with the arguments `spec`.
      tree: the checkout whose code runs.

    Raises:
      ValueError: an argument is wrong, a package is missing, or the tree is no checkout.
      RuntimeError: it died; with the last lines that it wrote.
    """

    def __init__(self, name: str, kind: str, tree: Path = TREE, **spec: Any):
        self.name, program = name, find(tree, WORKERS)
        # To a file, since a pipe that nobody reads fills up; `close` closes it.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(  # noqa: S603 - this Python and a file of ours
            [sys.executable, str(program), kind, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(tree) | ALLOCATOR | OFFLINE,
        )
        try:
            self.facts: dict[str, Any] = self._read("facts")
        except BaseException:
            self.close()
            raise

    def ask(self, units: int) -> dict[str, Any]:
        """What it measured; waits for it."""
        stdin = self._process.stdin
        if stdin is None:
            raise RuntimeError(f"{self.name} has no standard input")
        with contextlib.suppress(BrokenPipeError):  # it died, which reading reports
            stdin.write(json.dumps({"units": units}) + "\n")
            stdin.flush()
        return self._read("result")

    def _read(self, what: str) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = "\n".join(self._errors.read().splitlines()[-25:])
            raise RuntimeError(f"{self.name} ended with status {self._process.returncode}\n{last}")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(f"{self.name}: {answer['error']}")
        return answer[what]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def find(tree: Path, files: Sequence[str]) -> Path:
    """The first of these files of a checkout. Raises ValueError where it has none of them."""
    for file in files:
        if (tree / file).exists():
            return (tree / file).resolve()
    raise ValueError(f"--against {tree} holds no {files[0]}; give a folder with a checkout of this project")


def environment(tree: Path = TREE) -> dict[str, str]:
    """Variables of a process that runs a checkout's code on one CPU device."""
    paths = [str(tree.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | DEVICE | {"PYTHONPATH": os.pathsep.join(paths)}


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on standard error; call it with what goes on and how much of `total` is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda what, done: shown.update(task, description=what, completed=done)


def measure(contenders: Sequence[Contender], timing: Timing, what: str) -> Rounds:
    """Results of each contender, taken in turn, there and back, after a round that is not counted.

    A round is as many units of work as last `timing.seconds`; to what a contender reports come its `units` and the
    seconds of `each` of them.
    """
    units = {}
    for contender in contenders:
        contender.ask(1)
        units[contender.name] = max(1, round(2 * timing.seconds / contender.ask(2)["seconds"]))
    results: Rounds = {contender.name: [] for contender in contenders}
    with progress(timing.rounds + 1) as show:
        for number in range(timing.rounds + 1):
            for contender in contenders if number % 2 else reversed(contenders):
                show(f"{what}: {contender.name}", number)
                count = units[contender.name]
                found = contender.ask(count)
                if number:
                    results[contender.name].append(found | {"units": count, "each": found["seconds"] / count})
    return results


def ratio(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The quotients of two contenders' numbers, round by round; raises ValueError for unequal numbers of rounds."""
    return [a / b for a, b in zip(above, below, strict=True)]
