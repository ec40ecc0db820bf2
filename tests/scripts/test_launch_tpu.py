"""launch.py up, status, logs and down over a fake gcloud, and what --dry-run shows of them and of run."""

import re
import shlex

import pytest

from scripts import launch as launch_script
from tests.scripts.cases import read_cases
from tests.scripts.cloud import FAST

QUEUE = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


def test_up_then_status_then_down(cloud, launch):
    cloud.play(hosts=4)
    status, _, err = launch("up", "--accelerator", "v3-32", *FAST)
    assert status == 0
    assert "parallax-dev-tpu is READY: v3-32, 4 host(s)" in err
    assert err[-1].startswith("it bills until it is deleted: python scripts/launch.py down --name ")
    status, out, _ = launch("status")
    assert status == 0
    assert out[0] == "parallax-dev-tpu is READY: v3-32, 4 host(s) HEALTHY"
    assert "it bills until it is deleted" in out[-1]
    assert launch("down", *FAST)[2] == ["deleted: TPU parallax-dev-tpu", "parallax-dev-tpu does not bill any more"]
    assert cloud.bills() == []
    assert launch("status")[1] == ["there is no TPU parallax-dev-tpu in us-central1-a, and none of that name bills"]
    assert launch("down", *FAST)[2][0] == "there was no TPU parallax-dev-tpu to delete"


def test_up_waits_in_the_queue_and_down_deletes_both(cloud, launch):
    cloud.play(queue=QUEUE)
    status, _, err = launch("up", "--queued", "--spot", *FAST)
    assert status == 0
    assert [line for line in err if line.startswith("queued")] == [
        "queued resource parallax-dev-tpu is WAITING_FOR_RESOURCES",
        "queued resource parallax-dev-tpu is PROVISIONING",
    ]
    assert cloud.bills() == ["node.json", "queued.json"]
    assert launch("down", *FAST)[2][0] == "deleted: queued resource parallax-dev-tpu"
    assert cloud.bills() == []


def test_slices_are_asked_for_looked_at_and_deleted_together(cloud, launch):
    cloud.play(queue=QUEUE, hosts=2)
    slices = ["--slices", "2", "--accelerator", "v5litepod-16"]
    status, _, err = launch("up", *slices, *FAST)
    assert status == 0
    assert "parallax-dev-tpu is READY: 2 × v5litepod-16, 4 host(s)" in err
    assert cloud.bills() == ["node-0.json", "node-1.json", "queued.json"]
    assert launch("status", *slices)[1][1] == "parallax-dev-tpu is READY: 2 × v5litepod-16, 4 host(s) HEALTHY"
    (cloud.world / "node-1.json").unlink()
    assert launch("status", *slices)[1][1] == "parallax-dev-tpu is INCOMPLETE: 2 × v5litepod-16, 2 host(s) HEALTHY"
    down = err[-1].partition("launch.py ")[2]
    assert launch(*shlex.split(down), *FAST)[2][0] == "deleted: queued resource parallax-dev-tpu"
    assert cloud.bills() == []


def test_a_queued_resource_that_comes_to_nothing_is_deleted_before_the_next(cloud, launch):
    cloud.play(queue=["WAITING_FOR_RESOURCES", "FAILED", "FAILED", "FAILED", "ACTIVE"])
    status, _, err = launch("up", "--queued", *FAST)
    assert status == 0
    assert "the queued resource came to nothing; trying again in 0 s" in err


def test_up_takes_what_is_there(cloud, launch):
    assert launch("up", *FAST)[0] == launch("up", *FAST)[0] == 0
    assert sum("create" in call for call in cloud.calls()) == 1
    status, _, err = launch("up", "--accelerator", "v3-32", *FAST)
    assert status == 2
    assert err == [
        "error: --accelerator v3-32 is not v3-8, which TPU parallax-dev-tpu is; give --accelerator v3-8, or another "
        "--name"
    ]


def test_status_says_what_the_hosts_do(cloud, launch):
    cloud.play(hosts=2, plays=["exit 0"])
    launch("run", "--bucket", "bkt", *FAST, "--", "--steps", "1")
    _, out, _ = launch("status")
    assert [line for line in out if line.startswith("parallax ")] == ["parallax 0 exited 0", "parallax 1 exited 0"]


def test_logs_are_those_of_the_newest_attempt(cloud, launch):
    cloud.play(hosts=2, plays=["exit 3", "exit 0"])
    launch("run", "--bucket", "bkt", *FAST, "--autodelete", "--", "--steps", "1")
    for worker in ("0", "1"):
        status, out, _ = launch("logs", "--bucket", "bkt", "--worker", worker)
        assert (status, out[0]) == (0, f"attempt 2 of worker {worker}")
    status, _, err = launch("logs", "--bucket", "bkt", "--worker", "7")
    assert status == 2
    assert "has no log of worker 7 yet" in err[0]


