"""Ranges of the files of a folder, on a local disk or on gs://.

Invariant: a range is whole or an error says which file it is of. Local files are read and not mapped: the pages of a
map count as memory of the process, and a file cut short under one ends it by a signal.
"""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from etils import epath

from data.stores.pieces import PIECE_BYTES, Pieces
from parallax.storage import bucket_files, is_remote, reason_of

OPEN_FILES = 64
FETCHED_PIECES = 64
"""At a time, and so the bytes of them that are held."""
Range = tuple[str, int, int]
"""File name, first byte, and the one behind the last."""


class Damaged(OSError, ValueError):
    """A file of a store is missing, cut short or out of reach: bad input to a command, from outside to a run."""


class Files:
    """The files of a store, read by ranges; those on gs:// at the same time, by whole pieces where these are kept."""

    def __init__(self, folder: epath.Path, sha256: str, size: int) -> None:
        """`sha256` and `size`, in bytes, are of the whole store.

        Raises ValueError if it is on gs:// and the variable that bounds its pieces holds no number.
        """
        self._folder, self._is_remote = folder, is_remote(folder)
        self._opened = lru_cache(OPEN_FILES)(lambda name: _Opened(os.fspath(folder / name)))
        self._pieces = Pieces(sha256, size) if self._is_remote else None

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range. Raises Damaged."""
        if not ranges:
            return []
        if self._pieces is None:
            found = map(self._read_local, ranges)
        elif self._pieces.are_kept:
            found = self._read_by_pieces(ranges, self._pieces)
        else:
            found = self._read_remote(ranges)
        return [self._checked(each, content) for each, content in zip(ranges, found, strict=True)]

    def _read_local(self, wanted: Range) -> bytes | Exception:
        name, start, stop = wanted
        try:
            return self._opened(name).read(start, stop)
        except OSError as error:
            return error

    def _read_by_pieces(self, ranges: Sequence[Range], pieces: Pieces) -> list[Any]:
        """Reads no more than a range's part of a piece that is here, and fetches the others as wholes."""
        parts = [list(_parts(each)) for each in ranges]
        contents: dict[Part, Any] = {part: pieces.get(*part) for each in parts for part in each}
        missing: dict[tuple[str, int], list[Part]] = {}
        for part in (part for part, content in contents.items() if content is None):
            missing.setdefault((part.name, part.piece), []).append(part)
        wanted = sorted(missing)
        for first in range(0, len(wanted), FETCHED_PIECES):
            keys = wanted[first : first + FETCHED_PIECES]
            fetched = self._read_remote([(name, at * PIECE_BYTES, (at + 1) * PIECE_BYTES) for name, at in keys])
            for key, content in zip(keys, fetched, strict=True):
                is_here = isinstance(content, bytes)
                if is_here:
                    pieces.put(*key, content)
                for part in missing[key]:
                    contents[part] = content[part.start : part.stop] if is_here else content
        return [_joined([contents[part] for part in each]) for each in parts]

    def _read_remote(self, ranges: Sequence[Range]) -> list[Any]:
        names, starts, stops = zip(*ranges, strict=True)
        paths = [os.fspath(self._folder / name) for name in names]
        try:
            return bucket_files().cat_ranges(paths, list(starts), list(stops), on_error="return")
        except Exception as error:  # of gcsfs, aiohttp, google.auth or requests
            return [error] * len(ranges)

    def _checked(self, wanted: Range, content: Any) -> bytes:
        name, start, stop = wanted
        reason = f"it ends at byte {start + len(content)}" if isinstance(content, bytes) else reason_of(content)
        if not isinstance(content, bytes) or len(content) < stop - start:
            remedy = f"see prepare.py --verify {self._folder}"
            raise Damaged(f"store {self._folder} is damaged: {name} cannot be read ({reason}); {remedy}")
        return content


class Part(NamedTuple):
    """What of a piece a range needs: its bytes start to stop - 1."""

    name: str
    piece: int
    start: int
    stop: int


def _parts(wanted: Range) -> Iterator[Part]:
    name, start, stop = wanted
    for piece in range(start // PIECE_BYTES, -(-stop // PIECE_BYTES)):
        before = piece * PIECE_BYTES
        yield Part(name, piece, max(start - before, 0), min(stop - before, PIECE_BYTES))


def _joined(contents: Sequence[Any]) -> bytes | Exception:
    """What the parts of a range hold, or what went wrong with the first of them that failed."""
    failed = (content for content in contents if not isinstance(content, bytes))
    return next(failed, None) or b"".join(contents)


class _Opened:
    """An open file, closed when nobody refers to it: `read` keeps it open where another thread drops it meanwhile."""

    def __init__(self, path: str) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._descriptor, stop - start, start)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
