"""A folder of checkpoints on disk: which steps stand, which can be trusted, which is best, which may go.

Invariant: once a step is trusted, a kill at any moment leaves a trusted step. A step is trusted when its
manifest stands, the last file written; older steps are deleted only after that, each one's manifest first.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from etils import epath

from parallax.storage import is_remote, make_folder, open_folder
from parallax.training.manifest import MANIFEST, DamageError, read_manifest, verify, write_manifest

_UNFINISHED = ".orbax-checkpoint-tmp"
_COMMITTED = "commit_success.txt"
"""Orbax's last file, where it cannot rename a finished folder."""


class CheckpointFolder:
    """`root/STEP/` for each step, on a local disk or at a gs:// address.

    The methods up to `check` only read. `notify` takes one line about each step that cannot be trusted.
    """

    def __init__(self, root: epath.PathLike, notify: Callable[[str], None]):
        folder = open_folder(root)
        self.root = folder if is_remote(folder) else folder.expanduser().absolute()
        self._notify = notify

    def path(self, step: int) -> epath.Path:
        """Where that step stands, or would."""
        return self.root / str(step)

    def newest_first(self) -> list[int]:
        """Every step that has a folder, trusted or not. Raises ValueError if the root is a file."""
        if not self.root.exists():
            return []
        if not self.root.is_dir():
            raise ValueError(f"checkpoint directory {self.root} is a file; name a folder")
        names = [entry.name for entry in self.root.iterdir() if entry.is_dir()]
        steps = (int(name) for name in names if name.isdecimal() and name == str(int(name)))
        return sorted(steps, reverse=True)

    def best_first(self) -> list[int]:
        """The steps that have a manifest: by evaluation loss, lowest first, then the others, newest first."""
        losses: dict[int, float | None] = {}
        for step in self.newest_first():
            with contextlib.suppress(DamageError):
                losses[step] = read_manifest(self.path(step))["eval_loss"]
        return sorted(losses, key=lambda step: (losses[step] is None, losses[step] or 0.0, -step))

    def require(self, step: int | None) -> int:
        """`step`, or a ValueError that lists the steps that stand."""
        steps = sorted(self.newest_first())
        if step is None or step not in steps:
            missing = "a checkpoint" if step is None else f"checkpoint {step}"
            found = f"steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
            raise ValueError(f"{missing} is asked for, but {self.root} has {found}; name another")
        return step

    def check(self, step: int, under: str = "") -> None:
        """Raises ValueError unless the files of `step` that start with `under` are as they were saved."""
        try:
            verify(self.path(step), under)
        except DamageError as damage:
            raise ValueError(f"checkpoint {step} is damaged: {damage}; name another step") from None

    def first_intact(self, steps: list[int], set_aside: bool) -> int | None:
        """The first of `steps` that verifies. Those before it are named and, with `set_aside`, renamed."""
        for step in steps:
            try:
                verify(self.path(step))
                return step
            except DamageError as damage:
                aside = f"; it is now {self._set_aside(step)}" if set_aside else ""
                self._notify(f"checkpoint {step} is damaged: {damage}{aside}")
        return None

    def make_room(self, step: int) -> None:
        """Makes the root, and clears the way for a save of `step`. Raises ValueError if the root cannot be made."""
        try:
            make_folder(self.root)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{self.root} cannot be made: {reason}; choose another folder") from error
        self.remove_unfinished()
        if step in self.newest_first():
            self.first_intact([step], set_aside=True)

    def remove_unfinished(self) -> None:
        """Removes what a killed save left. No save may be under way."""
        for entry in self.root.iterdir() if self.root.is_dir() else ():
            if self._is_unfinished(entry):
                entry.rmtree()

    def trust(self, step: int, facts: dict[str, Any], keep: int) -> None:
        """Writes the manifest of a saved step, then deletes older ones but the newest `keep` and the best."""
        write_manifest(self.path(step), {"step": step, **facts})
        best_first = self.best_first()
        newest_first = sorted(best_first, reverse=True)
        kept = {best_first[0], *newest_first[:keep]}
        for older in self.newest_first():
            if older < newest_first[0] and older not in kept:
                # Without its manifest, a deletion that is cut off leaves nothing that looks trusted; the next
                # save completes it here.
                (self.path(older) / MANIFEST).unlink(missing_ok=True)
                self.path(older).rmtree()

    def _is_unfinished(self, entry: epath.Path) -> bool:
        if not is_remote(entry):
            return _UNFINISHED in entry.name
        return entry.name.isdecimal() and not any((entry / name).exists() for name in (_COMMITTED, MANIFEST))

    def _set_aside(self, step: int) -> str:
        """Renames a damaged step. On gs:// its files move one by one: a kill leaves two parts, damaged both."""
        name, copies = f"{step}.damaged", 0
        while (self.root / name).exists():
            copies += 1
            name = f"{step}.damaged-{copies}"
        self.path(step).rename(self.root / name)
        return name
