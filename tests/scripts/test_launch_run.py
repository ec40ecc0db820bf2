"""launch.py run from end to end over a fake gcloud, whose hosts really run the shipped commit's shell and train.py."""

import shlex
import subprocess

import pytest

from scripts.launching import gcloud, tpu, watch
from scripts.launching.watch import HostCommands
from tests.scripts.cloud import FAST
from tests.scripts.launching.supervision import is_alive, wait_until

STEPS = ["--steps", "100", "--dataset", "it's $HOME; `ls` *"]  # flags arrive as they were given
RUN = ["run", "--bucket", "bkt", *FAST]
OUTPUT = ["--output-dir", "gs://bkt/runs/parallax-dev-tpu"]


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """How many seconds each call of hosts may take; none may wait for ever."""
    limits = []

    def noted(argvs, *, seconds=None):
        limits.append(seconds)
        return gcloud.run_all(argvs, seconds=seconds)

    for module in (watch, tpu):
        monkeypatch.setattr(module, "run_all", noted)
    yield limits
    assert None not in limits


@pytest.fixture
def finish(cloud, launch):
    """Plays a scenario with --autodelete: the exit status and the lines of standard error. Nothing may bill then."""

    def finish(*flags, **scenario):
        cloud.play(**scenario)
        status, _, err = launch(*RUN, *flags, "--autodelete", "--", *STEPS)
        assert cloud.bills() == [] or "may still bill" in err[-1]
        return status, err

    return finish


def creations(cloud):
    return sum("create" in call for call in cloud.calls())


def test_a_run_starts_on_all_hosts_and_is_paid_for_no_longer(cloud, finish, limits):
    status, err = finish(hosts=3)
    assert status == 0, err
    assert len(limits) >= 3
    assert err[-2:] == [
        "deleted: TPU parallax-dev-tpu",
        "no TPU parallax-dev-tpu is left, and none bills; gs://bkt does, for what it stores",
    ]
    assert [cloud.starts(worker) for worker in range(3)] == [[[*STEPS, *OUTPUT]]] * 3
    assert all("--worker=all" in call for call in cloud.calls() if "ssh" in call)
    logs = {path.rpartition("/")[2] for path in cloud.objects() if ".logs/" in path}
    assert logs == {f"process-{worker}.log" for worker in range(3)}
    assert f"bkt/commits/{cloud.commit}.tar.gz" in cloud.objects()
    assert "[0] plays exit 0" in err


def test_without_autodelete_it_says_what_still_bills(cloud, launch):
    status, _, err = launch(*RUN, "--project", "p", "--", *STEPS)
    assert status == 0
    assert cloud.bills() == ["node.json"]
    down = "python scripts/launch.py down --name parallax-dev-tpu --zone us-central1-a --project p"
    assert err[-1] == f"parallax-dev-tpu is READY and still bills; to delete it: {down}"
    assert launch("status")[0] == 0
    assert launch(*shlex.split(down)[2:], *FAST)[0] == 0
    assert cloud.bills() == []


@pytest.mark.parametrize(
    ("loss", "queued"), [("preempt", True), ("halt", False), ("vanish", False), ("vanish", True), ("cut off", False)]
)
def test_a_lost_tpu_is_deleted_made_again_and_the_run_goes_on(loss, queued, cloud, finish):
    flags = ["--queued", "--spot"] if queued else ["--spot"]
    hosts = 1 if loss == "vanish" else 2
    status, err = finish(*flags, hosts=hosts, plays=[["wait"] * (hosts - 1) + [loss], "exit 0"])
    assert status == 0, err
    assert "restart 1 of 20" in err
    for worker in range(hosts):
        assert cloud.starts(worker) == [[*STEPS, *OUTPUT], [*STEPS, *OUTPUT, "--resume"]]
    assert creations(cloud) == 2
    assert all("--spot" in call for call in cloud.calls() if "create" in call)
    verbs = [call[3] for call in cloud.calls() if call[:2] == ["compute", "tpus"]]
    second = len(verbs) - 1 - verbs[::-1].index("create")
    if queued or loss != "vanish":
        assert "delete" in verbs[:second]


def test_slices_start_and_end_as_one(cloud, finish):
    """Two of two hosts each, of which one host of the second dies, and then that slice is taken away."""
    plays = [["wait", "wait", "wait", "kill"], ["wait", "wait", "vanish", "wait"], "exit 0"]
    status, err = finish("--slices", "2", "--accelerator", "v5litepod-16", "--spot", hosts=2, plays=plays)
    assert status == 0, err
    assert "worker 3 was killed by SIGKILL; ending the other 3" in err
    assert "TPU parallax-dev-tpu is INCOMPLETE: it was preempted, or deleted" in err
    first, *others = [[*STEPS, *OUTPUT], *[[*STEPS, *OUTPUT, "--resume"]] * 2]
    assert [cloud.starts(worker) for worker in range(4)] == [[first, *others]] * 4
    created = [call for call in cloud.calls() if "create" in call]
    assert len(created) == 2
    assert all({"--node-count=2", "--node-prefix=parallax-dev-tpu", "--spot"} <= set(call) for call in created)
    assert not any("--node-id" in word for call in created for word in call)
    logs = {path.rpartition("/")[2] for path in cloud.objects() if "/attempt-3/" in path}
    assert logs == {f"process-{worker}.log" for worker in range(4)}


