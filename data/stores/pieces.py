"""Pieces of the files of stores on gs://, kept on the local disk.

Invariant: what is kept is what the bucket held, since it is named by the sha256 of its store. It takes no more than
KEPT_GIB, or PARALLAX_STORE_CACHE_GIB: a store that does not fit is not kept at all (its rows come once an epoch, so
that most of it would be gone before it is needed again), and those used longest ago make room for another.
"""

import contextlib
import fcntl
import os
import shutil
import uuid
from pathlib import Path

from parallax.storage import cache_folder, write_atomically

PIECE_BYTES = 1 << 20
KEPT_GIB = 16.0
VARIABLE = "PARALLAX_STORE_CACHE_GIB"


class Pieces:
    """The pieces of one store's files: piece p of a file is its bytes from p · PIECE_BYTES on."""

    def __init__(self, sha256: str, size: int) -> None:
        """Makes room for a store of `size` bytes; one without a sha256 is not finished, and not kept.

        Raises ValueError if the variable holds no number.
        """
        bound = _bound()
        self._folder = cache_folder() / "pieces" / sha256[:32]
        self.are_kept = bool(sha256) and size <= bound
        if self.are_kept:
            try:
                _make_room(self._folder, size, bound)
            except OSError:  # a disk that is full or read-only keeps nothing, and the bucket is read instead
                self.are_kept = False

    def get(self, name: str, piece: int, start: int, stop: int) -> bytes | None:
        """Bytes start to stop - 1 of a piece; None where they are not all here."""
        try:
            with self._path(name, piece).open("rb", buffering=0) as file:
                content = os.pread(file.fileno(), stop - start, start)
        except OSError:
            return None
        return content if len(content) == stop - start else None  # a loss of power may cut a piece

    def put(self, name: str, piece: int, content: bytes) -> None:
        """Keeps a piece, where the disk has room."""
        path = self._path(name, piece)
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            draft.write_bytes(content)
            draft.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    def _path(self, name: str, piece: int) -> Path:
        return self._folder / f"{name}.{piece}"


def _make_room(folder: Path, size: int, bound: int) -> None:
    """Removes what was used longest ago, until a store fits; writes its size down, which counts before it is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.parent.glob(".*"):  # of a process that was killed while it removed one
            shutil.rmtree(left)
        sizes = [path for path in folder.parent.glob("*/size") if path.parent != folder]
        sizes.sort(key=lambda path: path.stat().st_mtime)
        total = size + sum(int(path.read_text()) for path in sizes)
        while total > bound:
            oldest = sizes.pop(0)
            total -= int(oldest.read_text())
            # Renamed first: a process that reads it puts no more there, and fetches again what it needs.
            shutil.rmtree(oldest.parent.rename(folder.with_name(f".{oldest.parent.name}")))
        folder.mkdir(exist_ok=True)
        write_atomically(folder / "size", str(size).encode())


def _bound() -> int:
    """In bytes."""
    given = os.environ.get(VARIABLE, str(KEPT_GIB))
    try:
        return int(float(given) * 2**30)
    except (ValueError, OverflowError):
        raise ValueError(f"{VARIABLE}={given} must be a number of GiB; try {KEPT_GIB:g}, or 0 for none") from None
