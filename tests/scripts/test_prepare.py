"""prepare.py: sources to a store, killed and given again, described, verified, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from data.stores.store import open_store
from scripts import prepare
from tests.data.small_stores import decoded, texts, write_jsonl
from tests.scripts.cases import read_cases
from tests.scripts.runs import SCRIPTS

MAKE = ["web", "--output", "store", "--held-out", "0.2", "--workers", "1"]


@pytest.fixture
def web(tmp_path):
    """A folder with two files of documents, some of them twice."""
    write_jsonl(tmp_path / "web/a.jsonl", texts(40))
    write_jsonl(tmp_path / "web/more/b.jsonl", texts(50)[30:])
    return tmp_path


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:300"])
def test_a_store_is_made_described_and_verified(call, web, tokenizer):
    status, out, err = call(prepare, *MAKE, "--tokenizer", tokenizer, "--deduplicate")
    assert (status, out) == (0, ""), err
    store = open_store(web / "store")
    assert f"store: 50 documents ({store.manifest['held_out']['documents']} held out)" in err.splitlines()[-1]
    from parallax.tokenizers.registry import load_tokenizer

    assert sorted(text for *_, text in decoded(store, load_tokenizer(store.tokenizer_path))) == sorted(texts(50))
    status, out, _ = call(prepare, "--describe", "store")
    assert status == 0
    for words in (store.sha256, "source     web/more/b.jsonl, jsonl", "10 duplicates", "document   web/a.jsonl:1, "):
        assert words in out
    status, out, _ = call(prepare, "--verify", "store")
    assert (status, out) == (0, f"whole      store: 1 shards, sha256 {store.sha256}\n")
    status, _, err = call(prepare, *MAKE, "--tokenizer", tokenizer, "--deduplicate")
    assert (status, err.startswith("finished   store already: 50 documents")) == (0, True)


def test_conversations_are_made_and_shown_with_what_is_learned(call, tmp_path):
    rows = [{"prompt": f"{a}+1?", "completion": str(a + 1)} for a in range(20)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = ["--tokenizer", "byte", "--chat", "assistant", "--chat-template", "plain", "--workers", "1"]
    status, _, err = call(prepare, "chats.jsonl", "--output", "store", *plain)
    assert status == 0, err
    status, out, _ = call(prepare, "--describe", "store")
    assert status == 0
    assert "chat assistant" in out
    assert "User: 0+1?\nAssistant:[[ 1" in out
    assert call(prepare, "--verify", "store")[0] == 0


def test_tokenizers_of_runs_and_of_stores(call, web, finished):
    status, _, err = call(prepare, "web", "--output", "first", "--tokenizer", "byte", "--workers", "1")
    assert status == 0, err
    status, _, err = call(prepare, "web", "--output", "store", "--tokenizer", "first", "--workers", "1")
    assert status == 0, err
    assert open_store(web / "store").manifest["tokenizer"]["name"] == "byte"
    status, _, err = call(
        prepare, "web", "--output", "third", "--tokenizer", "run", "--workers", "1", "--on-error", "skip"
    )
    assert status == 2  # the run knows a few letters, and no document is left
    assert "must hold a document and hold none that is kept" in err


def test_killed_at_random_and_given_again(web):
    """By processes as a user starts them, with workers of their own, which end too."""
    write_jsonl(web / "web/large.jsonl", texts(1500, seed=1))
    script = [sys.executable, str(SCRIPTS / "prepare.py"), "web", "--tokenizer", "bpe:300", "--shard-tokens", "5000"]

    def run(output, **keywords):
        return subprocess.Popen(
            [*script, "--output", output, "--workers", "2"], cwd=web, stderr=subprocess.PIPE, **keywords
        )

    with run("whole") as whole:
        assert whole.wait() == 0, whole.stderr.read()
    kills = 0
    for shards in (0, 4):
        with run("store") as process:
            while process.poll() is None and len(list(web.glob("store/*.train.tokens"))) <= shards:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            process.stderr.read()  # ends when every worker has
            kills += process.wait() == -signal.SIGKILL
    assert kills
    with run("store") as last:
        assert last.wait() == 0, last.stderr.read()
    assert open_store(web / "store").sha256 == open_store(web / "whole").sha256


def test_unreadable_documents_are_named(call, web):
    (web / "web/z.jsonl").write_text('{"text": "fine"}\n{"body": 1}\n')
    status, _, err = call(prepare, *MAKE, "--tokenizer", "byte", "--on-error", "skip")
    assert status == 0
    assert err.splitlines()[-2:] == [
        "left out   1 documents that cannot be read, the first of them:",
        "           web/z.jsonl:2: there is no field 'text' but body",
    ]


BAD = """
web --output store | --tokenizer is missing | try --tokenizer bpe:32000
web | needs one of --output, --describe, --verify and --seen, got none
--output store --tokenizer byte | needs sources
web --output store --describe store --tokenizer byte | got --output and --describe
web --describe store | source web does not go with --describe
web --output store --tokenizer words | --tokenizer words must be char, byte, bpe:VOCABULARY or a folder | try bpe:32000
web --output store --tokenizer bpe:3 | bpe:3 must be at least 257
web --output store --tokenizer bpe:99999999999 | must be at most 16777216 | try bpe:32000
web --output store --tokenizer empty | --tokenizer empty must be char
web --output store --tokenizer five | five/config.json
web --output store --tokenizer byte --field body | web/a.jsonl:1: there is no field 'body' but id, text
web --output store --tokenizer char --field body | hold none that can be read (web/a.jsonl:1: there is no field 'body'
web --output store --tokenizer byte --min-chars 9999 | hold none that is kept
web --output store --tokenizer byte --held-out 1.5 | --held-out 1.5 must be
web --output store --tokenizer byte --workers 0 | --workers 0 must be at least 1
web --output store --tokenizer byte --shard-tokens 0 | --shard-tokens 0 must be
web --output store --tokenizer byte --format xml | xml
web --output store --tokenizer byte --format csv | folder web must hold a file of .csv
web --output taken --tokenizer byte | --output taken exists and is no store
web --output half.txt.gz --tokenizer byte | half.txt.gz exists and is no store
web web/a.jsonl --output store --tokenizer byte | web/a.jsonl is named twice
empty --output store --tokenizer byte | folder empty must hold a file
nowhere --output store --tokenizer byte | source nowhere must be
s3://bucket/a.jsonl --output store --tokenizer byte | must be a local path or start with gs://
mixed --output store --tokenizer byte | holds jsonl (1), csv (1) | --format jsonl
half.txt.gz --output store --tokenizer byte | half.txt.gz:0: the file cannot be read further
latin.txt --output store --tokenizer byte | latin.txt:1: its text is not UTF-8
--describe empty | must hold a manifest.json and holds none
--verify nowhere | must hold a manifest.json and holds none
--seen nowhere | --seen RUN goes with --step or with --document, got neither
--describe store --step 3 | --seen RUN goes with --step or with --document, got --step
--seen nowhere --step 3 --document a.jsonl:1 | got --step and --document
--seen nowhere --step 0 | --step 0 must be at least 1
--seen nowhere --step 3 | run folder nowhere has no readable config.json
"""


@pytest.mark.parametrize(("args", "words"), read_cases(BAD))
def test_bad_input_is_one_line_and_leaves_nothing(refuses, web, args, words):
    (web / "empty").mkdir()
    (web / "five").mkdir()
    (web / "five/tokenizer.json").write_text("5")
    (web / "taken").mkdir()
    (web / "taken/notes.txt").write_text("mine")
    (web / "mixed").mkdir()
    shutil.copy(web / "web/a.jsonl", web / "mixed")
    (web / "mixed/b.csv").write_text("text\n")
    (web / "half.txt.gz").write_bytes(b"\x1f\x8b\x08\x00")
    (web / "latin.txt").write_bytes(b"caf\xe9")
    refuses(prepare, args, *words)


def test_names_of_any_bytes_are_described_on_one_line(call, web):
    for name in (b"caf\xe9.jsonl", b"two\nlines.jsonl"):
        shutil.copy(web / "web/a.jsonl", os.path.join(os.fsencode(web), b"web", name))
    assert call(prepare, *MAKE, "--tokenizer", "byte")[0] == 0
    status, out, err = call(prepare, "--describe", "store")
    assert status == 0, err
    assert r"source     web/caf\xe9.jsonl, jsonl, " in out
    assert r"source     web/two\nlines.jsonl, jsonl, " in out


@pytest.mark.parametrize("spec", ["bpe:10", "bpe:foo", "bpe:"])
def test_a_vocabulary_that_is_none_is_refused_before_anything_is_read(refuses, web, monkeypatch, spec):
    def unread(*args):
        raise AssertionError("read")

    monkeypatch.setattr("scripts.preparing.make.sample_texts", unread)
    refuses(prepare, [*MAKE, "--tokenizer", spec], "bpe", "try bpe:1024")


def test_a_flipped_byte_is_found_and_named(call, refuses, web):
    assert call(prepare, *MAKE, "--tokenizer", "byte")[0] == 0
    path = web / "store/00000.train.tokens"
    content = bytearray(path.read_bytes())
    content[77] ^= 4
    path.write_bytes(content)
    refuses(prepare, ["--verify", "store"], "00000.train.tokens must have the sha256")
    (web / "store/manifest.json").write_text(json.dumps({"format": "parallax token store", "version": 9}))
    refuses(prepare, ["--describe", "store"], "must have format version 1, got format version 9")


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("gcsfs.retry", Exception),
        ("aiohttp.client_exceptions", OSError),
        ("google.auth.exceptions", Exception),
        ("requests.exceptions", OSError),
    ],
)
def test_a_bucket_that_fails_is_one_line(refuses, web, monkeypatch, module, kind):
    """With errors of its clients, of which many are no OSError."""

    def fail(*args):
        raise type("Error", (kind,), {"__module__": module})("backend error, 503\nand more")

    monkeypatch.setattr("scripts.preparing.make.find_sources", fail)
    refuses(prepare, [*MAKE, "--tokenizer", "byte"], "gs:// must answer and does not (backend error, 503); try again")


def test_help_answers(call):
    status, out, _ = call(prepare, "--help")
    assert status == 0
    assert "SOURCE" in out
