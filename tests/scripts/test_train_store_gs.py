"""A store on gs://, in an emulator of Google's storage: described, verified, and trained on by two processes."""

import pytest

from data.stores.store import open_store
from parallax.storage import open_folder
from tests.data.small_stores import prepared, texts, write_jsonl
from tests.scripts.runs import SHORT, SMALL, Training, pmap, rows, run_script, single

pytestmark = [pytest.mark.external, pytest.mark.filterwarnings("ignore::ResourceWarning")]


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


def test_two_processes_train_to_the_same_curve_as_from_disk(tmp_path, address):
    flags = [*SMALL, *SHORT, "--steps", "6", "--print-param-hash", "--dataset"]
    Training(tmp_path, "alone", single(), [*flags, "web.store"]).finish()
    Training(tmp_path, "both", pmap(2, 2), [*flags, address]).finish()
    mixed = f"{address}:0.5,web.store:0.5"
    Training(tmp_path, "mixed", single(), [*flags, mixed]).finish()
    for one, two in zip(rows(tmp_path / "alone"), rows(tmp_path / "both"), strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    assert rows(tmp_path / "mixed")[-1]["step"] == 6


def test_it_is_described_verified_and_refused(tmp_path, address, bucket):
    local = run_script("prepare.py", "--describe", "web.store", cwd=tmp_path).stdout.splitlines()
    done = run_script("prepare.py", "--describe", address, cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, local[1:]), done.stderr
    assert run_script("prepare.py", "--verify", address, cwd=tmp_path).returncode == 0
    shard = open_folder(address) / "00000.train.tokens"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    done = run_script("prepare.py", "--verify", address, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "00000.train.tokens must have the sha256" in done.stderr
    shard.unlink()
    for arguments, words in (
        (["--describe", address], "00000.train.tokens cannot be read ("),
        (["--describe", f"{bucket}/nothing"], "must hold a manifest.json and holds none"),
        (["--describe", "gs://no-such-bucket/store"], "error: "),
    ):
        done = run_script("prepare.py", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert words in done.stderr
