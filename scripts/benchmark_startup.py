"""`benchmark.py startup`: how long train.py takes to its first finished step.

Invariant: every start is a process of its own, with an empty compilation cache when it is cold and with the one of the
same program when it is warm. Files of Python and its packages have been read before: the file cache is warm.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from scripts.benchmark_report import expect_quiet, show, write_report
from scripts.benchmark_rounds import SCRIPTS, progress, spread
from scripts.benchmark_runs import environment
from scripts.common.command_line import parse

STAGES = {
    "interpreter": "Python itself",
    "imports": "imports",
    "first_step": "start to the first finished step",
}


@dataclasses.dataclass(frozen=True)
class Flags:
    flags: Annotated[tuple[str, ...], tyro.conf.Positional] = ("--config", "nano")
    """Flags of train.py, after --; by default --config nano."""
    rounds: int = 5
    """How many cold and how many warm starts."""
    output: str | None = None
    """The results as JSON; by default benchmarks/startup.json."""

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1; try 5")


def startup(args: Sequence[str]) -> int:
    """Measures cold and warm starts in turn; returns 0."""
    flags = parse(Flags, description="Time train.py from its start to its first finished step.", args=args)
    busy = expect_quiet()
    kinds: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder, progress("starting", 2 * flags.rounds + 1) as bar:
        warm = Path(folder, "warm")
        _start(flags.flags, warm, Path(folder, "first"))  # fills the caches, of files too
        bar.advance()
        for number in range(flags.rounds):
            for kind in kinds:
                cache = warm if kind == "warm" else Path(folder, f"cold{number}")
                bar.say(f"{kind} start")
                kinds[kind].append(_start(flags.flags, cache, Path(folder, f"{kind}-run{number}")))
                bar.advance()
    results = {"flags": flags.flags, **kinds}
    show(TITLE, COLUMNS, table(results))
    write_report(flags.output, "startup", results, busy=busy)
    return 0


def _start(flags: Sequence[str], cache: Path, run: Path) -> dict[str, float]:
    """Seconds by stage. Raises ValueError where train.py did not come to a step."""
    command = [sys.executable, str(SCRIPTS / "benchmark_first_step.py"), repr(time.time()), *flags]
    done = subprocess.run(  # noqa: S603 - this Python and a file of ours
        [*command, "--output-dir", str(run)], env=environment(cache), capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.splitlines() or ["nothing said"])[-1]
        raise ValueError(f"train.py ended with status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


TITLE = "Seconds, median (least to most)"
COLUMNS = ["stage", "cold: nothing compiled before", "warm: compiled before"]


def table(found: dict) -> list[list[str]]:
    """Rows under COLUMNS."""
    return [
        [words, *(str(spread([each[stage] for each in found[kind]])) for kind in ("cold", "warm"))]
        for stage, words in STAGES.items()
    ]
