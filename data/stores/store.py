"""Token stores: flat arrays of tokens in shards, a table of where each document came from, and a manifest.

Invariant: the manifest is written last, so a store that opens is whole; opening one reads its manifest alone. A shard
has two sides, `train` and `held_out`; of each a file of tokens, little-endian, documents end to end, and a file of
DOCUMENT rows.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from etils import epath

from data.stores.ranges import Files
from parallax.storage import is_remote, open_folder, reason_of

FORMAT, VERSION = "parallax token store", 1
MANIFEST, JOURNAL, TOKENIZER = "manifest.json", "journal.jsonl", "tokenizer.json"
JOURNAL_MARK = f'{{"format": "{FORMAT}"'.encode()
"""How a journal begins; a file of that name that begins otherwise is not a store's."""
SIDES = ("train", "held_out")
DOCUMENT = np.dtype(
    [
        ("start", "<u8"),  # its first token, counted in the file of tokens
        ("source", "<u4"),  # its place in the manifest's list of sources
        ("line", "<u8"),  # of its first character, or the row of a table, from 1
        ("offset", "<u8"),  # of its line, in bytes of the uncompressed file; 0 in json and parquet
        ("digest", "u1", (16,)),  # the first bytes of the sha256 of its text
    ]
)
UNLEARNED = 1 << 31  # the bit beside an id of four bytes that says of its token that it is read and not learned
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """Where a document came from: a line, or the row of a table, from 1, and that line's offset in bytes."""

    path: str
    line: int
    offset: int
    digest: str
    tokens: int


