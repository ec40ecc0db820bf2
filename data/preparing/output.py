"""The folder of a store that is being made: its journal, its drafts, and how its files reach gs://.

Invariant: the journal names a shard only when the shard is whole where the store is to be. A local folder is written in
place, by one process at a time. The files of one on gs:// are written to a temporary folder and sent when they are
whole. Of processes that find nothing there one begins; those that go on write the same bytes, since a store follows
from its command and the tokenizer in its folder.
"""

import contextlib
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.stores.store import FILES, JOURNAL, MANIFEST, SIDES, TOKENIZER, file_name, has_journal, sync_folder
from parallax.storage import bucket_files, is_remote, open_folder, reason_of, write_atomically, write_json
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.registry import save_tokenizer

OF_SHARD = re.compile(rf"\d+\.({'|'.join(SIDES)})\.(tokens|documents)")
DRAFT = re.compile(rf"\.({OF_SHARD.pattern}\.draft|({MANIFEST}|{JOURNAL}|{TOKENIZER})\.[0-9a-f]{{32}})")
"""What a kill leaves: a file that is not whole yet."""


class Output:
    """A store's folder, from nothing or from where the same command was ended.

    Attributes:
        folder: where the store is to be, local or on gs://.
        path: where files are written: the folder itself, or a temporary one while it is held.
    """

    def __init__(self, address: str | os.PathLike) -> None:
        """Looks at the folder and makes nothing.

        Raises ValueError if something else is in it: that is not this command's to overwrite or remove.
        """
        self._is_remote = is_remote(address)
        self.folder = open_folder(address) if self._is_remote else Path(address)
        self.path, self._journal, self._tokenizer = Path(address), b"", b""
        self._found = self._look()
        self.is_finished = self._found[0]
        self._is_mine = self._found[1] > 0

    def _look(self) -> tuple[bool, int]:
        """Whether the folder holds a manifest, and the bytes of its journal."""
        folder = self.folder
        if self._exists(MANIFEST):
            return True, 0
        if has_journal(folder):
            return False, len((folder / JOURNAL).read_bytes())
        if self._exists("") and (
            not folder.is_dir() or any(not DRAFT.fullmatch(path.name) for path in folder.iterdir())
        ):
            raise ValueError(f"--output {folder} exists and is no store; choose another")
        return False, 0

    def _exists(self, name: str) -> bool:
        path = self.folder / name if name else self.folder
        return path.exists() if self._is_remote else os.path.exists(path)  # a local name may be too long for pathlib's

    def read_journal(self) -> list[dict[str, Any]]:
        """What earlier processes finished, nothing where none began; a last line that a kill cut short is none.

        Raises ValueError if it is damaged.
        """
        if self.is_finished or not self._found[1]:
            return []
        lines: list[dict[str, Any]] = []
        path = self.folder / JOURNAL
        try:
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                lines.append(json.loads(line))
                self._journal += line
        except ValueError as error:
            raise ValueError(f"{path} must be a store's journal ({error}); give another --output") from None
        if not lines:  # it is written whole or not at all, and so this one was cut by somebody else
            raise ValueError(f"{path} must begin with a whole line and has none; give another --output")
        return lines

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder, keeps other processes from writing it, and removes it again if nothing was made.

        Raises OSError if it cannot be written, ValueError if another process writes it or did since it was looked at.
        """
        if self._is_remote:
            with tempfile.TemporaryDirectory(prefix="parallax-store-") as name:
                self.path = Path(name)
                self._require_unchanged()
                yield
            return
        made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"store {self.folder} is being written by another process; wait for it") from None
            self._require_unchanged()
            yield
        finally:
            os.close(descriptor)
            if made:
                with contextlib.suppress(OSError):  # it holds something
                    self.path.rmdir()

    def _require_unchanged(self) -> None:
        if self._look() != self._found:
            raise self._changed()

    def begin(self, command: dict[str, Any], tokenizer: Tokenizer) -> None:
        """Writes the first line of the journal, and the tokenizer.

        Raises OSError if they cannot be written, ValueError if another process began meanwhile.
        """
        write_atomically(self.path / JOURNAL, _line(command))
        sync_folder(self.path)  # what follows is known for a store's by the journal alone
        if self._is_remote:
            self._claim()
        save_tokenizer(tokenizer, self.path / TOKENIZER)
        self._tokenizer = (self.path / TOKENIZER).read_bytes()
        self._send(TOKENIZER)
        sync_folder(self.path)

    def _claim(self) -> None:
        """Puts the journal on gs://, where one process alone can, since the object must not be there yet."""
        try:
            self._send(JOURNAL, mode="create")
        except FileExistsError:
            raise self._changed() from None
        self._is_mine = True
        if self._exists(MANIFEST):  # another process finished meanwhile, and removed its journal after that
            (self.folder / JOURNAL).unlink()
            raise self._changed()

    def _require_mine(self) -> None:
        """Raises ValueError if another process began the store on gs:// again, before this one had a shard there."""
        if self._is_remote and (self.folder / TOKENIZER).read_bytes() != self._tokenizer:
            self._is_mine = False
            raise self._changed()

    def _changed(self) -> ValueError:
        return ValueError(f"store {self.folder} changed meanwhile; give the same command again")

    def go_on(self) -> None:
        """Cuts off what a kill left behind the last whole line of the journal. Raises OSError."""
        if self._is_remote:
            self._tokenizer = (self.folder / TOKENIZER).read_bytes()
            write_atomically(self.path / JOURNAL, self._journal)
        else:
            os.truncate(self.path / JOURNAL, len(self._journal))

    def add_shard(self, number: int, value: dict[str, Any]) -> None:
        """Takes the files of a shard that is whole, and then its line in the journal. Raises OSError."""
        names = [file_name(number, side, kind) for side, kind in FILES]
        self._require_mine()
        self._send(*names)
        with (self.path / JOURNAL).open("ab") as file:
            file.write(_line(value))
            file.flush()
            os.fsync(file.fileno())
        self._send(JOURNAL)
        if self._is_remote:
            for name in names:
                (self.path / name).unlink()

    def finish(self, manifest: dict[str, Any]) -> None:
        """Writes the manifest, which makes a store of it. Raises OSError."""
        self._require_mine()
        write_json(self.path / MANIFEST, manifest)
        self._send(MANIFEST)
        sync_folder(self.path)
        with _as_os_errors():
            (self.folder / JOURNAL).unlink()

    def remove_drafts(self, *, all: bool) -> None:
        """Removes what is not whole, or `all` of a store that holds no shard yet; nothing of anybody else.

        On gs:// files of shards are left, and the journal with them: they may be those of a process that goes on. So is
        the journal that another process began.
        """
        if not self._exists(""):
            return
        with _as_os_errors():
            # The journal goes last: without it the rest would be taken for somebody else's.
            found = sorted(self.folder.iterdir(), key=lambda path: path.name == JOURNAL)
            others = not self._is_mine or any(OF_SHARD.fullmatch(path.name) for path in found)
            all = all and not (self._is_remote and others)
            for path in found:
                if DRAFT.fullmatch(path.name) or (
                    all and (path.name in (JOURNAL, TOKENIZER) or OF_SHARD.fullmatch(path.name))
                ):
                    path.unlink()
            self._is_mine &= not all

    def _send(self, *names: str, mode: str = "overwrite") -> None:
        """To gs://, where an object appears when it is whole. Raises OSError, with `create` also where one is there."""
        if self._is_remote:
            with _as_os_errors():
                for name in names:
                    bucket_files().put_file(str(self.path / name), os.fspath(self.folder / name), mode=mode)


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Raises errors of gcsfs, aiohttp, google.auth and requests, many of which are no OSError, as one."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(reason_of(error)) from error


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
