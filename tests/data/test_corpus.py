"""Names and paths become checked text or token records; what is wrong is refused in one line."""

import os

import numpy as np
import pytest

from data.corpus import Corpus, load_corpus, overfit_corpus
from data.pipeline import prepare, tokenizer_for
from parallax.tokenizers.plain import ByteTokenizer
from parallax.tokenizers.registry import save_tokenizer
from tests.data.small_stores import write_token_records


def ignore(line):
    pass


def test_text_file_is_read_as_it_is(tmp_path):
    text = "Zwei Zeilen:\r\nüber Ω und 🙂\n"
    (tmp_path / "my notes.txt").write_bytes(text.encode("utf-8-sig"))  # a mark of the byte order is no character
    lines = []
    corpus = load_corpus(str(tmp_path / "my notes.txt"), notify=lines.append)
    assert corpus.documents == (text,)
    assert corpus.name == "my_notes"
    assert len(lines) == 1
    assert "my notes.txt" in lines[0]


def test_notice_goes_to_standard_error(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    load_corpus(str(tmp_path / "a.txt"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a.txt" in captured.err


def test_folder_is_read_in_the_order_of_its_paths(tmp_path):
    files = {"b.txt": "2", "a/z.md": "1", "c/d/e.TXT": "3", "c/picture.png": "4", "a.py": "5"}
    for name, text in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    corpus = load_corpus(str(tmp_path / "folder"), notify=ignore)
    assert corpus.documents == ("1", "2", "3")
    assert corpus.name == "folder"


def test_hidden_files_and_the_folder_s_own_description_are_left_out(tmp_path):
    names = ["b.txt", "sub/README.md", "README.md", "._b.txt", ".git/a.md", "sub/.ipynb_checkpoints/c.txt"]
    for name in names:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(name)
    lines = []
    corpus = load_corpus(str(tmp_path / "folder"), notify=lines.append)
    assert corpus.documents == ("b.txt", "sub/README.md")
    assert lines == [f"dataset folder {tmp_path}/folder, text files: 2 (left out: README.md and 3 hidden)"]
    for name in names[:2]:
        (tmp_path / "folder" / name).unlink()
    assert load_corpus(str(tmp_path / "folder"), notify=ignore).documents == ("README.md",)


def test_a_hidden_record_file_is_left_out(record_folder):
    folder, _ = record_folder
    (folder / "._part-0.array_record").write_bytes(b"of a Mac")
    assert len(load_corpus(str(folder), notify=ignore).records) == 40


@pytest.mark.parametrize(("count", "more"), [(10, None), (13, " and 3 more; ")])
def test_all_files_that_are_no_text_are_named(tmp_path, refused, count, more):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "00.txt").touch()
    for number in range(1, count):
        (tmp_path / f"{number:02}.txt").write_bytes(b"caf\xe9")
    with refused(
        f"{count} text files: {tmp_path}/00.txt must hold text and is empty, ",
        *(f"{tmp_path}/{number:02}.txt must be UTF-8 and has byte 0xe9 at offset 3" for number in range(1, 10)),
        more or "offset 3; ",
        "; convert to UTF-8 what is text, and remove the rest",
    ):
        load_corpus(str(tmp_path), notify=ignore)


def test_a_name_that_is_not_utf_8_is_spelled_out(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "w") as file:
        file.write("text")
    corpus = load_corpus(os.fsdecode(path), notify=ignore)
    assert corpus.edition == rf"text file {tmp_path}/caf\xe9.txt"
    assert corpus.name == "caf_"


def test_overfit_corpus_is_one_short_sentence():
    (text,) = overfit_corpus().documents
    assert 50 <= len(text) <= 70
    assert "\n" not in text


def test_wrong_paths_are_refused(tmp_path, refused):
    with refused("no_such_place", "tiny_shakespeare", "check the spelling"):
        load_corpus("no_such_place", notify=ignore)
    with refused("must be tiny_shakespeare or a path that exists"):
        load_corpus("x" * 300, notify=ignore)
    (tmp_path / "empty.txt").touch()
    with refused("empty.txt", "is empty"):
        load_corpus(str(tmp_path / "empty.txt"), notify=ignore)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with refused("latin.txt", "UTF-8", "byte 0xe9 at offset 3"):
        load_corpus(str(tmp_path / "latin.txt"), notify=ignore)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "picture.png").touch()
    with refused("folder", "*.txt", "holds none"):
        load_corpus(str(tmp_path / "folder"), notify=ignore)


@pytest.fixture
def record_folder(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, size).astype(np.int32) for size in rng.integers(1, 300, 40)]
    write_token_records(tmp_path / "part-0.array_record", documents[:25])
    write_token_records(tmp_path / "part-1.arrayrecord", [document.tolist() for document in documents[25:]])
    save_tokenizer(ByteTokenizer(), tmp_path / "tokenizer.json")
    return tmp_path, documents


