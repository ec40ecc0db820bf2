"""A file of documents to records, one at a time, whatever its format.

Invariant: memory does not grow with the file: it holds a record, or a row group of parquet. What cannot be read is a
record that says why; where it leaves no way to find the next one, it is the last.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.preparing.sources import BROKEN, RemoteFile, Source, SourceFile, decompressed
from data.records import TokenRecords
from parallax.storage import is_remote
from parallax.tokenizers.registry import load_tokenizer

TEXT_BYTES = 1 << 20
LARGEST_ELEMENT = 1 << 28
"""Characters; a json element that is longer is taken for one that never ends."""
TABLE_ROWS = 1024
BYTE_ORDER_MARK = codecs.BOM_UTF8
BETWEEN = re.compile(r"[\s,]*")


class Record(NamedTuple):
    """A document before its text is looked at.

    Attributes:
        source: its file's place in the list of sources.
        number: its own place in the file, from 0.
        line: of its first character, or the row of a table, from 1.
        offset: of that line, in bytes of the uncompressed file; 0 in json and parquet.
        content: the text, or the UTF-8 of it; with `is_json` that of an object which holds it.
        error: why there is no text.
    """

    source: int
    number: int
    line: int
    offset: int
    content: str | bytes = b""
    is_json: bool = False
    error: str = ""


def read_records(
    source: Source, place: int, file: SourceFile, field: str, observe: Callable[[float], None] = lambda share: None
) -> Iterator[Record]:
    """The records of a source, of which `file` is the open file and `place` the place in the list of sources.

    A text file is a document; one of more than 1 MiB is several, cut at ends of lines. Where `field` is empty, a
    document is a whole object, in JSON. `observe` receives the share of the file that was read, where that does not
    follow from the bytes.
    """
    number, line = 0, 0
    try:
        if source.format == "parquet":
            found = _read_parquet(source.path, field, observe)
        elif source.format == "records":
            found = _read_token_records(source.path)
        else:
            found = READERS[source.format](decompressed(file, source.path), field)
        for line, offset, content, error in found:
            yield Record(place, number, line, offset, content, source.format == "jsonl" and field != "", error)
            number += 1
    except BROKEN as error:
        reason = f"the file cannot be read further: {' '.join(str(error).split()) or type(error).__name__}"
        yield Record(place, number, line, 0, error=reason)


def field_of(value: Any, field: str) -> str:
    """The text at a dotted path of an object. Raises ValueError if there is none."""
    for name in field.split("."):
        if not isinstance(value, dict):
            raise ValueError(f"field {field!r} needs an object and finds {_kind(value)}")
        if name not in value:
            raise ValueError(f"there is no field {field!r} but {', '.join(list(value)[:8]) or 'none at all'}")
        value = value[name]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be text and is {_kind(value)}")
    return value


Found = Iterator[tuple[int, int, str | bytes, str]]
"""Line, offset, content, error."""


def _read_text(stream: io.BufferedIOBase, field: str) -> Found:
    first = stream.read(TEXT_BYTES)
    rest = first.removeprefix(BYTE_ORDER_MARK)
    line, offset = 1, len(first) - len(rest)
    while rest:
        piece = rest + stream.read(max(0, TEXT_BYTES - len(rest)))
        cut = _cut(piece) if len(piece) >= TEXT_BYTES else len(piece)
        piece, rest = piece[:cut], piece[cut:]
        yield line, offset, piece, ""
        line, offset = line + piece.count(b"\n"), offset + len(piece)
        rest = rest or stream.read(TEXT_BYTES)


def _cut(piece: bytes) -> int:
    """The position behind the last whole line, or before the last character where no line ends."""
    cut = piece.rfind(b"\n") + 1
    if not cut:
        cut = len(piece) - 1
        while cut > 1 and 0x80 <= piece[cut] < 0xC0:  # inside a character of UTF-8
            cut -= 1
    return cut


def _lines(stream: io.BufferedIOBase) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, offset, and the line with its end."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        yield number, offset, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        offset += len(line)


def _read_jsonl(stream: io.BufferedIOBase, field: str) -> Found:
    for number, offset, line in _lines(stream):
        if not line.isspace():
            yield number, offset, line, ""


def _read_csv(stream: io.BufferedIOBase, field: str) -> Found:
    place = [1, 0]  # where the next line begins

    def texts() -> Iterator[str]:
        for number, offset, line in _lines(stream):
            place[:] = [number + 1, offset + len(line)]
            yield line.decode("utf-8", "surrogateescape")  # what is no UTF-8 is found in the text

    csv.field_size_limit(LARGEST_ELEMENT)
    rows = csv.reader(texts(), strict=True)
    header = next(rows, [])
    if field not in header:
        raise ValueError(f"there is no column {field!r} but {', '.join(header[:8]) or 'none at all'}")
    column = header.index(field)
    while True:
        line, offset = place
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield line, offset, "", f"the row is not csv ({error})"
            continue
        if row is None:
            return
        if len(row) == len(header):
            yield line, offset, row[column], ""
        elif row:
            yield line, offset, "", f"the row has {len(row)} columns and the header {len(header)}"


def _read_json(stream: io.BufferedIOBase, field: str) -> Found:
    """The elements of an array, or objects one after the other."""
    texts = codecs.getreader("utf-8-sig")(stream, "surrogateescape")
    decoder, buffer, at, number = json.JSONDecoder(), texts.read(TEXT_BYTES), 0, 0
    at = _skipped(buffer, at)
    is_array = buffer.startswith("[", at)
    at += is_array
    while True:
        at, value, reason, end = _skipped(buffer, at), None, "", 0
        ends = is_array and buffer.startswith("]", at)
        if not ends:
            try:
                value, end = decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError) as error:
                reason = str(error)
        if not ends and (reason or end == len(buffer)):  # an element may go on, and a number does not say
            more = texts.read(max(TEXT_BYTES, len(buffer) - at)) if len(buffer) - at < LARGEST_ELEMENT else ""
            if more:
                buffer, at = buffer[at:] + more, 0
                continue
        if ends or (at == len(buffer) and not is_array):
            break
        number += 1
        if reason:
            yield number, 0, "", f"the element is not json ({reason}), and what follows cannot be read"
            return
        try:
            yield number, 0, field_of(value, field) if field else json.dumps(value), ""
        except ValueError as error:
            yield number, 0, "", str(error)
        at = end
    if is_array and (buffer[at + 1 :] + texts.read(TEXT_BYTES)).strip():
        yield number, 0, "", "something follows the end of the array, and cannot be read"


def _skipped(buffer: str, at: int) -> int:
    """The position behind the white space and commas between elements."""
    found = BETWEEN.match(buffer, at)
    return found.end() if found else at


def _read_parquet(path: str, field: str, observe: Callable[[float], None]) -> Found:
    import pyarrow.parquet

    file: Any = RemoteFile(path) if is_remote(path) else path
    with pyarrow.parquet.ParquetFile(file, buffer_size=TEXT_BYTES) as table:
        columns = table.schema_arrow.names
        if field and field.split(".")[0] not in columns:
            raise ValueError(f"there is no column {field!r} but {', '.join(columns[:8])}")
        total, row = max(1, table.metadata.num_rows), 0
        for batch in table.iter_batches(TABLE_ROWS, columns=[field] if field else None, use_threads=False):
            for value in batch.to_pylist():
                row += 1
                try:
                    yield row, 0, field_of(value, field) if field else json.dumps(value), ""
                except (ValueError, TypeError) as error:  # what JSON has no word for
                    yield row, 0, "", str(error)
            observe(row / total)


def _read_token_records(path: str) -> Found:
    """The texts that ids stand for, by the tokenizer.json beside the file or one folder up."""
    if is_remote(path):
        raise ValueError("ArrayRecord files are read from a local disk alone; copy it here")
    above = [folder for folder in Path(path).parents[:2] if (folder / "tokenizer.json").is_file()]
    records = TokenRecords([Path(path)], next(iter(above), Path(path).parent))
    tokenizer = load_tokenizer(records.tokenizer_path)
    for row, ids in enumerate(records, start=1):
        yield row, 0, tokenizer.decode(ids), ""


READERS: dict[str, Callable[[io.BufferedIOBase, str], Found]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", bytes: "bytes"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