@pytest.mark.parametrize(
    "kind",
    [[], ["--slices", "2", "--accelerator", "v5litepod-8"], ["--queued", "--spot", "--external-ips", "--project", "p"]],
)
def test_a_dry_run_shows_what_runs_and_runs_nothing(kind, cloud, launch):
    kind = [*kind, "--network", "my net", "--service-account", "a@b"]
    run = ["run", "--bucket", "bkt", "--autodelete", *kind]
    train = ["--", "--steps", "7", "--dataset", "it's $HOME"]
    shown = [launch(*words)[1] for words in (["up", "--dry-run", *kind], [*run, "--dry-run", *train])]
    shown.append(launch("down", "--dry-run", *kind)[1])
    assert cloud.calls() == []
    assert cloud.starts() == []
    for lines in shown:
        assert len(lines) > 1
        assert all(shlex.split(line)[0] in ("gcloud", "git") for line in lines)
    assert launch(*run, *FAST, *train)[0] == 0
    called = {masked(shlex.join(["gcloud", *call])) for call in cloud.calls()}
    planned = {masked(line.partition(" | ")[2] if line.startswith("git ") else line) for line in shown[1]}
    # The node of a queued resource goes with it, so nothing is left to delete.
    assert called <= planned
    assert {line for line in planned - called if " tpu-vm delete " not in line and "delete" not in line} == set()
    assert {masked(line) for lines in (shown[0], shown[2]) for line in lines} <= planned


def masked(line):
    """Without the time in the name of a log folder."""
    return re.sub(r"\d{8}T\d{6}Z", "TIME", line)


BAD = """
up --name My_TPU | --name My_TPU | try parallax-dev-tpu
up --accelerator v3-many | --accelerator v3-many | try v3-8
up --slices 0 | --slices 0 | try --slices 2
up --reservation mine | --reservation mine | add --queued
up --retry-seconds -1 | --retry-seconds -1 | try --retry-seconds 30
logs --bucket gs://b | --bucket gs://b | leave gs:// out
logs | --bucket is missing | --bucket my-bucket
run -- --steps 1 | --bucket is missing | --bucket my-bucket
run --bucket bbb | -- is missing | try launch.py run
run --bucket bbb -- --stepz 1 | --stepz | --help
run --bucket bbb -- --steps 0 | steps=0
run --bucket bbb -- --output-dir x | --output-dir | give --run-name
run --bucket bbb -- --process-id 1 | --process-id | leave it out
run --bucket bbb --max-hours 0 -- | max_hours=0 | try --max-hours 6
run --bucket bbb --restarts -1 -- | restarts=-1 | try --restarts 20
run --bucket bbb --run-name a/b -- | --run-name a/b | --run-name first
status --hosts 2 | --hosts | --help
"""


@pytest.mark.parametrize(("args", "words"), read_cases(BAD))
def test_bad_input_is_one_line_and_calls_nothing(args, words, cloud, refuses):
    refuses(launch_script, args, *words)
    assert cloud.calls() == []


def test_changes_that_would_not_be_shipped_are_refused(cloud, launch):
    (cloud.checkout / "new.py").touch()
    run = ["run", "--bucket", "bbb", "--dry-run"]
    status, _, err = launch(*run, "--", "--steps", "1")
    assert status == 2
    assert err == [
        "error: 1 file(s) of the checkout are not committed and would not be shipped; commit them, or add "
        "--allow-dirty to run the last commit"
    ]
    status, out, _ = launch(*run, "--allow-dirty", "--", "--steps", "1")
    assert status == 0
    assert cloud.commit in out[0]


def test_another_tpu_of_that_name_is_neither_used_nor_deleted(cloud, launch):
    launch("up", "--accelerator", "v3-32", *FAST)
    status, _, err = launch("run", "--bucket", "bbb", *FAST, "--autodelete", "--", "--steps", "1")
    assert status == 2
    assert "--accelerator v3-8 is not v3-32" in err[-1]
    assert cloud.bills() == ["node.json"]


def test_no_gcloud(cloud, launch, monkeypatch):
    monkeypatch.setenv("PATH", str(cloud.world))
    status, _, err = launch("up")
    assert status == 2
    assert err == [
        "error: gcloud is not on PATH; install the Google Cloud CLI, https://cloud.google.com/sdk/docs/install"
    ]


@pytest.mark.parametrize("command", ["up", "run", "status", "logs", "down"])
def test_help_tells_the_flags(command, launch):
    status, out, _ = launch(command, "--help")
    assert status == 0
    for word in (
        f"launch.py {command}",
        *["--name", "--zone", "--accelerator", "--queued", "--spot", "--bucket", "--project"],
    ):
        assert word in "\n".join(out)
