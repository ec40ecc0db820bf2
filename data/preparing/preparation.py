"""Sources to a token store, a shard at a time.

Invariant: the store is a function of the sources, their order, the tokenizer and the settings. Neither the number of
processes nor a kill at any moment changes a byte of it: a shard ends behind the document that fills it, and a journal
says behind which document each shard that is whole ended.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.preparing.readers import Record, read_records
from data.preparing.sources import Source, SourceFile, spelled
from data.preparing.tokenizing import Document, Work, tokenized
from data.stores.store import (
    FORMAT,
    JOURNAL,
    MANIFEST,
    SIDES,
    TOKENIZER,
    VERSION,
    ShardWriter,
    TokenSide,
    TokenStore,
    has_journal,
    manifest_sha256,
    open_store,
    sync_folder,
)
from parallax.storage import reason_of, write_atomically, write_json
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.registry import save_tokenizer

NAMED_ERRORS = 10
OF_SHARD = re.compile(rf"\d+\.({'|'.join(SIDES)})\.(tokens|documents)")
DRAFT = re.compile(rf"\.({OF_SHARD.pattern}\.draft|({MANIFEST}|{JOURNAL}|{TOKENIZER})\.[0-9a-f]{{32}})")
"""What a kill leaves: a file that is not whole yet."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides which documents a store holds, and how, beside sources and tokenizer.

    Attributes:
        field: a dotted path to the text in an object, or a column.
        min_chars: documents of fewer characters are left out.
        nfc: put accents and letters together.
        deduplicate: leave out a text that came before. Takes about 100 bytes of memory a document.
        held_out: the fraction of texts, by their hash, that is kept for evaluation.
        shard_tokens: a shard ends with the document that gives it so many.
    """

    field: str = "text"
    min_chars: int = 1
    nfc: bool = False
    deduplicate: bool = False
    held_out: float = 0.01
    shard_tokens: int = 1 << 26

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be at least 0 and less than 1; try 0.01")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens={self.shard_tokens} must be at least 1; try {1 << 26}")
        if not self.field:
            raise ValueError("field='' must name where the text is; try text")


@dataclasses.dataclass
class Progress:
    """What was read: documents with tokens, those tokens, bytes of their text, and the share of all sources."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    share: float = 0.0


