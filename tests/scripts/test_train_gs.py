"""Runs in a folder on gs://, in an emulator of Google's storage: real processes, killed, resumed, read back.

The emulator (tests/google_storage.py) is not Google: what these tests show, they show of our calls alone.
"""

import json
import os
import random
import socket
import urllib.request

import jax
import numpy as np
import pytest

from parallax.run_folder import load_run
from parallax.storage import open_folder
from scripts import generate, train
from scripts.training import lease
from scripts.training.output_dir import Workspace
from tests.claims.kill_and_resume import write_text
from tests.google_storage import BUCKET
from tests.scripts.runs import Training, checkpoints, pmap, rows, single

pytestmark = [
    pytest.mark.external,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # gcsfs says so of large uploads
]
FLAGS = [
    *("--dataset", "text.txt", "--config", "tiny", "--model.num-layers", "1", "--steps", "40"),
    *("--batch-size", "8", "--seq-len", "32", "--log-interval", "1", "--eval-interval", "20"),
    *("--checkpoint-interval", "10", "--keep", "3", "--seed", "5", "--print-param-hash"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to work in, with a text to learn."""
    folder = tmp_path_factory.mktemp("gs")
    write_text(folder, random.Random(0))
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """The local run that was left alone, and its last line, the hash of its parameters."""
    return folder / "whole", Training(folder, "whole", single(), FLAGS).finish()


def manifests(run):
    """From each step that has a folder to whether it has a manifest."""
    return {step: (run / "checkpoints" / str(step) / "manifest.json").exists() for step in checkpoints(run)}


def saving(run, step):
    return lambda: any(number >= step and not trusted for number, trusted in manifests(run).items())


def trusted(run, step):
    return lambda: any(number >= step and trusted for number, trusted in manifests(run).items())


def flip_a_byte(run, step):
    file = run / "checkpoints" / str(step) / "state" / "_METADATA"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_kills_and_a_flipped_byte_cost_a_run_nothing(folder, whole, bucket, call, monkeypatch):
    """Nor does the lease that a killed process leaves: on the same machine it is over."""
    home = open_folder(f"{bucket}/runs")
    run = home / "killed"

    def start(*flags):
        return Training(folder, "killed", single(), [*FLAGS, *flags], disk=home)

    for condition in (saving(run, 10), trusted(run, 20)):
        training = start("--resume")
        assert training.wait_for(condition), training.words()
        training.kill()
        assert json.loads((run / "config.json").read_text())["train"]["steps"] == 40
        assert (run / "lease.json").exists()
    before = [step for step, is_trusted in manifests(run).items() if is_trusted]
    flip_a_byte(run, before[-1])
    last = start("--resume")
    assert last.end(40) == 0, last.words()
    assert last.finish() == whole[1]
    assert not (run / "lease.json").exists()
    assert f"checkpoint {before[-1]} is damaged: state/_METADATA" in last.err.read_text()
    assert f"from step {before[-2]} of {run}" in last.err.read_text()
    assert rows(run) == rows(whole[0])

    summary = json.loads((run / "summary.json").read_text())
    assert (summary["finished"], summary["step"]) == (True, 40)
    assert [attempt["end"] for attempt in summary["attempts"]] == ["killed", "killed", "finished"]
    names = {path.name for path in run.iterdir()}
    assert names >= {"checkpoints", "config.json", "tokenizer.json", "metrics.jsonl", "loss.png", "summary.json"}
    assert sum("tfevents" in name for name in names) >= 2
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    asked = "--prompt", "king", "--max-tokens", "40"
    on_disk, on_gs = (call(generate, "--checkpoint", place, *asked) for place in (whole[0], run))
    assert on_disk[0] == 0, on_disk[2]
    assert on_gs[:2] == on_disk[:2]

    monkeypatch.chdir(folder)  # where the text is
    status, _, err = call(train, *FLAGS, "--output-dir", run)
    assert (status, err) == (2, f"error: --output-dir {run} exists already; add --resume, or choose another\n")


def test_two_processes_write_one_run(folder, whole, bucket):
    home = open_folder(f"{bucket}/runs")
    Training(folder, "pair", pmap(2, processes=2), FLAGS, disk=home).finish()
    run, alone = home / "pair", whole[0]
    assert manifests(run) == manifests(alone)
    for row, expected in zip(rows(run), rows(alone), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)  # two devices add the gradients in another order
    pair, single_run = load_run(str(run)), load_run(alone)
    assert pair.step == single_run.step
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), pair.params, single_run.params)


def test_a_run_is_written_by_one_process_at_a_time(bucket, train_small, monkeypatch):
    for name, seconds in {"BEAT": 0.1, "SETTLE": 0.1, "LOOK": 0.1}.items():
        monkeypatch.setattr(lease, name, seconds)
    run = open_folder(f"{bucket}/one")
    first = Workspace(run)
    first.fetch()
    status, _, err = train_small("--output-dir", str(run), "--resume")
    whom = f"another process, {os.getpid()} on {socket.gethostname()}"
    assert status == 2
    assert err.splitlines()[-1] == (
        f"error: --output-dir {run} is being written by {whom}; stop that one, or choose another"
    )
    first.release()
    assert not run.exists()


def test_a_bucket_that_is_not_there_is_refused_and_not_made(train_small, bucket):
    status, _, err = train_small("--output-dir", "gs://no-such-bucket/run")
    assert status == 2
    assert err.splitlines()[-1] == (
        "error: --output-dir gs://no-such-bucket/run cannot be written: there is no such bucket; choose another"
    )
    with urllib.request.urlopen(f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b?project=test") as answer:
        assert [entry["name"] for entry in json.load(answer)["items"]] == [BUCKET]


def test_a_folder_of_something_else_is_refused(train_small, bucket):
    (open_folder(bucket) / "notes" / "a.txt").write_text("x")
    status, _, err = train_small("--output-dir", f"{bucket}/notes", "--resume")
    line = f"error: --output-dir {bucket}/notes holds files but no config.json of a run; choose another\n"
    assert (status, err) == (2, line)
