"""Ranges of the files of a folder, on a local disk or on gs://.

Invariant: a range is whole or an error says which file it is of. Local files are read and not mapped: the pages of a
map count as memory of the process, and a file cut short under one ends it by a signal.
"""

import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from etils import epath

from data.stores.pieces import PIECE_BYTES, Pieces
from parallax.storage import bucket_files, is_remote, reason_of

OPEN_FILES = 64
Range = tuple[str, int, int]
"""File name, first byte, and the one behind the last."""


class Damaged(OSError, ValueError):
    """A file of a store is missing, cut short or out of reach: bad input to a command, from outside to a run."""


class Files:
    """The files of a store, read by ranges; those on gs:// at the same time, by whole pieces where these are kept."""

    def __init__(self, folder: epath.Path, sha256: str, size: int) -> None:
        """`sha256` and `size`, in bytes, are of the whole store."""
        self._folder, self._is_remote = folder, is_remote(folder)
        self._opened = lru_cache(OPEN_FILES)(_Opened)
        self._sha256, self._size = sha256, size

    @cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self._sha256, self._size)

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range. Raises Damaged."""
        if not self._is_remote:
            found = map(self._read_local, ranges)
        else:
            found = self._read_by_pieces(ranges) if self._pieces.are_kept else self._read_remote(ranges)
        return [self._checked(each, content) for each, content in zip(ranges, found, strict=True)]

    def _read_local(self, wanted: Range) -> bytes | Exception:
        name, start, stop = wanted
        try:
            return os.pread(self._opened(os.fspath(self._folder / name)).descriptor, stop - start, start)
        except OSError as error:
            return error

    def _read_by_pieces(self, ranges: Sequence[Range]) -> list[Any]:
        needed = {
            (name, piece)
            for name, start, stop in ranges
            for piece in range(start // PIECE_BYTES, -(-stop // PIECE_BYTES))
        }
        contents: dict[tuple[str, int], Any] = {key: self._pieces.get(*key) for key in sorted(needed)}
        missing = [key for key, content in contents.items() if content is None]
        if missing:
            fetched = self._read_remote([(name, at * PIECE_BYTES, (at + 1) * PIECE_BYTES) for name, at in missing])
            for key, content in zip(missing, fetched, strict=True):
                contents[key] = content
                if isinstance(content, bytes):
                    self._pieces.put(*key, content)
        found = [_joined(each, contents) for each in ranges]
        for at, (each, content) in enumerate(zip(ranges, found, strict=True)):
            if isinstance(content, bytes) and len(content) < each[2] - each[1]:  # a piece that a loss of power cut
                found[at] = self._read_remote([each])[0]
        return found

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


def _joined(wanted: Range, contents: dict[tuple[str, int], Any]) -> bytes | Exception:
    """A range out of pieces, or what went wrong with the first of them that failed."""
    name, start, stop = wanted
    found = bytearray()
    for piece in range(start // PIECE_BYTES, -(-stop // PIECE_BYTES)):
        content, before = contents[name, piece], piece * PIECE_BYTES
        if not isinstance(content, bytes):
            return content
        found += content[max(start - before, 0) : stop - before]
    return bytes(found)


class _Opened:
    """An open file, closed when nobody reads it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
