"""Folders on gs://, where they differ from local ones: the one module that knows how.

Invariant: what is read is what stands there now, a write appears whole or not at all, and no bucket is ever made.
"""

import errno
import importlib.util
import logging
import os

from etils import epath


def is_remote(folder: str | os.PathLike) -> bool:
    """Whether this is an address and not a local path."""
    return "://" in os.fspath(folder)


def open_folder(folder: str | os.PathLike) -> epath.Path:
    """A local folder or one at a gs:// address, with the same path calls for both. Makes nothing.

    Raises:
      ValueError: the address is not of gs://, gcsfs is not installed, or the bucket does not answer.
    """
    address = os.fspath(folder)
    if not is_remote(address):
        return epath.Path(address)
    if not address.startswith("gs://"):
        raise ValueError(
            f"folder {address} must be a local path or start with gs://; try gs://BUCKET/runs/NAME"
        )
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
        raise ValueError(
            f"{address} cannot be reached: {reason_of(error)}; check credentials and network"
        ) from error
    return path


def make_folder(folder: epath.Path) -> None:
    """Makes a local folder and its parents; an object store has none, and gcsfs would make a missing bucket.

    Raises:
      OSError: it cannot be made.
    """
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_whole(file: epath.Path, text: str) -> None:
    """Writes a file at once. An object appears when it is complete; a local file is renamed into place.

    Raises:
      OSError: it cannot be written.
    """
    draft = file if is_remote(file) else file.with_name(f"{file.name}.draft")
    draft.write_text(text)
    if draft != file:
        draft.replace(file)


def reason_of(error: BaseException) -> str:
    """The first line of what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, FileNotFoundError):  # gcsfs gives no more than the path of its request
        return os.strerror(errno.ENOENT)
    return (str(error) or type(error).__name__).splitlines()[0]