class TokenStore:
    """A store, by its manifest.

    Attributes:
        folder: where it is, local or on gs://.
        manifest: what manifest.json holds.
    """

    def __init__(self, folder: str | os.PathLike, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = epath.Path(folder), manifest

    @property
    def sha256(self) -> str:
        """The sha256 of everything: the manifest holds that of each file."""
        return self.manifest["sha256"]

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        sides = [shard[side] for shard in self.manifest["shards"] for side in SIDES]
        tokens, documents = (sum(side[what] for side in sides) for what in ("tokens", "documents"))
        return tokens * np.dtype(self.manifest["dtype"]).itemsize + documents * DOCUMENT.itemsize

    @property
    def content_sha256(self) -> str:
        """The sha256 of the shards and their tokenizer, wherever the sources were when they were prepared."""
        value = [self.manifest["shards"], self.manifest["tokenizer"]["sha256"], self.manifest["dtype"]]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    @property
    def learned(self) -> str | None:
        """What of its conversations is learned, as prepare.py --chat has it; None where documents are plain text."""
        return self.manifest["settings"].get("chat", {}).get("learned")

    @property
    def tokenizer_path(self) -> epath.Path:
        return self.folder / TOKENIZER

    @property
    def name(self) -> str:
        """The name of the folder, without suffix."""
        return PurePosixPath(os.path.abspath(self.folder) if not is_remote(self.folder) else self.folder).stem

    @cached_property
    def train(self) -> "TokenSide":
        return TokenSide(self, "train")

    @cached_property
    def held_out(self) -> "TokenSide":
        return TokenSide(self, "held_out")


class TokenSide:
    """The tokens of one side of a store, all shards end to end; `len` counts them."""

    def __init__(self, store: TokenStore, side: str) -> None:
        self._side = side
        self._sources = store.manifest["sources"]
        self._type = np.dtype(store.manifest["dtype"]).newbyteorder("<")
        self._documents = [shard[side]["documents"] for shard in store.manifest["shards"]]
        self._starts = np.cumsum([0, *(shard[side]["tokens"] for shard in store.manifest["shards"])], dtype=np.int64)
        self._numbers = np.cumsum([0, *self._documents], dtype=np.int64)
        self._files, self._table = Files(store.folder, store.sha256, store.size), lru_cache(4)(self._read_table)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, int32 [stop - start]. Raises Damaged if a file is missing or cut short."""
        return self.read_learned([(start, stop)])[0][0]

    def read_learned(self, spans: Sequence[tuple[int, int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`read` of each span, all at once over a network, and which tokens are learned, bool [stop - start]."""
        size = self._type.itemsize
        ranges, counts = [], []
        for start, stop in spans:
            shard, before = self._shard(start), len(ranges)
            while start < stop:
                first, end = self._starts[shard : shard + 2].tolist()
                name = file_name(shard, self._side, "tokens")
                ranges.append((name, (start - first) * size, (min(stop, end) - first) * size))
                start, shard = min(stop, end), shard + 1
            counts.append(len(ranges) - before)
        contents = iter(self._files.read(ranges))
        joined = [b"".join(next(contents) for _ in range(count)) for count in counts]
        found = [np.frombuffer(content, self._type).astype(np.uint32) for content in joined]
        return [((ids & ~np.uint32(UNLEARNED)).astype(np.int32), ids < UNLEARNED) for ids in found]

    @property
    def num_documents(self) -> int:
        return int(self._numbers[-1])

    def spans_of(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """The first token of each document, numbered from 0, and the one behind its last; read at the same time."""
        shards = [int(np.searchsorted(self._numbers, number, "right")) - 1 for number in numbers]
        ranges, size = [], DOCUMENT.itemsize
        for number, shard in zip(numbers, shards, strict=True):
            row = number - int(self._numbers[shard])
            stop = min(row + 2, self._documents[shard])
            ranges.append((file_name(shard, self._side, "documents"), row * size, stop * size))
        spans = []
        for shard, content in zip(shards, self._files.read(ranges), strict=True):
            starts, (before, end) = np.frombuffer(content, DOCUMENT)["start"], self._starts[shard : shard + 2].tolist()
            spans.append((before + int(starts[0]), before + int(starts[1]) if len(starts) > 1 else end))
        return spans

    def number_at(self, position: int) -> int:
        """The number of the document that holds a token."""
        shard = self._shard(position)
        row = np.searchsorted(self._table(shard)["start"], position - int(self._starts[shard]), "right") - 1
        return int(self._numbers[shard]) + int(row)

    def starts_in(self, start: int, stop: int) -> np.ndarray:
        """The positions from start to stop - 1 at which a document begins, int64."""
        found = [np.zeros(0, np.int64)]
        for shard in range(self._shard(start), self._shard(stop - 1) + 1):
            if not self._documents[shard]:
                continue
            starts = self._table(shard)["start"].astype(np.int64) + self._starts[shard]
            found.append(starts[np.searchsorted(starts, start) : np.searchsorted(starts, stop)])
        return np.concatenate(found)

    def documents_in(self, start: int, stop: int) -> Iterator[tuple[int, Document]]:
        """The documents with a token from start to stop - 1, each with the position of its first token."""
        while start < stop:
            shard = self._shard(start)
            table, before = self._table(shard), int(self._starts[shard])
            row = int(np.searchsorted(table["start"], start - before, "right")) - 1
            document, first = self._document(shard, table, row), before + int(table[row]["start"])
            yield first, document
            start = first + document.tokens

    def find(self, path: str, line: int) -> Iterator[tuple[int, Document]]:
        """The documents from that line of that source, each with the position of its first token; reads all tables."""
        sources = [place for place, source in enumerate(self._sources) if source["path"] == path]
        for shard, count in enumerate(self._documents if sources else ()):
            if not count:
                continue
            table = self._table(shard)
            for row in np.flatnonzero((table["line"] == line) & np.isin(table["source"], sources)).tolist():
                yield int(self._starts[shard]) + int(table[row]["start"]), self._document(shard, table, row)

    def documents(self) -> Iterator[tuple[Document, np.ndarray]]:
        """Each document with its tokens, in order."""
        return ((document, ids) for document, ids, _ in self.learned_documents())

    def learned_documents(self) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
        """`documents`, each with which of its tokens are learned, bool [length]."""
        for shard, count in enumerate(self._documents):
            if not count:
                continue
            table = self._table(shard)
            for row in range(count):
                document, start = self._document(shard, table, row), int(table[row]["start"])
                start += int(self._starts[shard])
                yield document, *self.read_learned([(start, start + document.tokens)])[0]

    def digests(self) -> Iterator[bytes]:
        """What tells one text from another, of each document in order."""
        for shard, count in enumerate(self._documents):
            yield from (bytes(digest) for digest in (self._table(shard)["digest"] if count else ()))

    def _shard(self, position: int) -> int:
        return int(np.searchsorted(self._starts, position, "right")) - 1

    def _document(self, shard: int, table: np.ndarray, row: int) -> Document:
        found, last = table[row], row + 1 == len(table)
        stop = self._starts[shard + 1] - self._starts[shard] if last else table[row + 1]["start"]
        path = self._sources[int(found["source"])]["path"]
        place = (int(found["line"]), int(found["offset"]), bytes(found["digest"]).hex())
        return Document(path, *place, tokens=int(stop) - int(found["start"]))

    def _read_table(self, shard: int) -> np.ndarray:
        wanted = (file_name(shard, self._side, "documents"), 0, self._documents[shard] * DOCUMENT.itemsize)
        return np.frombuffer(self._files.read([wanted])[0], DOCUMENT)


class ShardWriter:
    """A shard that is being written: drafts, which become its files in `finish`.

    Attributes:
        tokens: written so far, on both sides.
    """

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        """Raises OSError if the folder cannot be written."""
        self._folder, self._number, self._type = folder, number, np.dtype(dtype).newbyteorder("<")
        self._files = {(side, kind): _Draft(folder / file_name(number, side, kind)) for side, kind in FILES}
        self._counts = {side: {"tokens": 0, "documents": 0, "bytes": 0, "max_id": -1} for side in SIDES}
        self.tokens = 0

    def add(self, side: str, ids: np.ndarray, *, size: int, source: int, line: int, offset: int, digest: bytes) -> None:
        """Adds a document of `size` bytes of text, some of its ids perhaps UNLEARNED. Raises OSError."""
        counts, row = self._counts[side], np.zeros((), DOCUMENT)
        for name, value in (("start", counts["tokens"]), ("source", source), ("line", line), ("offset", offset)):
            row[name] = value
        row["digest"] = np.frombuffer(digest, np.uint8)
        self._files[side, "documents"].write(row.tobytes())
        self._files[side, "tokens"].write(ids.astype(self._type, copy=False).tobytes())
        counts["tokens"] += len(ids)
        counts["documents"] += 1
        counts["bytes"] += size
        counts["max_id"] = max(counts["max_id"], int((ids.astype(np.int64) & ~UNLEARNED).max()) if len(ids) else -1)
        self.tokens += len(ids)

    def finish(self) -> dict[str, Any]:
        """Puts the files in their places and returns the shard's entry in the manifest. Raises OSError."""
        for draft in self._files.values():
            draft.finish()
        sync_folder(self._folder)
        hashes = {f"{side}.{kind}": draft.sha256 for (side, kind), draft in self._files.items()}
        return {
            side: self._counts[side] | {f"{kind}_sha256": hashes[f"{side}.{kind}"] for kind in ("tokens", "documents")}
            for side in SIDES
        }

    def discard(self) -> None:
        """Removes the drafts."""
        for draft in self._files.values():
            draft.discard()


FILES = tuple((side, kind) for side in SIDES for kind in ("tokens", "documents"))


class _Draft:
    """A file under a name of its own until it is whole and on the disk."""

    def __init__(self, path: Path) -> None:
        self._path, self._draft = path, path.with_name(f".{path.name}.draft")
        self._file, self._digest = self._draft.open("wb"), hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._draft.replace(self._path)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # what is buffered does not fit on a full disk
            self._file.close()
        self._draft.unlink(missing_ok=True)


def file_name(shard: int, side: str, kind: str) -> str:
    """The name of a shard's file; kind is tokens or documents."""
    return f"{shard:05d}.{side}.{kind}"


def is_store(folder: Path | epath.Path) -> bool:
    """Whether a folder is a store, finished or not, damaged or not."""
    if has_journal(folder) or (folder / file_name(0, "train", "tokens")).exists():
        return True
    try:
        with (folder / MANIFEST).open("rb") as file:
            return FORMAT.encode() in file.read(256)
    except OSError:
        return False


def has_journal(folder: Path | epath.Path) -> bool:
    """Whether a folder holds the journal of a store; a file of that name may be anybody's."""
    try:
        with (folder / JOURNAL).open("rb") as file:
            return file.read(len(JOURNAL_MARK)) == JOURNAL_MARK
    except OSError:
        return False


def open_store(address: str | os.PathLike) -> TokenStore:
    """Reads the manifest of a local folder or one on gs://.

    Raises ValueError if there is none, it is damaged or of another version, or the bucket cannot be reached.
    """
    folder = open_folder(address)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        if has_journal(folder):
            raise ValueError(
                f"store {folder} is not finished; give the prepare.py command that began it again"
            ) from None
        raise ValueError(f"store {folder} must hold a {MANIFEST} and holds none; prepare it again") from None
    except OSError as error:
        rule = f"store {folder} must be a folder with a {MANIFEST} that can be read ({reason_of(error)})"
        raise ValueError(f"{rule}; give one that prepare.py made") from None
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} must be a store's manifest ({error}); prepare it again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST} must be a store's manifest and is none; prepare it again")
    if manifest.get("version") != VERSION:
        found = f"format version {manifest.get('version')}"
        raise ValueError(f"store {folder} must have format version {VERSION}, got {found}; prepare it again")
    if manifest.get("sha256") != manifest_sha256(manifest):
        raise ValueError(f"{folder / MANIFEST} was changed after it was written; prepare the store again")
    return TokenStore(folder, manifest)


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """The sha256 of all that a manifest holds but this."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify(store: TokenStore, observe: Callable[[int], None] = lambda size: None) -> None:
    """Reads every file and compares its sha256; `observe` receives the bytes read since the last call.

    Raises ValueError that names the files that are missing or damaged.
    """
    expected = {TOKENIZER: store.manifest["tokenizer"]["sha256"]}
    for number, shard in enumerate(store.manifest["shards"]):
        expected |= {file_name(number, side, kind): shard[side][f"{kind}_sha256"] for side, kind in FILES}
    damaged = [name for name, sha256 in expected.items() if _file_sha256(store.folder / name, observe) != sha256]
    if damaged:
        others = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        names = ", ".join(damaged[:3]) + others
        raise ValueError(
            f"store {store.folder} is damaged: {names} must have the sha256 of the manifest; prepare it again"
        )


def sync_folder(folder: Path) -> None:
    """Makes names that were just given survive a loss of power. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_sha256(path: epath.Path, observe: Callable[[int], None]) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
                observe(len(piece))
    except Exception:  # no OSError where it is on gs://
        return None
    return digest.hexdigest()