def test_a_tpu_under_repair_is_waited_for_and_not_given_away(cloud, finish):
    status, err = finish("--spot", hosts=2, plays=[["wait", "repair"], "exit 0"])
    assert status == 0, err
    assert "TPU parallax-dev-tpu is REPAIRING: its hosts are down, and will be back" in err
    assert "parallax-dev-tpu is REPAIRING" in err
    assert cloud.starts(0) == [[*STEPS, *OUTPUT], [*STEPS, *OUTPUT, "--resume"]]
    assert creations(cloud) == 1


@pytest.mark.parametrize(
    ("death", "what"),
    [("kill", "was killed by SIGKILL"), ("exit 3", "exited with status 3"), ("crash", "ended without a word")],
)
def test_a_dead_worker_is_started_again_with_the_others_on_the_same_tpu(death, what, cloud, finish):
    status, err = finish(hosts=2, plays=[["wait", death], "exit 0"])
    assert status == 0, err
    assert f"worker 1 {what}; ending the other 1" in err
    assert f"[1] plays {death}" in err
    assert [len(cloud.starts(worker)) for worker in (0, 1)] == [2, 2]
    assert cloud.starts(0)[1][-1] == "--resume"
    assert creations(cloud) == 1


@pytest.mark.parametrize("status", [1, 77])
def test_what_would_fail_again_is_not_started_again(status, cloud, finish):
    found, err = finish(hosts=2, plays=[f"exit {status}"])
    assert found == status
    assert len(cloud.starts()) == 1
    assert any(line.endswith(f"exited with status {status}") or "ending the other" in line for line in err)


def test_restarts_are_used_up(cloud, finish):
    status, err = finish("--restarts", "1", plays=["kill", "exit 3"])
    assert status == 3
    assert "no restart is left of 1" in err
    assert len(cloud.starts()) == 2


def test_a_checkpoint_makes_the_restarts_whole(cloud, finish):
    status, err = finish("--restarts", "1", plays=["save 5", "save 9", "exit 3", "exit 0"])
    assert status == 3
    assert len(cloud.starts()) == 3
    assert err.count("restart 1 of 1") == 2


def test_a_worker_that_crashes_in_one_step_again_and_again_ends_the_run(cloud, finish):
    status, err = finish(plays=["kill"] * 9)
    assert status == 137
    assert "not started again after 3 crashes in the same place, before the first step" in err
    assert len(cloud.starts()) == 3


def test_a_host_that_goes_down_and_lets_train_save_has_not_finished(cloud, finish):
    """Its SIGTERM makes train.py exit with 0, long before its last step."""
    (cloud.checkout / "scripts" / "train.py").write_text(
        "import os, pathlib, sys, time\n"
        "first = pathlib.Path(os.environ['FAKE_GCLOUD'], 'first')\n"
        "if not first.exists():\n"
        "    first.touch()\n"
        "    os.kill(os.getppid(), 15)\n"  # to systemd's unit, which passes it on when train.py has ended
        "    time.sleep(0.1)\n"
    )
    cloud.git("-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-aqm", "Stop")
    status, err = finish()
    assert status == 0, err
    assert "worker 0 was stopped by its host" in err
    assert "restart 1 of 20" in err


def test_hosts_that_are_slow_to_answer_are_called_again(finish):
    status, err = finish(refused={"ssh": 2, "describe": 2})
    assert status == 0, err
    assert sum(line.endswith("; trying again") for line in err) == 2


def test_hosts_that_never_answer_end_the_run(cloud, finish):
    assert finish(refused={"ssh": 999})[0] == 1
    assert cloud.starts() == []
    assert creations(cloud) == 1


def test_looks_that_fail_for_a_while_end_nothing(cloud, finish):
    status, err = finish(plays=["blink 4"])
    assert status == 0, err
    assert sum("Connection reset" in line for line in err) == 4
    assert len(cloud.starts()) == 1


def test_looks_that_fail_on_and_on_end_the_attempt(cloud, finish):
    status, err = finish(plays=["blink 7", "exit 0"])
    assert status == 0, err
    assert "TPU parallax-dev-tpu or a host of it cannot be reached any more" in err
    assert creations(cloud) == 2


def test_its_time_is_up_before_there_is_a_tpu(finish):
    status, err = finish("--max-hours", "0.0003", create=["slow"])
    assert status == 3, err
    assert "0.0003 hours are over, before train.py was started" in err


def test_capacity_that_comes_late(finish):
    status, err = finish(create=["capacity", "leftover", "ok"])
    assert status == 0, err
    assert sum("no more capacity" in line for line in err) == 2


def test_a_creation_that_is_not_allowed_ends_the_run(finish):
    status, err = finish(create=["denied"])
    assert status == 1
    assert any("PERMISSION_DENIED" in line for line in err)


def test_a_deletion_that_fails_is_tried_again(cloud, finish):
    assert finish(refused={"delete": 3})[0] == 0
    assert cloud.bills() == []


def test_a_deletion_that_never_works_is_a_failure_and_said(finish):
    status, err = finish(refused={"delete": 999})
    assert status == 1
    assert "may still bill; to delete it: python scripts/launch.py down --name" in err[-1]


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
    gcloud.run(tpu.ssh(commands.start("gs://bkt/runs/other.logs", 0, ["--steps", "1"])))
    wait_until((home / "training").exists)
    pid = int((home / "unit.pid").read_text())
    assert launch(*RUN, "--", "--steps", "1")[0] == 0
    assert not is_alive(pid)
    assert (cloud.world / "bucket/bkt/runs/other.logs/process-0.log").read_text().endswith("saved\n")
