"""What train.py prepares by itself: rows of other formats and large texts, into the cache, once."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest

from data.corpus import load_corpus
from data.stores.store import open_store
from parallax.run_folder import read_settings
from parallax.storage import open_folder
from parallax.tokenizers.registry import load_tokenizer
from scripts import evaluate, prepare, train
from scripts.launching.local import free_port, local_environment
from scripts.preparing import automatic
from scripts.preparing.automatic import find_unprepared, prepare_into_cache
from tests.data.small_stores import decoded, texts, write_jsonl
from tests.parallax.interop.folders import write_folder
from tests.scripts.runs import ROOT, SHORT, SMALL


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache/parallax/stores"


def prepared(dataset, tokenizer="byte", notify=lambda line: None):
    """The data set as train.py reads it."""
    sources = find_unprepared(dataset, notify)
    return prepare_into_cache(dataset, sources, tokenizer, notify) if sources else dataset


def test_rows_are_prepared_once_and_trained_on(call, refuses, tmp_path, cache):
    write_jsonl(tmp_path / "web.jsonl", texts(80))
    flags = ["--dataset", "web.jsonl", "--tokenizer", "bpe:300", *SMALL, *SHORT, "--steps", "2"]
    refuses(train, [*flags, "--strategy", "mesh", "--mesh", "data=3"], "3")
    refuses(train, [*flags, "--held-out", "nothing.store"], "nothing.store must hold a manifest.json")
    assert not cache.exists()
    status, _, err = call(train, *flags, "--output-dir", "run")
    assert status == 0, err
    (made,) = cache.glob("*/web.store")
    assert f"prepare   web.jsonl into {made}" in err
    store, tokenizer = open_store(made), load_tokenizer("run/tokenizer.json")
    assert sorted(text for *_, text in decoded(store, tokenizer)) == sorted(texts(80))
    assert 2 < store.manifest["held_out"]["documents"] < 20
    settings = read_settings(open_folder("run"))
    assert (settings["run"]["dataset"], settings["corpus"]["sha256"]) == ("web.jsonl", store.content_sha256)
    shutil.rmtree(cache)
    status, _, err = call(train, "--resume", "--output-dir", "run", "--steps", "3")
    assert status == 0, err
    assert "\nresume    from step 2" in err
    before = (made / "manifest.json").stat().st_mtime_ns
    status, out, err = call(prepare, "--seen", "run", "--step", "3")
    assert (status, err) == (0, "")
    assert "web.jsonl:" in out
    assert (made / "manifest.json").stat().st_mtime_ns == before
    refuses(evaluate, ["--checkpoint", "run", "--dataset", "web.jsonl"], "holds no plain text", "a store")


def test_what_is_prepared_and_what_is_left(tmp_path, cache, monkeypatch, refused):
    lines = []
    write_jsonl(tmp_path / "web/a.jsonl", texts(30))
    write_jsonl(tmp_path / "web/b.jsonl", texts(9))
    store = open_store(prepared("web"))
    assert store.manifest["documents"] == 39
    assert prepared("web") == str(store.folder)
    with (tmp_path / "web/b.jsonl").open("a") as file:
        file.write('{"text": "another"}\n')
    assert prepared("web") != str(store.folder)
    for name in (str(store.folder), "tiny_shakespeare", "nowhere.txt"):
        assert prepared(name) == name
    (tmp_path / "notes.txt").write_text("to be " * 50)
    (tmp_path / "log").write_text("to be " * 50)
    (tmp_path / "notes.csv.gz").write_bytes(gzip.compress(b"text\nto be\nor not\n"))
    assert (prepared("notes.txt"), prepared("log")) == ("notes.txt", "log")
    assert load_corpus(prepared("notes.csv.gz"), notify=lines.append).stores is not None
    monkeypatch.setattr(automatic, "READ_WHOLE", 100)
    with refused("dataset notes.txt cannot be prepared as it is: it must hold two documents", "prepare.py takes"):
        prepared("notes.txt")
    (tmp_path / "web/README.md").write_text("what the files are")
    assert open_store(prepared("web")).manifest["documents"] == 40
    (tmp_path / "web/notes.md").write_text("words")
    with refused("dataset folder web must hold files of one format and holds jsonl", "--format jsonl"):
        prepared("web")
    (tmp_path / "web/notes.md").write_text("words " * 9999)
    (tmp_path / "web/more.md").write_text("more of them")
    assert prepared("web", notify=lines.append) != "web"
    assert lines[-2].endswith("its text files are taken")
    (tmp_path / "mix.json").write_text(json.dumps({"stages": [{"weights": {str(store.folder): 1}}]}))
    assert prepared("mix.json") == "mix.json"


def test_a_store_is_named_by_the_content_of_its_tokenizer(tmp_path, cache):
    write_jsonl(tmp_path / "web.jsonl", texts(20))
    first = prepared("web.jsonl", "bpe:300")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(f"{first}/tokenizer.json", name)
    assert prepared("web.jsonl", "one") == prepared("web.jsonl", "two") != first
    (tmp_path / "two/tokenizer.json").write_text('{"kind": "byte"}\n')
    assert prepared("web.jsonl", "one") != prepared("web.jsonl", "two") != prepared("web.jsonl", "byte")
    write_folder(tmp_path / "hf")
    before = prepared("web.jsonl", "hf")
    (tmp_path / "hf/generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert prepared("web.jsonl", "hf") != before


@pytest.mark.parametrize("count", [2, 3, 12])
def test_of_few_documents_there_is_one_on_each_side(tmp_path, cache, count):
    for seed in range(6):
        write_jsonl(tmp_path / "web.jsonl", texts(count, seed))
        store = open_store(prepared("web.jsonl"))
        assert min(store.manifest[side]["documents"] for side in ("train", "held_out")) >= 1
        assert store.manifest["documents"] == count


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:300"])
def test_what_cannot_be_prepared_is_one_line_and_leaves_no_store(tmp_path, cache, refused, tokenizer):
    write_jsonl(tmp_path / "web.jsonl", ["a"], field="body")
    with refused("dataset web.jsonl cannot be prepared as it is: ", "--field"):
        prepared("web.jsonl", tokenizer)
    assert not list(cache.glob("*/*.store"))


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
open("imported", "a").write("x")
if __name__ == "__main__":
    from scripts.preparing import make
    from scripts.preparing.automatic import find_unprepared, prepare_into_cache
    make.SMALL_BYTES = 2000
    print(prepare_into_cache("web.jsonl", find_unprepared("web.jsonl", print), "byte", print))
"""


