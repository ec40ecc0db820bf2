"""Files and folders, local or on gs://: how they are opened and written, and where fetched ones are kept.

Invariant: what is read is what stands there now; a write appears whole or not at all, however the writer ends, and of
writers racing for one path one leaves a whole file; no bucket is ever made.
"""

import errno
import importlib.util
import json
import logging
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

from etils import epath


def is_remote(folder: str | os.PathLike) -> bool:
    """Whether this is an address and not a local path."""
    return "://" in os.fspath(folder)


def open_folder(folder: str | os.PathLike) -> epath.Path:
    """A local folder or one at a gs:// address, with the same path calls for both. Makes nothing.

    Raises ValueError if the address is not of gs://, gcsfs is not installed, or the bucket does not answer.
    """
    address = os.fspath(folder)
    if not is_remote(address):
        return epath.Path(address)
    if not address.startswith("gs://"):
        raise ValueError(f"folder {address} must be a local path or start with gs://; try gs://BUCKET/runs/NAME")
    if not address.removeprefix("gs://").partition("/")[0]:
        raise ValueError(f"folder {address} names no bucket; try gs://BUCKET/runs/NAME")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{address} needs the package gcsfs, which is missing; try pip install -e '.[gcs]'")
    from fsspec.config import conf

    # gcsfs keeps the listings that it has seen, but TensorStore and other processes write beside it.
    conf.setdefault("gcs", {})["use_listings_cache"] = False
    # What it cannot mend it raises; its log would show that with a traceback, and each try besides.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    path = epath.Path(address)
    try:
        path.exists()
    except Exception as error:  # of gcsfs, aiohttp, google.auth or requests
        raise ValueError(f"{address} cannot be reached: {reason_of(error)}; check credentials and network") from error
    return path


def bucket_files() -> Any:
    """The gcsfs of this process, the one that etils uses too, for what its paths do not do."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)


def make_folder(folder: epath.Path) -> None:
    """Makes a local folder and its parents; an object store has none, and gcsfs would make a missing bucket.

    Raises OSError if it cannot be made.
    """
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def file_sizes(folder: epath.Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its relative name with forward slashes.

    A local file system is asked for no more than that. The `stat` of etils also asks who owns a file, by name, and
    raises KeyError for the users of other machines and containers.
    """
    if is_remote(folder):
        files = bucket_files()
        base = files._strip_protocol(os.fspath(folder)).rstrip("/") + "/"
        return {name.removeprefix(base): entry["size"] for name, entry in files.find(base, detail=True).items()}
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, whose folder is made, so that a reader finds all of it or nothing new.

    Raises OSError if that cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes do
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes whole or not at all.

    A file's name that is not UTF-8 is text with lone surrogates; JSON has an escape for each, and so it comes back.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def write_whole(file: epath.Path, text: str) -> None:
    """Writes a file, local or on gs://, so that a reader finds all of it or nothing new; else raises OSError."""
    if is_remote(file):
        file.write_text(text)  # an object appears when it is complete
    else:
        write_atomically(Path(file), text.encode())


def is_of_bucket(error: BaseException) -> bool:
    """Whether gcsfs raised this, or what it stands on; many of their errors are no OSError.

    gcsfs has tried again by then, several times and for half a minute, where the error may pass.
    """
    return type(error).__module__.partition(".")[0] in ("aiohttp", "gcsfs", "google", "requests")


def is_of_storage(error: BaseException) -> bool:
    """Whether a disk or a bucket failed."""
    return isinstance(error, OSError) or is_of_bucket(error)


def reason_of(error: BaseException) -> str:
    """The first line of what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, FileNotFoundError):  # gcsfs gives no more than the path of its request
        return os.strerror(errno.ENOENT)
    return (str(error) or type(error).__name__).splitlines()[0]


def cache_folder() -> Path:
    """Where this user's fetched and derived files are kept, none of them the only copy; it may not be there yet."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without a name, as in many containers, has none
        home = Path(tempfile.gettempdir(), f"user-{os.getuid()}")
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "parallax"
