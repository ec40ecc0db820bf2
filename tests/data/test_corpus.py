"""Names and paths become checked text or token records; what is wrong is refused in one line."""

import numpy as np
import pytest

from data.corpus import load_corpus, overfit_corpus
from data.records import write_token_records
from parallax.tokenizers.plain import ByteTokenizer
from parallax.tokenizers.registry import save_tokenizer


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


def test_overfit_corpus_is_one_short_sentence():
    (text,) = overfit_corpus().documents
    assert 50 <= len(text) <= 70
    assert "\n" not in text


def test_wrong_paths_are_refused(tmp_path, refused):
    with refused("no_such_place", "tiny_shakespeare", "check the spelling"):
        load_corpus("no_such_place", notify=ignore)
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


def test_shards_of_others_are_found_in_subfolders_too(record_folder):
    folder, documents = record_folder
    (folder / "train").mkdir()
    (folder / "part-0.array_record").rename(folder / "train/x.array_record-00000-of-00002")
    (folder / "part-1.arrayrecord").rename(folder / "train/x.array_record-00001-of-00002")
    records = load_corpus(str(folder), notify=ignore).records
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


@pytest.mark.parametrize("document", [[], [0.5], [[1, 2]], [-1], [2**31]])
def test_records_that_are_no_row_of_ids_are_not_written(tmp_path, refused, document):
    with refused("document 1 must"):
        write_token_records(tmp_path / "a.array_record", [[1], document])
    assert not list(tmp_path.iterdir())
