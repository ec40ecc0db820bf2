"""A folder of checkpoints on disk: which steps stand, which can be trusted, which is best, which may go.

Invariant: once a step is trusted, a kill at any moment leaves a trusted step. A step is trusted when its manifest
stands, the last file written; older steps are deleted only after that, each one's manifest first. A folder whose
manifest verifies holds the files that it held when that was written, of the same length each and to the byte but for
the values of arrays, which are compared with hashes of their own where they are read.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from parallax.storage import file_sizes, is_remote, make_folder, open_folder, write_whole
from parallax.training.checkpoint_hashes import DamageError

MANIFEST = "manifest.json"
VALUES = "d"
"""The folder in which TensorStore puts the values of arrays, and their index behind them."""
SMALL = 2**20
"""Bytes up to which such a file is hashed as a whole all the same: one of the index alone is never longer."""
_CHUNK_BYTES = 1 << 22


def write_manifest(folder: epath.Path, facts: dict[str, Any]) -> None:
    """Records the size in bytes of every file of a finished folder, beside some JSON facts.

    Also the sha256, but of files full of values of arrays, which those who wrote them have hashed.
    """
    entries: dict[str, dict[str, Any]] = {name: {"bytes": size} for name, size in _sizes(folder).items()}
    hashed = [name for name, entry in entries.items() if not (_holds_values(name) and entry["bytes"] > SMALL)]
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(hashed, pool.map(lambda name: _sha256(folder / name), hashed), strict=True):
            entries[name]["sha256"] = digest
    _write(folder, {**facts, "files": entries})


def _write(folder: epath.Path, content: dict[str, Any]) -> None:
    write_whole(folder / MANIFEST, json.dumps({**content, "sha256": _own_digest(content)}, indent=1))


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """The facts and `files` of a folder's manifest, itself checked; the files are not read.

    Raises DamageError if the manifest is missing or not as it was written.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        digest = content.pop("sha256")
    except FileNotFoundError:
        raise DamageError(f"{MANIFEST} is missing, so its save was cut off") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DamageError(f"{MANIFEST} cannot be read") from None
    if digest != _own_digest(content):
        raise DamageError(f"{MANIFEST} has other contents than were written")
    return content


def verify(folder: epath.Path) -> None:
    """Compares every file to the manifest.

    Raises DamageError if a file is missing, left over, of another length or, where it was hashed, of other contents.
    """
    expected, found = read_manifest(folder)["files"], _sizes(folder)
    for name in sorted(expected.keys() ^ found.keys()):
        raise DamageError(f"{name} is missing" if name in expected else f"{name} was not saved with it")
    for name, size in found.items():
        if size != expected[name]["bytes"]:
            raise DamageError(f"{name} has {size} bytes instead of {expected[name]['bytes']}")
    hashed = [name for name in found if "sha256" in expected[name]]
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(hashed, pool.map(lambda name: _sha256(folder / name), hashed), strict=True):
            if digest != expected[name]["sha256"]:
                raise DamageError(f"{name} has other contents than were saved")


def _sizes(folder: epath.Path) -> dict[str, int]:
    """Bytes of every file below `folder` but the manifest itself, by its relative name with forward slashes."""
    sizes = sorted(file_sizes(folder).items())
    partial = f".{MANIFEST}."  # it is being written, or was when its writer was killed
    return {name: size for name, size in sizes if name != MANIFEST and not name.startswith(partial)}


def _holds_values(name: str) -> bool:
    return PurePosixPath(name).parent.name == VALUES


def _sha256(file: epath.Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damaged(step: int, damage: str) -> ValueError:
    """For a step that was asked for by its number."""
    return ValueError(f"checkpoint {step} is damaged: {damage}; name another step")


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
        if step is None or step not in self.newest_first():
            raise self.missing(step)
        return step

    def missing(self, step: int | None) -> ValueError:
        """For a step that is not there, or any where there is none."""
        steps = sorted(self.newest_first())
        missing = "a checkpoint" if step is None else f"checkpoint {step}"
        found = f"steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
        return ValueError(f"{missing} is asked for, but {self.root} has {found}; name another")

    def check(self, step: int) -> None:
        """Raises ValueError unless `verify` takes the files of `step`."""
        try:
            verify(self.path(step))
        except DamageError as damage:
            raise damaged(step, str(damage)) from None

    def first_intact(self, steps: list[int], set_aside: bool) -> int | None:
        """The first of `steps` that verifies. Those before it are named and, with `set_aside`, renamed."""
        for step in steps:
            try:
                verify(self.path(step))
                return step
            except DamageError as damage:
                self.refuse(step, str(damage), set_aside)
        return None

    def refuse(self, step: int, damage: str, set_aside: bool) -> None:
        """Says that a step is damaged and, with `set_aside`, renames it."""
        aside = f"; it is now {self.set_aside(step, 'damaged')}" if set_aside else ""
        self._notify(f"checkpoint {step} is damaged: {damage}{aside}")

    def make_room(self, step: int) -> None:
        """Makes the root, and clears the way for a save of `step`. Raises OSError if one of them fails.

        Also if no folder can be made in it: other processes would wait for that until Orbax gives up.
        """
        make_folder(self.root)
        self.remove_unfinished()
        if not is_remote(self.root):
            tried = self.root / f"{step}{_UNFINISHED}"
            tried.mkdir()
            tried.rmdir()
        if step in self.newest_first():
            self.first_intact([step], set_aside=True)

    def remove_unfinished(self) -> None:
        """Removes what a save left that was killed or failed. No save may be under way.

        One that failed at one array may still write others: a folder that they fill meanwhile goes the next time.
        """
        for entry in self.root.iterdir() if self.root.is_dir() else ():
            if self._is_unfinished(entry):
                with contextlib.suppress(OSError):
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

    def measure(self, step: int, eval_loss: float) -> None:
        """Gives the manifest of a trusted step its evaluation loss."""
        _write(self.path(step), read_manifest(self.path(step)) | {"eval_loss": eval_loss})

    def _is_unfinished(self, entry: epath.Path) -> bool:
        if not is_remote(entry):
            return _UNFINISHED in entry.name
        return entry.name.isdecimal() and not any((entry / name).exists() for name in (_COMMITTED, MANIFEST))

    def set_aside(self, step: int, why: str) -> str:
        """Renames a step to STEP.WHY, which is returned. On gs:// its files move one by one: a kill leaves two parts,
        damaged both."""
        name, copies = f"{step}.{why}", 0
        while (self.root / name).exists():
            copies += 1
            name = f"{step}.{why}-{copies}"
        self.path(step).rename(self.root / name)
        return name