def test_records_come_back_in_order(record_folder):
    folder, documents = record_folder
    records = load_corpus(str(folder), notify=ignore).records
    assert len(records) == 40
    for read, written in zip(records, documents, strict=True):
        np.testing.assert_array_equal(read, written)
    np.testing.assert_array_equal(records.lengths(257), [len(document) for document in documents])
    single = load_corpus(str(folder / "part-1.arrayrecord"), notify=ignore)
    assert single.name == "part-1"
    np.testing.assert_array_equal(single.records[0], documents[25])


class Counting:
    """A source of records that notes the sizes of reads."""

    def __init__(self, source):
        self._source, self.reads = source, []

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, numbers):
        self.reads.append(len(numbers))
        return self._source.__getitems__(numbers)


def test_records_are_read_many_at_a_time(record_folder, monkeypatch):
    """A read costs time in the number of records of its file."""
    folder, documents = record_folder
    corpus = load_corpus(str(folder), notify=ignore)
    records = corpus.records
    records._source = source = Counting(records._source)
    monkeypatch.setattr("data.records.READ_AT_ONCE", 30)
    assert corpus.sha256 == Corpus("x", "x", tuple(documents)).sha256
    assert source.reads == [30, 10]
    train, _ = prepare(corpus, tokenizer_for(corpus), 16)
    assert source.reads == [30, 10] * 2
    batch = train.gather(train.draw(6, 0, 0))
    assert len(source.reads) == 5
    held = {number for row in batch["sample_ids"].tolist() for number, _, _ in train.index.pieces(row)}
    assert source.reads[-1] == len(held)
    np.testing.assert_array_equal(records[39], documents[39])


def test_shards_of_others_are_found_in_subfolders_too(record_folder):
    folder, documents = record_folder
    (folder / "train").mkdir()
    (folder / "part-0.array_record").rename(folder / "train/x.array_record-00000-of-00002")
    (folder / "train/notes.txt").write_text("words")
    (folder / "part-1.arrayrecord").rename(folder / "train/x.array_record-00001-of-00002")
    lines = []
    records = load_corpus(str(folder), notify=lines.append).records
    assert lines == [f"dataset token records {folder}: 40 documents, files: 2 (left out: text (1))"]
    np.testing.assert_array_equal(records[30], documents[30])
    assert records.tokenizer_path == folder / "tokenizer.json"


def test_what_is_no_plain_text_is_not_read_as_it(tmp_path, refused):
    for name in ("a.jsonl", "a.parquet", "a.csv", "a.txt.gz"):
        (tmp_path / name).write_text("{}")
        with refused(f"{name} must be plain text to be read as it is", "prepare.py"):
            load_corpus(str(tmp_path / name), notify=ignore)


def test_ids_beyond_the_vocabulary_are_refused(record_folder, refused):
    folder, _ = record_folder
    records = load_corpus(str(folder), notify=ignore).records
    with refused("must hold ids from 0 to 99", "tokenizer.json"):
        records.lengths(100)


def test_damaged_or_orphaned_records_are_refused(record_folder, refused):
    folder, _ = record_folder
    (folder / "part-1.arrayrecord").write_bytes(b"this is no record file")
    with refused("must be ArrayRecord files", "write them again"):
        load_corpus(str(folder), notify=ignore)
    write_token_records(folder / "part-1.arrayrecord", [])
    with refused("part-1.arrayrecord", "hold none"):
        load_corpus(str(folder / "part-1.arrayrecord"), notify=ignore)
    (folder / "tokenizer.json").unlink()
    with refused("need a tokenizer", "tokenizer.json"):
        load_corpus(str(folder), notify=ignore)
