"""ladder.py run: the runs of a ladder, one after the other, each by train.py.

Invariant: a run that is killed goes on from its last checkpoint and ends with the same bits, so a ladder that is killed
anywhere is gone on with by the same command and gives the same fit.
"""

import contextlib
import dataclasses
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from parallax.config import PRESETS, OptimizerConfig, TrainConfig
from parallax.storage import write_atomically
from parallelism.exit_status import FAILED
from scripts.common.command_line import parse, split_at_dashes, tell
from scripts.common.config_words import config_words
from scripts.forecasting.flags import RunFlags
from scripts.forecasting.ladder import Ladder, Member, read_ladder, require_names, result_of
from scripts.launching.child import tied

DESCRIPTION = """Train all runs of a ladder that are not finished. What follows -- goes to train.py, as
-- --strategy mesh --mesh data=4 does."""
TRAIN = Path(__file__).resolve().parent.parent / "train.py"
EVALUATIONS = 10
"""At least, of each run, from which the expected curve of a forecast is made."""
CHECKPOINTS = 4


def run(args: Sequence[str]) -> int:
    """Exit status: 0 all are finished or failed by themselves, or a stop was asked for; else that of train.py."""
    own, passed = split_at_dashes(args)
    flags = parse(RunFlags, description=DESCRIPTION, args=own)
    ladder = read_ladder(flags.ladder)
    for number, member in _chosen(ladder, flags.only):
        result = result_of(ladder, member)
        if result.loss is not None or result.failure:
            continue
        tell(f"ladder    run {number} of {len(ladder.members)}: {member.name}")
        status = train_member(ladder, member, passed or [])
        if status not in (0, FAILED):
            return status
        result = result_of(ladder, member)
        if status == 0 and result.loss is None and not result.failure:
            tell(f"go on     python scripts/ladder.py run {ladder.folder}")
            return 0
    return _say_end(ladder)


def _chosen(ladder: Ladder, only: Sequence[str]) -> list[tuple[int, Member]]:
    """Members of these names, or all, with their numbers from 1. Raises ValueError for a name that none has."""
    require_names(ladder, "--only", only)
    return [each for each in enumerate(ladder.members, start=1) if not only or each[1].name in only]


def train_member(ladder: Ladder, member: Member, passed: Sequence[str]) -> int:
    """Trains a member to its end; where it failed by itself, that is noted, and it is not tried again."""
    argv = tied([sys.executable, str(TRAIN), *train_words(ladder, member), *passed])
    last = ""
    how: Any = {"stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    with subprocess.Popen(argv, **how) as process, _signals_for(process):  # noqa: S603
        for line in process.stderr or ():
            sys.stderr.write(line)
            last = line.strip() or last
        status = process.wait()
    if status == FAILED:
        reason = last.removeprefix("error: ") or "it said nothing"
        write_atomically(ladder.failure_file(member), reason.encode())
    return status if status >= 0 else 128 - status  # of a signal, as a shell has it


@contextlib.contextmanager
def _signals_for(process: subprocess.Popen) -> Iterator[None]:
    """Ctrl-C reaches train.py too, which saves and stops; SIGTERM comes here alone, and is passed on."""
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, kept[0])
        signal.signal(signal.SIGTERM, kept[1])


def train_words(ladder: Ladder, member: Member) -> list[str]:
    """What train.py is called with."""
    preset = PRESETS["tiny"]
    model = dataclasses.replace(member.model, vocab_size=preset.vocab_size)  # the tokenizer's
    train = dataclasses.replace(
        ladder.train,
        steps=member.steps,
        seed=member.seed,
        eval_interval=max(1, member.steps // EVALUATIONS),
        checkpoint_interval=max(1, member.steps // CHECKPOINTS),
        keep=1,
    )
    data = [(f"--{name.replace('_', '-')}", str(value)) for name, value in ladder.data.items() if value is not None]
    return [
        *("--output-dir", str(ladder.run_folder(member)), "--resume"),
        *(word for pair in data for word in pair),
        *("--config", "tiny", *config_words(model, preset, "model.")),
        *config_words(train, TrainConfig()),
        *config_words(ladder.learning, OptimizerConfig()),
    ]


def _say_end(ladder: Ladder) -> int:
    results = [result_of(ladder, member) for member in ladder.members]
    for result in results:
        if result.failure:
            tell(f"left out  {result.member.name}: {result.failure}")
    finished = sum(result.loss is not None for result in results)
    tell(f"finished  {finished} of {len(results)} runs; python scripts/ladder.py fit {ladder.folder}")
    return 0
