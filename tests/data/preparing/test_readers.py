"""Each format gives its documents with their lines, compressed or not, and says what it cannot read."""

import bz2
import datetime
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from data.preparing import readers
from data.preparing.readers import read_records
from data.preparing.sources import SourceFile, find_sources
from data.preparing.tokenizing import read_text
from parallax.tokenizers.plain import ByteTokenizer
from parallax.tokenizers.registry import save_tokenizer
from tests.data.small_stores import write_token_records

TEXTS = ["one\ntwo", "drei, ü", 'a "quoted" word', "[1, 2]"]


def compress(path, content):
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes({".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)(content))
    return path


def read(path, field="text", format=None):
    """(line, text or error) of each record."""
    (source,) = find_sources([str(path)], format)
    with SourceFile(source.path) as file:
        records = list(read_records(source, 0, file, field))
    assert [record.number for record in records] == list(range(len(records)))
    found = [read_text(record, field, False) for record in records]
    return [(document.line, document.error if text is None else text) for text, document in found]


def test_token_records_are_read_as_the_texts_they_stand_for(tmp_path):
    (tmp_path / "set/train").mkdir(parents=True)
    path = tmp_path / "set/train/x.array_record-00000-of-00002"
    write_token_records(tmp_path / "x.array_record", [ByteTokenizer().encode(text) for text in TEXTS])
    (tmp_path / "x.array_record").rename(path)
    ((row, error),) = read(path)
    assert (row, f"token records {path} need a tokenizer; put it into {path.parent}" in error) == (0, True)
    save_tokenizer(ByteTokenizer(), tmp_path / "set/tokenizer.json")
    assert read(path) == list(enumerate(TEXTS, start=1))
    assert [source.format for source in find_sources([str(tmp_path / "set")])] == ["records"]


CONTENT = {
    "jsonl": ("".join(json.dumps({"n": 1, "text": text}) + "\n\n" for text in TEXTS), [1, 3, 5, 7]),
    "json": (json.dumps([{"text": text} for text in TEXTS], indent=1), [1, 2, 3, 4]),
    "csv": ('n,text\n1,"one\ntwo"\n2,"drei, ü"\n3,"a ""quoted"" word"\n4,"[1, 2]"\n', [2, 4, 5, 6]),
}


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2"])
def test_rows_with_their_lines(tmp_path, kind, suffix):
    content, lines = CONTENT[kind]
    path = compress(tmp_path / f"a.{kind}{suffix}", b"\xef\xbb\xbf" + content.encode())
    assert read(path) == list(zip(lines, TEXTS, strict=True))


def test_objects_one_after_the_other_are_json_too(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(" ".join(json.dumps({"meta": {"body": text}}, indent=2) for text in TEXTS))
    assert [text for _, text in read(path, "meta.body")] == TEXTS
    assert [text for _, text in read(path, "meta.body", "json")] == TEXTS


def test_elements_longer_than_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "TEXT_BYTES", 7)
    for kind in ("json", "jsonl", "csv"):
        path = tmp_path / f"a.{kind}"
        path.write_text(CONTENT[kind][0])
        assert [text for _, text in read(path)] == TEXTS


def test_parquet_by_column_and_by_path(tmp_path):
    table = pyarrow.table({"text": TEXTS, "meta": [{"body": text.upper()} for text in TEXTS]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert read(tmp_path / "a.parquet") == list(enumerate(TEXTS, start=1))
    assert [text for _, text in read(tmp_path / "a.parquet", "meta.body")] == [text.upper() for text in TEXTS]


def test_what_a_column_holds_instead_of_text_is_named(tmp_path):
    columns = {"raw": [b"a"], "day": [datetime.date(2020, 1, 1)], "n": [1.5]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    for field, kind in (("raw", "bytes"), ("day", "date"), ("n", "a number")):
        assert read(tmp_path / "a.parquet", field) == [(1, f"field '{field}' must be text and is {kind}")]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_long_text_is_cut_at_ends_of_lines(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(readers, "TEXT_BYTES", 64)
    text = "".join(f"line {i} über\n" for i in range(40)) + "ü" * 100
    path = compress(tmp_path / f"a.txt{suffix}", text.encode())
    found = read(path)
    assert "".join(piece for _, piece in found) == text
    lines = text.splitlines(keepends=True)
    for line, piece in found[:8]:
        assert piece.startswith(lines[line - 1])
        assert piece.endswith("\n")
        assert 40 < len(piece.encode()) <= 64
    compress(path, b"")
    assert read(path) == []


BAD = {
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n{"text": "b"}\n', [(1, "a"), (2, "Expecting value"), (3, "b")]),
    "missing.jsonl": (b'{"body": "a", "id": 1}\n', [(1, "there is no field 'text' but body, id")]),
    "number.jsonl": (b'{"text": 3}\n[1]\nnull\n', [(1, "must be text and is a number"), (2, "a list"), (3, "null")]),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe4"}\n', [(1, "a"), (2, "its text is not UTF-8")]),
    "half.jsonl": (b'{"text": "\\ud800"}\n', [(1, "its text is not UTF-8 (surrogates not allowed")]),
    "deep.jsonl": (b"[" * 100_000 + b"\n", [(1, "recursion")]),
    "latin.txt": (b"caf\xe9", [(1, "its text is not UTF-8 (unexpected end of data at 3)")]),
    "cut.json": (b'[{"text": "a"}, {"text": "b"', [(1, "a"), (2, "the element is not json")]),
    "open.json": (b'[{"text": "a"}', [(1, "a"), (2, "the element is not json")]),
    "two.json": (b'[{"text": "a"}] [{"text": "b"}]', [(1, "a"), (1, "something follows the end of the array")]),
    "rows.csv": (b"text,n\na,1\nb\nc,2\n", [(2, "a"), (3, "the row has 1 columns and the header 2"), (4, "c")]),
    "column.csv": (b"body,n\na,1\n", [(0, "there is no column 'text' but body, n")]),
    "latin.csv": (b"text\n\xe4\nb\n", [(2, "its text is not UTF-8"), (3, "b")]),
    "no.parquet": (b"PAR1 and no more", [(0, "the file cannot be read further")]),
    "no.txt.gz": (b"plain", [(0, "the file cannot be read further: Not a gzipped file")]),
    "no.txt.bz2": (b"plain", [(0, "the file cannot be read further")]),
    "no.txt.zst": (b"plain", [(0, "the file cannot be read further")]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_says_why(tmp_path, name):
    content, expected = BAD[name]
    (tmp_path / name).write_bytes(content)
    found = read(tmp_path / name)
    assert len(found) == len(expected)
    for (line, said), (expected_line, words) in zip(found, expected, strict=True):
        assert line == expected_line
        assert words in said


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2"])
def test_half_a_compressed_file_is_never_taken_for_all_of_it(tmp_path, suffix):
    content = "".join(json.dumps({"text": f"{i} {i * i} words"}) + "\n" for i in range(3000)).encode()
    path = compress(tmp_path / f"a.jsonl{suffix}", content)
    path.write_bytes(path.read_bytes()[:-20])
    line, said = read(path)[-1]
    assert "the file cannot be read further" in said
    assert line <= 3000


def test_frames_behind_each_other_are_one_file(tmp_path):
    both = b""
    for text in ("one\n", "two\n"):
        both += compress(tmp_path / "part.zst", text.encode()).read_bytes()
    (tmp_path / "a.txt.zst").write_bytes(both)
    assert read(tmp_path / "a.txt.zst") == [(1, "one\ntwo\n")]