HOST = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from parallelism.hosts import Cluster, join
from scripts.training import job
from scripts.training.flags import read_flags

number, port = int(sys.argv.pop(1)), sys.argv.pop(1)
os.environ["XDG_CACHE_HOME"] = "cache"
os.chdir(f"host-{{number}}")
join(Cluster(f"127.0.0.1:{{port}}", 2, number))
prepare, wait, waits = job.prepare_into_cache, job.wait_for_all, Path("../waits")

def prepare_late(*arguments):
    while not waits.exists():
        time.sleep(0.01)
    return prepare(*arguments)

def wait_told(what):
    waits.touch()
    wait(what)
    print(len(list(Path("../host-0").rglob("manifest.json"))))

if number == 0:
    job.prepare_into_cache = prepare_late
else:
    job.wait_for_all = wait_told
print(job.prepare_job(read_flags()).corpus.sha256)
"""


def test_a_host_waits_for_another_that_prepares(tmp_path, cache):
    """Two that share no cache each prepare their own, to the same bits."""
    for number in (0, 1):
        write_jsonl(tmp_path / f"host-{number}/web.jsonl", texts(80))
    (tmp_path / "host.py").write_text(HOST.format(root=str(ROOT)))
    flags = ["--dataset", "web.jsonl", "--tokenizer", "byte", "--strategy", "pmap", *SMALL, *SHORT]
    hosts = [
        subprocess.Popen(
            [sys.executable, "host.py", str(number), str(port), *flags],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=local_environment(os.environ, 1),
        )
        for port in [free_port()]
        for number in (0, 1)
    ]
    said = [host.communicate(timeout=300)[0].splitlines() for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0]
    assert (said[1][0], said[1][-1]) == ("1", said[0][-1])


def test_one_process_prepares_while_others_wait_and_workers_import_no_script(tmp_path, cache):
    write_jsonl(tmp_path / "web.jsonl", texts(400))
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    command = [sys.executable, "script.py"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) for _ in range(2)]
    found = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("prepare   web.jsonl into" in out for out in found) == 1
    assert len({out.splitlines()[-1] for out in found}) == 1
    assert (tmp_path / "imported").read_text() == "xx"
