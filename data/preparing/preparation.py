"""Sources to a token store, a shard at a time.

Invariant: the store is a function of the sources, their order, the tokenizer and the settings. Neither the number of
processes nor a kill at any moment changes a byte of it: a shard ends behind the document that fills it, and a journal
says behind which document each shard that is whole ended.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from data.preparing.chats import ChatForm
from data.preparing.output import Output
from data.preparing.readers import Record, read_records
from data.preparing.sources import Source, described, opened, spelled
from data.preparing.tokenizing import Document, Work, tokenized
from data.stores.store import (
    FORMAT,
    SIDES,
    TOKENIZER,
    VERSION,
    ShardWriter,
    TokenSide,
    TokenStore,
    manifest_sha256,
    open_store,
)
from parallax.storage import reason_of
from parallax.tokenizers.base import Tokenizer

NAMED_ERRORS = 10


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
        chat: how conversations are written, and which of their tokens are learned; `field` is empty then. None where
            documents are plain text.
    """

    field: str = "text"
    min_chars: int = 1
    nfc: bool = False
    deduplicate: bool = False
    held_out: float = 0.01
    shard_tokens: int = 1 << 26
    chat: ChatForm | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.held_out <= 1:
            raise ValueError(f"held_out={self.held_out} must be from 0 to 1; try 0.01")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens={self.shard_tokens} must be at least 1; try {1 << 26}")
        if not self.field and self.chat is None:
            raise ValueError("field='' must name where the text is; try text")

    def to_json(self) -> dict[str, Any]:
        """The settings as a manifest holds them; `chat` only where it is given."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "chat" or value is not None}


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

    def __init__(
        self, folder: str | os.PathLike, sources: Sequence[Source], settings: Settings, tokenizer: str
    ) -> None:
        """Looks at the folder, local or on gs://, and makes nothing; `tokenizer` is what the command calls it.

        Raises ValueError if something else is in the folder, or a store that another command began.
        """
        self._output, self._sources, self._settings = Output(folder), sources, settings
        self._command = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": tokenizer,
            "settings": settings.to_json(),
            "sources": [dataclasses.astuple(source) for source in sources],
        }
        self.finished: TokenStore | None = None
        self.unreadable, self.named = 0, list[str]()
        self._left_out = {"short": 0, "duplicates": 0}
        self._shards: list[dict[str, Any]] = []
        self._hashes: list[str] = []
        self._at = (0, 0)
        self._seen: set[bytes] = set()
        self._progress = Progress()
        if self._output.is_finished:
            self.finished = open_store(folder)
            self._require_same(_command_of(self.finished.manifest), "was prepared")
        elif journal := self._output.read_journal():
            self._require_same(journal[0], "was begun")
            self._take_up(journal[1:])
        self.begun = bool(self._shards)

    @property
    def tokenizer_path(self) -> epath.Path:
        return epath.Path(self._output.folder) / TOKENIZER

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
        output = self._output
        try:
            with output.held():
                try:
                    self._begin(tokenizer)
                    self._tokenize(tokenizer, workers, skip_unreadable, observe)
                    output.finish(self._manifest(tokenizer))
                finally:
                    output.remove_drafts(all=not self._shards)
        except OSError as error:
            rule = f"store {output.folder} cannot be written: {reason_of(error)}"
            raise ValueError(f"{rule}; mend that and give the same command again") from None
        return open_store(output.folder)

    def _take_up(self, lines: list[dict[str, Any]]) -> None:
        """What earlier processes finished."""
        for line in lines:
            self._shards.append(line["shard"])
            self._hashes += line["hashes"]
            self._at = (line["at"][0], line["at"][1])
            self._left_out, self.unreadable, self.named = line["left_out"], line["unreadable"], line["named"]

    def _require_same(self, before: dict[str, Any], how: str) -> None:
        """Raises ValueError that names the first difference between two commands."""
        now = json.loads(json.dumps(self._command))
        store = f"store {self._output.folder}"
        remedy = "give the same command, or another --output, or remove the folder"
        if before["version"] != VERSION:
            raise ValueError(f"{store} {how} with format version {before['version']}; {remedy}")
        old, new = ({"tokenizer": each["tokenizer"]} | each["settings"] for each in (before, now))
        for name, value in new.items():
            if old.get(name) != value:
                flag = name.replace("_", "-")
                raise ValueError(f"{store} {how} with --{flag} {old.get(name)}, got {value}; {remedy}")
        pairs = list(zip(before["sources"], now["sources"], strict=False))
        if len(before["sources"]) != len(now["sources"]) or any(new[: len(old)] != old for old, new in pairs):
            raise ValueError(f"{store} {how} from other sources, or they changed since; {remedy}")

    def _begin(self, tokenizer: Tokenizer) -> None:
        self._output.remove_drafts(all=not self.begun)
        if not self.begun:
            self._output.begin(self._command, tokenizer)
            return
        self._output.go_on()
        sizes = [source.bytes for source in self._sources]
        self._progress.share = sum(sizes[: self._at[0]]) / max(1, sum(sizes))
        for side in SIDES:
            if self._settings.deduplicate:
                kept = {"shards": self._shards, "sources": [], "dtype": self._dtype(tokenizer), "sha256": ""}
                self._seen.update(TokenSide(TokenStore(self._output.folder, kept), side).digests())
            for shard in self._shards:
                self._progress.documents += shard[side]["documents"]
                self._progress.tokens += shard[side]["tokens"]
                self._progress.bytes += shard[side]["bytes"]

    def _tokenize(
        self, tokenizer: Tokenizer, workers: int, skip_unreadable: bool, observe: Callable[[Progress], None]
    ) -> None:
        settings, dtype = self._settings, self._dtype(tokenizer)
        work = Work(tokenizer.to_json(), settings.field, dtype, settings.nfc, settings.min_chars, settings.chat)
        self._writer = ShardWriter(self._output.path, len(self._shards), dtype)
        observe(self._progress)
        try:
            with contextlib.closing(tokenized(self._records(), work, workers)) as results:
                for documents in results:
                    for document in documents:
                        self._take(document, skip_unreadable)
                        if self._writer.tokens >= settings.shard_tokens:
                            self._close_shard((document.source, document.number + 1))
                            self._writer = ShardWriter(self._output.path, len(self._shards), dtype)
                    observe(self._progress)
            if self._writer.tokens:
                self._close_shard((len(self._sources), 0))
        finally:
            self._writer.discard()
        if not self._shards:
            raise ValueError(
                "the sources must hold a document and hold none that is kept; check --field and --min-chars"
            )

    def _dtype(self, tokenizer: Tokenizer) -> str:
        """The dtype of ids: four bytes where a bit of them says what is not learned."""
        return "uint16" if tokenizer.vocab_size <= 1 << 16 and self._settings.chat is None else "uint32"

    def _records(self) -> Iterator[Record]:
        """The records behind the last whole shard."""
        first, passed = self._at
        total = max(1, sum(source.bytes for source in self._sources))
        before = sum(source.bytes for source in self._sources[:first])
        for place, source in enumerate(self._sources[first:], start=first):

            def share(part: float, before: int = before, size: int = source.bytes) -> None:
                self._progress.share = (before + part * size) / total

            with opened(source.path) as file:
                for record in read_records(source, place, file, self._settings.field, share):
                    if file.count:
                        share(file.count / source.bytes)
                    if place > first or record.number >= passed:
                        yield record
                sha256 = file.sha256()
            if described(source.path, source.format) != source:
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
            side = "held_out" if is_held_out(document.digest, self._settings.held_out) else "train"
            place = {"source": document.source, "line": document.line, "offset": document.offset}
            self._writer.add(side, document.ids, size=document.size, digest=document.digest, **place)
            self._progress.documents += 1
            self._progress.tokens += len(document.ids)
            self._progress.bytes += document.size

    def _close_shard(self, at: tuple[int, int]) -> None:
        self._shards.append(self._writer.finish())
        known, self._at = self._at[0], at
        self._output.add_shard(
            len(self._shards) - 1,
            {
                "shard": self._shards[-1],
                "at": at,
                "hashes": self._hashes[known : at[0]],
                "left_out": self._left_out,
                "unreadable": self.unreadable,
                "named": self.named,
            },
        )

    def _manifest(self, tokenizer: Tokenizer) -> dict[str, Any]:
        totals = {
            side: {name: sum(shard[side][name] for shard in self._shards) for name in ("documents", "tokens", "bytes")}
            for side in SIDES
        }
        manifest = {"format": FORMAT, "version": VERSION, "sha256": ""}
        manifest |= {name: sum(totals[side][name] for side in SIDES) for name in ("documents", "tokens", "bytes")}
        manifest |= totals | {
            "max_id": max(shard[side]["max_id"] for shard in self._shards for side in SIDES),
            "dtype": self._dtype(tokenizer),
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
        return manifest | {"sha256": manifest_sha256(manifest)}


def _command_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """What of the command a finished store knows."""
    sources = [[source["path"], source["format"], source["bytes"]] for source in manifest["sources"]]
    given = {"version": manifest["version"], "tokenizer": manifest["tokenizer"]["given"]}
    return given | {"settings": manifest["settings"], "sources": sources}


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Whether a text is among the held-out fraction, by the first bytes of its sha256."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
