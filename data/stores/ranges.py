"""Ranges of the files of a folder, on a local disk or on gs://.

Invariant: a range is whole or an error says which file it is of; nothing else of a file is read. Local files are read
and not mapped: the pages of a map count as memory of the process, and a file cut short under one ends it by a signal.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from etils import epath

from parallax.storage import is_remote, reason_of

OPEN_FILES = 64
Range = tuple[str, int, int]
"""File name, first byte, and the one behind the last."""


class Damaged(OSError, ValueError):
    """A file of a store is missing, cut short or out of reach: bad input to a command, from outside to a run."""


class Files:
    """The files of one folder, read by ranges; those on gs:// at the same time."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder, self._is_remote = folder, is_remote(folder)
        self._opened = lru_cache(OPEN_FILES)(_Opened)

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range. Raises Damaged."""
        found = self._read_remote(ranges) if self._is_remote else map(self._read_local, ranges)
        return [self._checked(each, content) for each, content in zip(ranges, found, strict=True)]

    def _read_local(self, wanted: Range) -> bytes | Exception:
        name, start, stop = wanted
        try:
            return os.pread(self._opened(os.fspath(self._folder / name)).descriptor, stop - start, start)
        except OSError as error:
            return error

    def _read_remote(self, ranges: Sequence[Range]) -> list[Any]:
        names, starts, stops = zip(*ranges, strict=True)
        paths = [os.fspath(self._folder / name) for name in names]
        try:
            return _bucket_files().cat_ranges(paths, list(starts), list(stops), on_error="return")
        except Exception as error:  # of gcsfs, aiohttp, google.auth or requests
            return [error] * len(ranges)

    def _checked(self, wanted: Range, content: Any) -> bytes:
        name, start, stop = wanted
        reason = f"it ends at byte {start + len(content)}" if isinstance(content, bytes) else reason_of(content)
        if not isinstance(content, bytes) or len(content) < stop - start:
            remedy = f"see prepare.py --verify {self._folder}"
            raise Damaged(f"store {self._folder} is damaged: {name} cannot be read ({reason}); {remedy}")
        return content


class _Opened:
    """An open file, closed when nobody reads it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _bucket_files() -> Any:
    import fsspec

    return fsspec.filesystem("gs")
