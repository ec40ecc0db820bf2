"""Files of documents: which they are, how they are compressed, and their bytes as a stream.

Invariant: the same arguments over the same files give the same sources in the same order.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any

from etils import epath

from data.stores.store import is_store
from parallax.storage import bucket_files, file_sizes, is_remote, open_folder, reason_of

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
RECORD_SUFFIX = re.compile(r"\.(array_record|arrayrecord)(-\d+-of-\d+)?", re.IGNORECASE)
COMPRESSIONS = (".gz", ".zst", ".bz2")
BROKEN = (EOFError, OSError, zlib.error, ValueError)  # what a damaged file raises; pyarrow's errors are of the last
BUFFER_BYTES = 1 << 20
REMOTE_BYTES = 8 << 20


@dataclass(frozen=True)
class Source:
    """A file of documents, as it was when it was found.

    Attributes:
        path: as it was given, or below the folder that was given.
        format: text, jsonl, json, csv, parquet or records.
        bytes: of the file.
        changed: when, in nanoseconds since 1970; on gs:// the object's generation.
    """

    path: str
    format: str
    bytes: int
    changed: int


def find_sources(given: Sequence[str], format: str | None = None) -> list[Source]:
    """The files that files, folders and globs name, in that order; those of a folder or a glob by name.

    A folder gives all files of its one format, those of its subfolders too, as `documents_in` lists them. `format` says
    which is meant where it holds several, and forces it on files that are named.

    Raises ValueError if there is none, one is named twice, of no known format, or a folder holds several.
    """
    paths: list[tuple[str, str]] = []
    for name in given:
        path = Path(name).expanduser()
        if is_remote(name):
            paths += _on_bucket(name, format)
        elif os.path.isdir(path):  # that of pathlib raises for a name that is too long
            paths += _in_folder(path, format)
        elif os.path.isfile(path):
            paths.append((str(path), format or _known_format(name)))
        else:
            found = sorted(found for found in glob(str(path), recursive=True) if Path(found).is_file())
            paths += _named(name, found, format)
    repeated = [path for path, count in Counter(os.path.realpath(path) for path, _ in paths).items() if count > 1]
    if repeated:
        raise ValueError(f"source {repeated[0]} is named twice; leave it out once")
    return [described(path, format) for path, format in paths]


def format_of(name: str) -> str | None:
    """What a file's name says that it is, or None."""
    if is_records(name):
        return "records"
    stem, suffix = os.path.splitext(name.lower())
    return FORMATS.get(os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix)


def is_records(name: str) -> bool:
    """Whether a file's name is that of an ArrayRecord file, or of a shard such as x.array_record-00000-of-00002."""
    return RECORD_SUFFIX.fullmatch(os.path.splitext(name)[1]) is not None


def spelled(path: str | os.PathLike) -> str:
    """A path as text on one line: bytes that are not UTF-8 as \\xNN, a line break or the like as Python writes it."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Unreachable(Exception):
    """A file on gs:// cannot be read: no fault of what is in it, and so not one of BROKEN."""