class Preparation:
    """A store that is being made in `folder`, from nothing or from where the same command was ended.

    Attributes:
        finished: the store, where it was made already.
        begun: whether shards of it are there, and so its tokenizer.
        unreadable: how many documents could not be read.
        named: the first of them, each with its file, line and reason.
    """

    def __init__(self, folder: Path, sources: Sequence[Source], settings: Settings, tokenizer: str) -> None:
        """Looks at the folder and makes nothing; `tokenizer` is what the command calls it.

        Raises ValueError if something else is in the folder, or a store that another command began.
        """
        self._folder, self._sources, self._settings = folder, sources, settings
        self._command = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": tokenizer,
            "settings": dataclasses.asdict(settings),
            "sources": [dataclasses.astuple(source) for source in sources],
        }
        self.finished: TokenStore | None = None
        self.begun = False
        self.unreadable, self.named = 0, list[str]()
        self._left_out = {"short": 0, "duplicates": 0}
        self._shards: list[dict[str, Any]] = []
        self._hashes: list[str] = []
        self._at = (0, 0)
        self._seen: set[bytes] = set()
        self._progress, self._journal_bytes = Progress(), 0
        self._found = self._look()
        if self._found[0]:
            self.finished = open_store(folder)
            self._require_same(_command_of(self.finished.manifest), "was prepared")
        elif self._found[1]:
            self._read_journal()

    @property
    def tokenizer_path(self) -> Path:
        return self._folder / TOKENIZER

    def run(
        self,
        tokenizer: Tokenizer,
        *,
        workers: int = 1,
        skip_unreadable: bool = False,
        observe: Callable[[Progress], None] = lambda progress: None,
    ) -> TokenStore:
        """Makes the store, or gives the one that is finished.

        Where it fails, what was written before the first shard was whole is removed.

        Raises ValueError if a document cannot be read and is not to be skipped, a source changed, no document is left,
        the folder cannot be written, or another process writes it.
        """
        if self.finished is not None:
            return self.finished
        made = not self._folder.exists()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _held(self._folder):
                if self._look() != self._found:
                    raise ValueError(f"store {self._folder} changed meanwhile; give the same command again")
                try:
                    self._begin(tokenizer)
                    self._tokenize(tokenizer, workers, skip_unreadable, observe)
                    return self._finish(tokenizer)
                finally:
                    self._remove_drafts(all=not self._shards)
        except OSError as error:
            rule = f"store {self._folder} cannot be written: {reason_of(error)}"
            raise ValueError(f"{rule}; mend that and give the same command again") from None
        finally:
            if made and not self._shards:
                with contextlib.suppress(OSError):
                    self._folder.rmdir()

    def _look(self) -> tuple[bool, int]:
        """Whether the folder holds a manifest, and the bytes of its journal.

        Raises ValueError where neither is there, but something else: it is not this command's to overwrite or remove.
        """
        folder = self._folder
        if os.path.exists(folder / MANIFEST):
            return True, 0
        if has_journal(folder):
            return False, (folder / JOURNAL).stat().st_size
        if os.path.exists(folder) and (
            not folder.is_dir() or any(not DRAFT.fullmatch(path.name) for path in folder.iterdir())
        ):
            raise ValueError(f"--output {folder} exists and is no store; choose another")
        return False, 0

    def _read_journal(self) -> None:
        """Takes up what earlier processes finished; a last line that a kill cut short is none."""
        lines: list[dict[str, Any]] = []
        path = self._folder / JOURNAL
        try:
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                lines.append(json.loads(line))
                self._journal_bytes += len(line)
        except ValueError as error:
            raise ValueError(f"{path} must be a store's journal ({error}); give another --output") from None
        if not lines:  # it is written whole or not at all, and so this one was cut by somebody else
            raise ValueError(f"{path} must begin with a whole line and has none; give another --output")
        self._require_same(lines[0], "was begun")
        for line in lines[1:]:
            self._shards.append(line["shard"])
            self._hashes += line["hashes"]
            self._at = (line["at"][0], line["at"][1])
            self._left_out, self.unreadable, self.named = line["left_out"], line["unreadable"], line["named"]
        self.begun = bool(self._shards)

    def _require_same(self, before: dict[str, Any], how: str) -> None:
        """Raises ValueError that names the first difference between two commands."""
        now = json.loads(json.dumps(self._command))
        remedy = "give the same command, or another --output, or remove the folder"
        if before["version"] != VERSION:
            raise ValueError(f"store {self._folder} {how} with format version {before['version']}; {remedy}")
        old, new = ({"tokenizer": each["tokenizer"]} | each["settings"] for each in (before, now))
        for name, value in new.items():
            if old.get(name) != value:
                flag = name.replace("_", "-")
                raise ValueError(f"store {self._folder} {how} with --{flag} {old.get(name)}, got {value}; {remedy}")
        pairs = list(zip(before["sources"], now["sources"], strict=False))
        if len(before["sources"]) != len(now["sources"]) or any(new[: len(old)] != old for old, new in pairs):
            raise ValueError(f"store {self._folder} {how} from other sources, or they changed since; {remedy}")

    def _begin(self, tokenizer: Tokenizer) -> None:
        self._remove_drafts(all=not self.begun)
        if not self.begun:
            write_atomically(self._folder / JOURNAL, _journal_line(self._command))
            sync_folder(self._folder)  # what follows is known for a store's by the journal alone
            save_tokenizer(tokenizer, self.tokenizer_path)
            sync_folder(self._folder)
            return
        os.truncate(self._folder / JOURNAL, self._journal_bytes)
        sizes = [source.bytes for source in self._sources]
        self._progress.share = sum(sizes[: self._at[0]]) / max(1, sum(sizes))
        for side in SIDES:
            if self._settings.deduplicate:
                kept = {"shards": self._shards, "sources": [], "dtype": _dtype(tokenizer)}
                self._seen.update(TokenSide(TokenStore(self._folder, kept), side).digests())
            for shard in self._shards:
                self._progress.documents += shard[side]["documents"]
                self._progress.tokens += shard[side]["tokens"]
                self._progress.bytes += shard[side]["bytes"]

    def _append(self, value: dict[str, Any]) -> None:
        with (self._folder / JOURNAL).open("ab") as file:
            file.write(_journal_line(value))
            file.flush()
            os.fsync(file.fileno())

    def _tokenize(
        self, tokenizer: Tokenizer, workers: int, skip_unreadable: bool, observe: Callable[[Progress], None]
    ) -> None:
        settings, dtype = self._settings, _dtype(tokenizer)
        work = Work(tokenizer.to_json(), settings.field, dtype, settings.nfc, settings.min_chars)
        self._writer = ShardWriter(self._folder, len(self._shards), dtype)
        observe(self._progress)
        try:
            with contextlib.closing(tokenized(self._records(), work, workers)) as results:
                for documents in results:
                    for document in documents:
                        self._take(document, skip_unreadable)
                        if self._writer.tokens >= settings.shard_tokens:
                            self._close_shard((document.source, document.number + 1))
                            self._writer = ShardWriter(self._folder, len(self._shards), dtype)
                    observe(self._progress)
            if self._writer.tokens:
                self._close_shard((len(self._sources), 0))
        finally:
            self._writer.discard()
        if not self._shards:
            raise ValueError(
                "the sources must hold a document and hold none that is kept; check --field and --min-chars"
            )

    def _records(self) -> Iterator[Record]:
        """What is behind the last whole shard."""
        first, passed = self._at
        total = max(1, sum(source.bytes for source in self._sources))
        before = sum(source.bytes for source in self._sources[:first])
        for place, source in enumerate(self._sources[first:], start=first):

            def share(part: float, before: int = before, size: int = source.bytes) -> None:
                self._progress.share = (before + part * size) / total

            try:
                with SourceFile(source.path) as file:
                    for record in read_records(source, place, file, self._settings.field, share):
                        if file.count:
                            share(file.count / source.bytes)
                        if place > first or record.number >= passed:
                            yield record
                    sha256, found = file.sha256(), os.stat(source.path)
            except OSError as error:
                raise ValueError(f"source {source.path} must be readable ({error.strerror}); mend that") from None
            if (found.st_size, found.st_mtime_ns) != (source.bytes, source.changed):
                raise ValueError(f"source {source.path} must stay as it is and changed while it was read; begin again")
            self._hashes[place:] = [sha256]
            before += source.bytes

    def _take(self, document: Document, skip_unreadable: bool) -> None:
        if document.error:
            reason = f"{spelled(self._sources[document.source].path)}:{document.line}: {document.error}"
            if not skip_unreadable:
                raise ValueError(f"{reason}; mend it and give another --output, or use --on-error skip")
            self.unreadable += 1
            self.named = [*self.named, reason][:NAMED_ERRORS]
        elif document.ids is None:
            self._left_out["short"] += 1
        elif document.digest in self._seen:
            self._left_out["duplicates"] += 1
        else:
            if self._settings.deduplicate:
                self._seen.add(document.digest)
            side = "held_out" if _is_held_out(document.digest, self._settings.held_out) else "train"
            place = {"source": document.source, "line": document.line, "offset": document.offset}
            self._writer.add(side, document.ids, size=document.size, digest=document.digest, **place)
            self._progress.documents += 1
            self._progress.tokens += len(document.ids)
            self._progress.bytes += document.size

    def _close_shard(self, at: tuple[int, int]) -> None:
        self._shards.append(self._writer.finish())
        known, self._at = self._at[0], at
        self._append(
            {
                "shard": self._shards[-1],
                "at": at,
                "hashes": self._hashes[known : at[0]],
                "left_out": self._left_out,
                "unreadable": self.unreadable,
                "named": self.named,
            }
        )

    def _finish(self, tokenizer: Tokenizer) -> TokenStore:
        totals = {
            side: {name: sum(shard[side][name] for shard in self._shards) for name in ("documents", "tokens", "bytes")}
            for side in SIDES
        }
        manifest = {"format": FORMAT, "version": VERSION, "sha256": ""}
        manifest |= {name: sum(totals[side][name] for side in SIDES) for name in ("documents", "tokens", "bytes")}
        manifest |= totals | {
            "max_id": max(shard[side]["max_id"] for shard in self._shards for side in SIDES),
            "dtype": _dtype(tokenizer),
            "tokenizer": {
                "given": self._command["tokenizer"],
                "name": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "sha256": hashlib.sha256(self.tokenizer_path.read_bytes()).hexdigest(),
            },
            "settings": self._command["settings"],
            "left_out": self._left_out | {"unreadable": self.unreadable},
            "unreadable": self.named,
            "sources": [
                {"path": source.path, "format": source.format, "bytes": source.bytes, "sha256": sha256}
                for source, sha256 in zip(self._sources, self._hashes, strict=True)
            ],
            "shards": self._shards,
        }
        manifest["sha256"] = manifest_sha256(manifest)
        write_json(self._folder / MANIFEST, manifest)
        sync_folder(self._folder)
        (self._folder / JOURNAL).unlink()
        return open_store(self._folder)

    def _remove_drafts(self, *, all: bool) -> None:
        # The journal goes last: without it the rest would be taken for somebody else's.
        for path in sorted(self._folder.iterdir(), key=lambda path: path.name == JOURNAL):
            if DRAFT.fullmatch(path.name) or (
                all and (path.name in (JOURNAL, TOKENIZER) or OF_SHARD.fullmatch(path.name))
            ):
                path.unlink()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing the folder; one that ends, however it ends, lets go of it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"store {folder} is being written by another process; wait for it") from None
        yield
    finally:
        os.close(descriptor)


def _command_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """What of the command a finished store knows."""
    sources = [[source["path"], source["format"], source["bytes"]] for source in manifest["sources"]]
    given = {"version": manifest["version"], "tokenizer": manifest["tokenizer"]["given"]}
    return given | {"settings": manifest["settings"], "sources": sources}


def _dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _is_held_out(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _journal_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
