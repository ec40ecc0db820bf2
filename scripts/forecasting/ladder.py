"""ladder.json: what a ladder's runs are, which of them are finished, and what they reached.

Invariant: a ladder does not change once it is designed, so its hash says on which runs a forecast stands. What its runs
reached is in their own folders.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallax.config import OptimizerConfig, TrainConfig, TransformerConfig, config_from_dict, config_to_dict
from parallax.storage import write_json
from parallax.training.metric_writers import METRICS_FILE, read_metrics
from scripts.common.command_line import writing
from scripts.forecasting.law import Point
from scripts.training.summary import SUMMARY_FILE

LADDER_FILE = "ladder.json"


@dataclasses.dataclass(frozen=True)
class Member:
    """A run of the ladder."""

    name: str
    """Of its folder in runs/."""
    model: TransformerConfig
    steps: int
    seed: int
    params: int
    """N, as `family.size_of`."""
    flops: float
    """Of all its steps."""
    seconds: float
    """How long it is expected to take on the machine that designed it."""


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Runs of a family of models on one text, and the model that they are to tell of."""

    folder: Path
    target: TransformerConfig
    data: dict[str, Any]
    """`design.DATA` as train.py takes them; None where they are not given."""
    corpus_sha256: str
    unique_tokens: int
    """Different ones in the training text."""
    train: TrainConfig
    """Of every member, but for its steps, its seed and how often it is looked at."""
    learning: OptimizerConfig
    members: tuple[Member, ...]

    def tokens(self, member: Member) -> int:
        """D, that it learns from."""
        return member.steps * self.train.batch_size * self.train.seq_len

    def run_folder(self, member: Member) -> Path:
        return self.folder / "runs" / member.name

    def failure_file(self, member: Member) -> Path:
        """Says why the member failed, where it would again."""
        return self.folder / "runs" / f"{member.name}.failed"

    @property
    def sha256(self) -> str:
        """Of the design."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        plain = ("data", "corpus_sha256", "unique_tokens")
        members = [
            {field.name: getattr(each, field.name) for field in dataclasses.fields(each)}
            | {"model": config_to_dict(each.model)}
            for each in self.members
        ]
        return {name: getattr(self, name) for name in plain} | {
            "target": config_to_dict(self.target),
            "train": config_to_dict(self.train),
            "learning": config_to_dict(self.learning),
            "members": members,
        }

    def write(self) -> None:
        """Raises ValueError if the folder is there already, or cannot be written."""
        require_new(self.folder)
        with writing(f"--output {self.folder}"):
            self.folder.mkdir(parents=True)
            write_json(self.folder / LADDER_FILE, self.to_json())


def require_new(folder: Path) -> None:
    """Raises ValueError where something is already."""
    if folder.exists():
        raise ValueError(f"--output {folder} exists already; choose another")


def read_ladder(folder: Path) -> Ladder:
    """Raises ValueError where there is none."""
    path = folder / LADDER_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        members = [Member(**each | {"model": config_from_dict(each["model"])}) for each in values.pop("members")]
        target, train = config_from_dict(values.pop("target")), TrainConfig(**values.pop("train"))
        learning = OptimizerConfig(**values.pop("learning"))
        return Ladder(folder, target, train=train, learning=learning, members=tuple(members), **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder} has no {LADDER_FILE} ({error}); make one with ladder.py design") from None


def require_names(ladder: Ladder, flag: str, given: Sequence[str]) -> None:
    """Raises ValueError for a name that no run has."""
    names = [member.name for member in ladder.members]
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"{flag} {' '.join(unknown)} is no run of {ladder.folder}; choose from {', '.join(names)}")


@dataclasses.dataclass(frozen=True)
class Result:
    """How a member ended."""

    member: Member
    loss: float | None
    """Held out, after its last step, in nats a token; None where it did not get there."""
    failure: str | None
    """Why it ended before, where it did."""
    curve: tuple[tuple[float, float], ...]
    """Share of its steps and held-out loss, at each evaluation."""


def result_of(ladder: Ladder, member: Member) -> Result:
    """What the member's run folder says. Raises ValueError if it learned from another text than the ladder's."""
    folder, failure = ladder.run_folder(member), ladder.failure_file(member)
    rows = [row for row in read_metrics(folder / METRICS_FILE) if row.get("eval_loss") is not None]
    curve = tuple((row["step"] / member.steps, row["eval_loss"]) for row in rows)
    if failure.exists():
        return Result(member, None, failure.read_text(encoding="utf-8"), curve)
    try:
        finished = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))["finished"]
    except (OSError, ValueError, LookupError, TypeError):
        finished = False
    if not finished:
        return Result(member, None, None, curve)
    _require_text(ladder, folder)
    if not curve or curve[-1][0] < 1:
        return Result(member, None, "its last held-out loss is not finite", curve)
    return Result(member, curve[-1][1], None, curve)


def _require_text(ladder: Ladder, folder: Path) -> None:
    try:
        sha256 = json.loads((folder / "config.json").read_text(encoding="utf-8"))["corpus"]["sha256"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        rule = f"{folder / 'config.json'} must say what the run learned from and cannot be read ({error})"
        raise ValueError(f"{rule}; restore it, or remove {folder} and train it again") from None
    if sha256 != ladder.corpus_sha256:
        rule = f"{folder} must have learned from the text of {ladder.folder} (sha256 {ladder.corpus_sha256[:12]}…)"
        raise ValueError(f"{rule} and has from another ({sha256!s:.12}…); design another ladder of what is there now")


def point_of(ladder: Ladder, result: Result) -> Point:
    """A finished run as the law takes it."""
    member = result.member
    if result.loss is None:
        raise ValueError(f"run {member.name} is not finished; go on with ladder.py run {ladder.folder}")
    return Point(member.params, ladder.tokens(member), result.loss, ladder.unique_tokens)