class RemoteFile(io.RawIOBase):
    """A file on gs://, read by pieces of a few megabytes. Raises Unreachable."""

    def __init__(self, address: str) -> None:
        self._file = self._asked(bucket_files().open, address, "rb", block_size=REMOTE_BYTES)

    def _asked(self, call: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        try:
            return call(*args, **keywords)
        except Exception as error:  # of gcsfs, aiohttp, google.auth or requests
            raise Unreachable(reason_of(error)) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._asked(self._file.readinto, buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class SourceFile(io.RawIOBase):
    """The bytes of a file as they are stored, counted and hashed on their way.

    Attributes:
        count: bytes read so far.
    """

    def __init__(self, path: str) -> None:
        """Raises OSError if the file cannot be read."""
        self._file = _open(path)
        self._path, self._digest, self.count = path, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._file.readinto(buffer)
        self._digest.update(memoryview(buffer)[:size])
        self.count += size
        return size

    def sha256(self) -> str:
        """The sha256 of the whole file, however much was read so far, and whether or not a reader closed this."""
        with _open(self._path) as rest:
            rest.seek(self.count)
            while piece := rest.read(BUFFER_BYTES):
                self._digest.update(piece)
                self.count += len(piece)
        return self._digest.hexdigest()

    def close(self) -> None:
        super().close()
        if hasattr(self, "_file"):  # it may never have opened
            self._file.close()


@contextlib.contextmanager
def opened(path: str) -> Iterator[SourceFile]:
    """A source while it is read. Raises ValueError if it cannot be."""
    try:
        with SourceFile(path) as file:
            yield file
    except (OSError, Unreachable) as error:
        raise ValueError(f"source {spelled(path)} must be readable ({reason_of(error)}); mend that") from None


def _open(path: str) -> io.RawIOBase:
    return RemoteFile(path) if is_remote(path) else open(path, "rb", buffering=0)


def decompressed(file: SourceFile, name: str) -> io.BufferedIOBase:
    """The bytes that a compressed file stands for, by the end of its name; reading raises one of BROKEN."""
    suffix, buffered = os.path.splitext(name.lower())[1], io.BufferedReader(file, BUFFER_BYTES)
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=buffered)
    if suffix == ".bz2":
        return bz2.BZ2File(buffered)
    return io.BufferedReader(_Zstandard(buffered), BUFFER_BYTES) if suffix == ".zst" else buffered


class _Zstandard(io.RawIOBase):
    """pyarrow's reader as one of Python's; unlike Python's own packages it reports a file that was cut short."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        import pyarrow

        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def documents_in(folder: Path | epath.Path) -> list[tuple[str, str]]:
    """The files of documents below a folder, by name, each with its format.

    Left out are hidden ones (a name with a dot first), those in a token store, such as the one that is being made, a
    tokenizer.json, and a README.md at its top, where that is not all.
    """
    if is_remote(folder):
        names = [PurePosixPath(name) for name in file_sizes(epath.Path(folder))]
    else:
        names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    stores = {parent for parent in {name.parent for name in names} if is_store(folder / parent)}
    names = [name for name in names if name.parent not in stores]
    found = sorted((name.as_posix(), format_of(name.name)) for name in names)
    known = [(name, kind) for name, kind in found if kind is not None and os.path.basename(name) != "tokenizer.json"]
    return [(name, kind) for name, kind in known if name.lower() != "readme.md"] or known


def _on_bucket(address: str, format: str | None) -> list[tuple[str, str]]:
    """What a file, a folder or a glob on gs:// names."""
    folder = open_folder(address)
    if not has_magic(address):
        if folder.is_dir():
            return _in_folder(folder, format)
        return _named(address, [address] if folder.exists() else [], format)
    found = bucket_files().glob(address, detail=True)
    return _named(address, sorted(f"gs://{name}" for name, entry in found.items() if entry["type"] == "file"), format)


def _named(given: str, found: Sequence[str], format: str | None) -> list[tuple[str, str]]:
    if not found:
        raise ValueError(f"source {given} must be a file, a folder or a glob of files, and none is there; check it")
    return [(name, format or _known_format(name)) for name in found]


def _in_folder(folder: Path | epath.Path, format: str | None) -> list[tuple[str, str]]:
    found = documents_in(folder)
    counts = Counter(kind for _, kind in found)
    if format is not None:
        found = [(name, kind) for name, kind in found if kind == format]
    elif len(counts) > 1:
        held = ", ".join(f"{kind} ({count})" for kind, count in counts.most_common())
        choice = counts.most_common(1)[0][0]
        raise ValueError(f"folder {folder} must hold files of one format and holds {held}; choose: --format {choice}")
    if not found:
        kinds = ", ".join(suffix for suffix, kind in FORMATS.items() if format in (None, kind))
        raise ValueError(f"folder {folder} must hold a file of {kinds} and holds none; name another")
    return [(str(folder / name), kind) for name, kind in found]


def _known_format(name: str) -> str:
    format = format_of(name)
    if format is None:
        kinds = ", ".join(FORMATS)
        raise ValueError(
            f"source {name} must end in {kinds}, with or without .gz, .zst, .bz2; say --format text, or another"
        )
    return format


def described(path: str, format: str) -> Source:
    """A file as it is now. Raises ValueError if it cannot be read."""
    if not is_remote(path) and not os.access(path, os.R_OK):
        raise ValueError(f"source {path} must be readable; check its permissions")
    if format == "parquet" and path.lower().endswith(COMPRESSIONS):  # it is read from its end, and packed inside
        raise ValueError(
            f"source {path} must be parquet as it is, without {', '.join(COMPRESSIONS)}; decompress it first"
        )
    if is_remote(path):
        entry = bucket_files().info(path)
        return Source(path, format, entry["size"], int(entry["generation"]))
    stat = os.stat(path)
    return Source(path, format, stat.st_size, stat.st_mtime_ns)
