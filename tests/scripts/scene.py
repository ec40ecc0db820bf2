"""A run that faults strike, and what is known of it between its attempts.

Invariant: an attempt must go on from the newest checkpoint that is intact, and name those that are not.
"""

import contextlib
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.scripts.runs import ROOT, Layout, Training, checkpoints, rows

DISK_MEGABYTES = 24
NAME = "broken"
STRUCK = ROOT / "tests" / "claims" / "struck"
"""Lets signals hang a process or fail its device."""


class Misbehaved(RuntimeError):
    """The run did not do what it should have done."""


class Scene:
    """One run, and what is known of it between attempts."""

    def __init__(self, folder: Path, disk: Path, flags: list[str], rng: random.Random):
        self.folder, self.disk, self.flags, self.rng = folder, disk, flags, rng
        self.run = disk / NAME
        self.start = 0
        """The step that the attempt under way has to go on from."""
        self.damaged: list[int] = []
        """Checkpoints that it has to name."""
        self._record: int | None = None

    @staticmethod
    @contextlib.contextmanager
    def open(disk: Path, mounts: bool) -> Iterator[Path]:
        """The folder for the run: with mounts a small disk of its own."""
        disk.mkdir()
        if mounts:
            mount("-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(disk))
        try:
            yield disk
        finally:
            if mounts:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)

    def strike(self, fault: Any, layout: Layout) -> str:
        """One attempt, with one fault in it; a line about it.

        Raises:
          Misbehaved: it did not go on from the newest intact checkpoint, or did not end as it should.
        """
        damaged, self.damaged = self.damaged, []
        trusted = [step for step in self.trusted() if step not in damaged]
        self.start, self._record = max(trusted, default=0), self._inode()
        training = Training(self.folder, NAME, layout, self.flags, disk=self.disk, restarts=fault.restarts, path=STRUCK)
        try:
            what = fault.strike(self, training)
        finally:
            training.kill()
        words = training.err.read_text()
        if self.start and fault.begins:
            require(f"from step {self.start} of" in words, f"did not go on from step {self.start}", training)
            for step in damaged:
                require(f"checkpoint {step} is damaged" in words, f"did not name checkpoint {step}", training)
        else:
            self.damaged = [*damaged, *self.damaged]  # nobody has looked at them yet
        return f"| {fault.name} | {layout} | {self.start} | {what} |"

    def advance(self, training: Training, steps: int | None = None) -> None:
        """Waits until the attempt has gone some steps beyond its start."""
        target = self.start + (steps or self.rng.randint(2, 9))
        self.wait_for(training, lambda: any(row["step"] >= target for row in rows(self.run)[-2:]))

    def wait_for(self, training: Training, condition: Callable[[], bool]) -> None:
        """Waits for what this attempt does: what an earlier one left does not count."""
        begun = training.wait_for(lambda: self._inode() not in (None, self._record))
        require(begun and training.wait_for(condition), "ended before the fault could strike", training)

    def begin_again(self) -> None:
        """What the run does from now on is another attempt's."""
        self._record = self._inode()

    def trusted(self) -> list[int]:
        """The steps whose checkpoint has a manifest."""
        folder = self.run / "checkpoints"
        return [step for step in checkpoints(self.run) if (folder / str(step) / "manifest.json").exists()]

    def _inode(self) -> int | None:
        """Which file the record is now: each attempt begins with a new one."""
        with contextlib.suppress(FileNotFoundError):
            return (self.run / "metrics.jsonl").stat().st_ino
        return None


def require(holds: bool, complaint: str, training: Training) -> None:
    if not holds:
        raise Misbehaved(f"the run ({training.layout}) {complaint}\n{training.words()}")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)
