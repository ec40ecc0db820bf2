"""The checksums that make a folder of files trustworthy.

Invariant: a folder whose manifest verifies holds, to the byte, the files that it held when the manifest was
written. The manifest is written last and at once, so a folder that was cut off while being written has none.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from parallax.storage import write_whole

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 22


class DamageError(Exception):
    """The fault of a folder, as a clause that names the file."""


def write_manifest(folder: epath.Path, facts: dict[str, Any]) -> None:
    """Records the sha256 and size in bytes of every file of a finished folder, beside some JSON facts."""
    files = _files(folder)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_sha256, files.values())
        entries = {
            name: {"sha256": digest, "bytes": file.stat().length}
            for (name, file), digest in zip(files.items(), digests, strict=True)
        }
    content = {**facts, "files": entries}
    write_whole(folder / MANIFEST, json.dumps({**content, "sha256": _own_digest(content)}, indent=1))


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """The facts and `files` of a folder's manifest, itself checked; the files are not read.

    Raises DamageError if the manifest is missing or not as it was written.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        digest = content.pop("sha256")
    except FileNotFoundError:
        raise DamageError(f"{MANIFEST} is missing, so its save was cut off") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DamageError(f"{MANIFEST} cannot be read") from None
    if digest != _own_digest(content):
        raise DamageError(f"{MANIFEST} has other contents than were written")
    return content


def verify(folder: epath.Path, under: str = "") -> None:
    """Compares every file whose relative name starts with `under` to the manifest.

    Raises DamageError if a file is missing, left over, of another length or of other contents.
    """
    entries = read_manifest(folder)["files"]
    expected = {name: entry for name, entry in entries.items() if name.startswith(under)}
    found = {name: file for name, file in _files(folder).items() if name.startswith(under)}
    for name in sorted(expected.keys() ^ found.keys()):
        raise DamageError(f"{name} is missing" if name in expected else f"{name} was not saved with it")
    for name, file in found.items():
        length = file.stat().length
        if length != expected[name]["bytes"]:
            raise DamageError(f"{name} has {length} bytes instead of {expected[name]['bytes']}")
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(found, pool.map(_sha256, found.values()), strict=True):
            if digest != expected[name]["sha256"]:
                raise DamageError(f"{name} has other contents than were saved")


def _files(folder: epath.Path) -> dict[str, epath.Path]:
    """Every file below `folder` but the manifest itself, by its relative name with forward slashes."""
    found = {file.relative_to(folder).as_posix(): file for file in _walk(folder)}
    return {name: found[name] for name in sorted(found) if name != MANIFEST}


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


def _sha256(file: epath.Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
