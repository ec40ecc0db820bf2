"""Documents come in the order of their records from any number of processes, and a lost process is one line."""

import multiprocessing
import os
import signal

import pytest

from data.preparing import tokenizing
from data.preparing.readers import Record
from data.preparing.sources import find_sources
from data.preparing.tokenizing import Work, sample_texts, tokenized
from parallax.tokenizers.plain import ByteTokenizer, CharTokenizer
from tests.data.small_stores import texts, write_jsonl

WORK = Work(ByteTokenizer().to_json(), "text", "uint16", nfc=False, min_chars=1)


def test_order_is_that_of_the_records(monkeypatch):
    monkeypatch.setattr(tokenizing, "CHUNK_RECORDS", 3)
    records = [Record(0, i, i, 0, text) for i, text in enumerate(texts(50))]
    alone, several = (
        [(d.number, d.ids.tolist(), d.digest) for chunk in tokenized(records, WORK, workers) for d in chunk]
        for workers in (1, 2)
    )
    assert alone == several
    assert [number for number, *_ in alone] == list(range(50))


def test_a_lost_process_is_one_line(monkeypatch, refused):
    monkeypatch.setattr(tokenizing, "CHUNK_RECORDS", 1)
    results = tokenized((Record(0, i, i, 0, "text") for i in range(1000)), WORK, 2)
    next(results)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    with refused("a process that tokenizes ended", "fewer --workers"):
        list(results)


def test_a_character_that_is_unknown_is_an_error_of_its_document_alone():
    work = Work(CharTokenizer("abc", True).to_json(), "text", "uint16", nfc=False, min_chars=1)
    records = [Record(0, i, i, 0, text) for i, text in enumerate(["ab", "xy", "c"])]
    ((first, second, third),) = tokenized(records, work, 1)
    assert (first.ids.tolist(), third.ids.tolist()) == ([0, 1, 3], [2, 3])
    assert second.ids is None
    assert "character 'x' at position 0" in second.error


@pytest.mark.parametrize("limit", [None, 400])
def test_a_sample_is_taken_from_every_source(tmp_path, limit):
    documents = texts(40)
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", documents[i * 10 : i * 10 + 10]) for i in range(4)]
    found = list(sample_texts(find_sources([str(path) for path in paths]), "text", False, limit))
    if limit is None:
        assert found == documents
    else:
        assert {int(text.split()[0]) // 10 for text in found} == {0, 1, 2, 3}
        assert 400 <= sum(len(text.encode()) for text in found) < 1600
