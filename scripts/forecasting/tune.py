"""ladder.py tune: the learning rate, and where asked the batch and the weight decay, that serve a whole ladder.

Invariant: trials are ordinary runs of the ladder's smallest size, which is the base of µP, so what is best there is
meant for the target too. Each goes through its whole schedule: one that was cut off would say little of a longer one.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from parallax.storage import write_json
from parallelism.exit_status import FAILED
from scripts.common.command_line import parse, split_at_dashes, tell, writing
from scripts.common.tables import show_numbers
from scripts.forecasting.flags import TuneFlags
from scripts.forecasting.ladder import Ladder, Member, read_ladder, result_of
from scripts.forecasting.running import train_member

DESCRIPTION = """Choose the learning rate by successive halving on the smallest size (Jamieson & Talwalkar 2016,
arXiv:1502.07943): a share of the settings goes on to twice the steps. What follows -- goes to train.py."""
LEAST_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is tried."""

    rate: float
    batch_size: int
    weight_decay: float

    @property
    def name(self) -> str:
        return f"{self.rate:g}-{self.batch_size}-{self.weight_decay:g}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting after so many tokens."""

    setting: Setting
    steps: int
    loss: float
    """Held out, after its last step; infinite where it failed."""


def tune(args: Sequence[str]) -> int:
    """Writes tune.json and says what is best. Exit status: 0, or that of train.py where that was stopped."""
    own, passed = split_at_dashes(args)
    flags = parse(TuneFlags, description=DESCRIPTION, args=own)
    ladder = read_ladder(flags.ladder)
    settings, trials = _settings(ladder, flags), []
    for longest in rungs(ladder, len(settings), flags.keep):
        rung = []
        for setting in settings:
            trial, status = _try(ladder, setting, longest, passed or [])
            if trial is None:
                tell(f"go on     python scripts/ladder.py tune {ladder.folder}")
                return status
            rung.append(trial)
        trials += rung
        rung.sort(key=lambda trial: trial.loss)
        if not math.isfinite(rung[0].loss):
            raise ValueError(f"no setting that was tried for {longest} steps came to their end; try lower --rates")
        settings = [trial.setting for trial in rung[: max(1, math.floor(flags.keep * len(rung)))]]
    return _say(ladder, trials, settings[0])


def _settings(ladder: Ladder, flags: TuneFlags) -> list[Setting]:
    batches = flags.batch_sizes or (ladder.train.batch_size,)
    decays = flags.weight_decays or (ladder.learning.weight_decay,)
    return [Setting(*each) for each in itertools.product(flags.rates, batches, decays)]


def rungs(ladder: Ladder, count: int, keep: float) -> Iterator[int]:
    """Steps of each rung, at the ladder's batch: the last has those of the longest run of the smallest size.

    Raises ValueError if that is too short for so many settings.
    """
    smallest = _smallest(ladder)
    number = 1
    while count > 1:
        count, number = max(1, math.floor(keep * count)), number + 1
    first = smallest.steps // 2 ** (number - 1)
    if first < LEAST_STEPS:
        rule = f"{smallest.steps} steps, halved {number - 1} times, must leave {LEAST_STEPS}"
        raise ValueError(f"{rule}; try fewer --rates, or design a ladder with longer runs")
    return iter([smallest.steps // 2 ** (number - 1 - rung) for rung in range(number)])


def _smallest(ladder: Ladder) -> Member:
    """The longest run of the smallest size."""
    return min(ladder.members, key=lambda member: (member.params, -member.steps))


def _try(ladder: Ladder, setting: Setting, steps: int, passed: Sequence[str]) -> tuple[Trial | None, int]:
    """A trial, and the exit status of train.py; no trial where it was stopped."""
    steps = max(1, steps * ladder.train.batch_size // setting.batch_size)
    tried = dataclasses.replace(
        ladder,
        folder=ladder.folder / "tune",
        train=dataclasses.replace(ladder.train, batch_size=setting.batch_size),
        learning=dataclasses.replace(ladder.learning, learning_rate=setting.rate, weight_decay=setting.weight_decay),
    )
    member = dataclasses.replace(_smallest(ladder), name=f"{setting.name}-{steps}", steps=steps)
    result, status = result_of(tried, member), 0
    if result.loss is None and not result.failure:
        status = train_member(tried, member, passed)
        result = result_of(tried, member)
    if result.loss is None and not result.failure and status != FAILED:
        return None, status
    return Trial(setting, steps, math.inf if result.loss is None else result.loss), status


def _say(ladder: Ladder, trials: Sequence[Trial], best: Setting) -> int:
    rows = []
    for trial in trials:
        own = trial.setting
        loss = f"{trial.loss:.4f}" if math.isfinite(trial.loss) else "failed"
        rows.append((f"{own.rate:.3g}", str(own.batch_size), f"{own.weight_decay:g}", f"{trial.steps:,}", loss))
    title = f"{ladder.folder}: {len(trials)} trials of width {_smallest(ladder).model.embed_dim}"
    show_numbers(title, ("rate", "batch", "weight decay", "steps", "loss"), rows)
    values = [dataclasses.asdict(trial) for trial in trials]
    for value in values:
        value["loss"] = value["loss"] if math.isfinite(value["loss"]) else None
    with writing(str(ladder.folder), "copy the ladder"):
        write_json(ladder.folder / "tune.json", {"best": dataclasses.asdict(best), "trials": values})
    kind = ladder.target.parametrization.kind
    print(
        f"for the ladder and its target: --learning-rate {best.rate:g} --batch-size {best.batch_size} "
        f"--weight-decay {best.weight_decay:g}"
    )
    if kind == "standard":
        print("warning: in the standard parametrization the best rate of the target is lower; design with mup")
    if best.rate in (min(trial.setting.rate for trial in trials), max(trial.setting.rate for trial in trials)):
        print("warning: the best rate is at the end of those that were tried; try further --rates")
    return 0
