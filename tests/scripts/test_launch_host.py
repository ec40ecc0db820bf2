"""The shell that a TPU's hosts run, on the hosts of a fake cloud; `make lint` has shellcheck read it."""

import subprocess

from scripts.launching import gcloud
from scripts.launching.watch import HostCommands
from tests.scripts.cloud import FAST
from tests.scripts.launching.supervision import is_alive, wait_until

RUN = ["run", "--bucket", "bkt", *FAST]
ODD = ["--dataset", "it's $HOME; `ls` *", "--tokenizer", ""]


def test_flags_arrive_as_they_were_given(cloud, launch):
    status, _, err = launch(*RUN, "--", *ODD[:2])
    assert status == 0, err
    assert cloud.starts()[0][:2] == ODD[:2]


def test_a_host_is_prepared_once_for_a_commit_by_hash_and_then_asked_for_its_unit(cloud, launch):
    cloud.play(plays=["exit 3", "exit 0"])
    assert launch(*RUN, "--", "--steps", "1")[0] == 0
    calls = cloud.host_calls()
    installs = [" ".join(call) for call in calls if call[:2] in (["uv", "pip"], ["python3", "-m"])]
    assert installs[0].startswith("python3 -m pip install --quiet --user uv==")
    assert [line.partition(".venv/bin/python ")[2] for line in installs[1:]] == [
        "--require-hashes --requirements requirements-gcs.lock --requirements requirements-plan.lock",
        "--constraints requirements-gcs.lock --constraints requirements-plan.lock jax[tpu]",
    ]
    units = [call for call in calls if call[:2] == ["sudo", "systemd-run"]]
    assert len(units) == 2
    assert all("--unit=parallax" in call for call in units)
    names = [call[0] for call in calls]
    assert names.index("lsof") < names.index("systemd-run")


def test_what_holds_the_chips_is_ended_first(cloud, launch):
    launch("up", *FAST)
    holder = subprocess.Popen(["bash", "-c", "trap '' TERM; while :; do sleep 0.1; done"])
    try:
        (cloud.world / "hosts/0/holder").write_text(str(holder.pid))
        assert launch(*RUN, "--", "--steps", "1")[0] == 0
        kills = [call for call in cloud.host_calls() if call[:2] == ["sudo", "kill"]]
        assert [call[3] for call in kills] == ["TERM", "KILL"]
        assert holder.wait(10) == -9
    finally:
        holder.kill()
        holder.wait()


def test_a_run_that_goes_on_unwatched_is_ended_by_the_next(cloud, launch):
    """As after launch.py itself was killed."""
    cloud.play(plays=["wait", "exit 0"])
    launch("up", *FAST)
    home = cloud.world / "hosts/0"
    commands = HostCommands(f"gs://bkt/commits/{cloud.commit}.tar.gz", cloud.commit)
    archive = subprocess.run(
        ["git", "-C", cloud.checkout, "archive", "--format=tar.gz", "HEAD"], check=True, capture_output=True
    ).stdout
    gcloud.run(gcloud.copy("-", commands.archive), stdin=archive)
    tpu = gcloud.Tpu("parallax-dev-tpu", "us-central1-a")
    gcloud.run(tpu.ssh(commands.prepare()))
    gcloud.run(tpu.ssh(commands.start("gs://bkt/runs/other.logs", ["--steps", "1"])))
    wait_until((home / "training").exists)
    pid = int((home / "unit.pid").read_text())
    assert launch(*RUN, "--", "--steps", "1")[0] == 0
    assert not is_alive(pid)
    assert (cloud.world / "bucket/bkt/runs/other.logs/process-0.log").read_text().endswith("saved\n")
