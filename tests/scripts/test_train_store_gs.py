"""A store on gs://, in an emulator of Google's storage: described, verified, and trained on by two processes."""

import gzip
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.stores.store import open_store, verify
from parallax.storage import bucket_files, open_folder
from scripts import prepare
from tests.data.small_stores import prepared, texts, write_jsonl
from tests.scripts.runs import ROOT, SHORT, SMALL, Training, pmap, rows, single

pytestmark = [pytest.mark.external, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def address(tmp_path, bucket):
    """The address of a copy of `web.store`."""
    store = prepared(
        tmp_path / "web.store", write_jsonl(tmp_path / "a.jsonl", texts(80)), held_out=0.2, shard_tokens=900
    )
    for path in (tmp_path / "web.store").iterdir():
        (open_folder(bucket) / "web.store" / path.name).write_bytes(path.read_bytes())
    assert open_store(f"{bucket}/web.store").sha256 == store.sha256
    return f"{bucket}/web.store"


def test_two_processes_train_to_the_same_curve_as_from_disk(tmp_path, address, monkeypatch):
    """A mixture in two stages, of a store on gs:// and of one on disk."""
    prepared(tmp_path / "code.store", write_jsonl(tmp_path / "b.jsonl", texts(50, 1)), held_out=0.2)
    for name, web in (("alone", "web.store"), ("both", address)):
        stages = [{"until_step": 3, "weights": {web: 1}}, {"weights": {web: 0.25, "code.store": 0.75}}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"stages": stages}))
    flags = [*SMALL, *SHORT, "--steps", "6", "--print-param-hash", "--dataset"]
    Training(tmp_path, "alone", single(), [*flags, "alone.json"]).finish()
    Training(tmp_path, "both", pmap(2, 2), [*flags, "both.json"]).finish()
    for one, two in zip(rows(tmp_path / "alone"), rows(tmp_path / "both"), strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    # What was read is kept, and read without the bucket, which was not asked for more than that.
    store = open_store(address)
    tokens = store.train.read(0, len(store.train))
    for path in open_folder(address).iterdir():
        if path.name.endswith(".tokens"):
            path.unlink()
    np.testing.assert_array_equal(open_store(address).train.read(0, len(tokens)), tokens)
    monkeypatch.setenv("PARALLAX_STORE_CACHE_GIB", "1e-6")
    with pytest.raises(ValueError, match="cannot be read"):
        open_store(address).train.read(0, len(tokens))


def test_a_store_is_made_from_gs_and_on_gs(tmp_path, bucket, call):
    """The same bytes as locally, also when it is killed between two shards; what is not there is refused."""
    (tmp_path / "web").mkdir()
    write_jsonl(tmp_path / "web/a.jsonl", texts(60))
    (tmp_path / "web/b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "b", texts(30, 1)).read_bytes()))
    rows = [{"text": text} for text in texts(20, 2)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for path in [*(tmp_path / "web").iterdir(), tmp_path / "c.parquet"]:
        (open_folder(bucket) / "made" / path.relative_to(tmp_path)).write_bytes(path.read_bytes())
    settings = ["--tokenizer", "byte", "--shard-tokens", "1500", "--workers", "1", "--deduplicate"]
    status, _, err = call(prepare, "web", "c.parquet", *settings, "--output", "local.store")
    assert status == 0, err
    expected = open_store(tmp_path / "local.store")
    sources, target = [f"{bucket}/made/web", f"{bucket}/made/c.par*"], f"{bucket}/made/remote.store"
    with pytest.raises(FileExistsError):  # so one process alone can begin a store
        bucket_files().put_file(str(tmp_path / "c.parquet"), f"{bucket}/made/c.parquet", mode="create")
    assert killed_at(3, tmp_path, *sources, *settings, "--output", target) == -signal.SIGKILL
    with pytest.raises(ValueError, match="is not finished; give the prepare"):
        open_store(target)
    status, _, err = call(prepare, *sources, *settings, "--output", target)
    assert status == 0, err
    assert "going on" in err
    store = open_store(target)
    assert (store.content_sha256, len(store.manifest["shards"]) > 4) == (expected.content_sha256, True)
    assert [each["sha256"] for each in store.manifest["sources"]] == [
        each["sha256"] for each in expected.manifest["sources"]
    ]
    assert store.manifest["sources"][0]["path"] == f"{bucket}/made/web/a.jsonl"
    assert not (open_folder(target) / "journal.jsonl").exists()
    verify(store)
    assert call(prepare, *sources, *settings, "--output", target)[2].startswith("finished ")
    for arguments, words in (
        ([f"{bucket}/nothing.jsonl", "--output", "new"], "and none is there"),
        ([f"{bucket}/made/*.jsonl", "--output", "new"], "and none is there"),
        (["web", "--output", f"{bucket}/made"], "exists and is no store"),
        (["web", "--output", "gs://no-such-bucket/store"], "cannot be"),
    ):
        refused(call, [*arguments, *settings], words)


KILLED = """
import os, signal, sys
from pathlib import Path
from data.preparing.output import Output
from scripts import prepare
add = Output.add_shard
def dying(self, number, value):
    if str(number) == os.environ.get("DIES"):
        self._send(*sorted(path.name for path in Path(self.path).glob("*.tokens")))
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, number, value)
Output.add_shard = dying
sys.exit(prepare.main())
"""


def killed_at(shard, folder, *arguments):
    """The exit status of prepare.py, which is killed when that shard is half sent."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DIES": str(shard)}
    return subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=folder, env=environment).returncode


def test_it_is_described_verified_and_refused(tmp_path, address, bucket, monkeypatch, call):
    monkeypatch.setenv("PARALLAX_STORE_CACHE_GIB", "0")
    _, local, _ = call(prepare, "--describe", "web.store")
    status, out, err = call(prepare, "--describe", address)
    assert (status, out.splitlines()[1:]) == (0, local.splitlines()[1:]), err
    assert call(prepare, "--verify", address)[0] == 0
    shard = open_folder(address) / "00000.train.tokens"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    refused(call, ["--verify", address], "00000.train.tokens must have the sha256")
    shard.unlink()
    for arguments, words in (
        (["--describe", address], "00000.train.tokens cannot be read ("),
        (["--describe", f"{bucket}/nothing"], "must hold a manifest.json and holds none"),
        (["--describe", "gs://no-such-bucket/store"], "error: "),
    ):
        refused(call, arguments, words)


def refused(call, arguments, words):
    status, _, err = call(prepare, *arguments)
    assert (status, err.count("\n")) == (2, 1), err
    assert words in err
