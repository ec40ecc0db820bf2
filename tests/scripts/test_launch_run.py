"""launch.py run from end to end over a fake gcloud, whose hosts really run the shipped commit's shell and train.py."""

import shlex

import pytest

from tests.scripts.cloud import FAST

STEPS = ["--steps", "100", "--model.head-dim", "8"]
RUN = ["run", "--bucket", "bkt", *FAST]
OUTPUT = ["--output-dir", "gs://bkt/runs/parallax-dev-tpu"]


def is_ssh(call):
    return "ssh" in call


def words(lines):
    return "\n".join(lines)


def test_a_run_starts_on_all_hosts_and_is_paid_for_no_longer(cloud, launch):
    cloud.play(hosts=3)
    status, _, err = launch(*RUN, "--autodelete", "--", *STEPS)
    assert status == 0, words(err)
    assert cloud.bills() == []
    assert err[-2:] == [
        "deleted: TPU parallax-dev-tpu",
        "no TPU parallax-dev-tpu is left, and none bills; gs://bkt does, for what it stores",
    ]
    assert [cloud.starts(worker) for worker in range(3)] == [[[*STEPS, *OUTPUT]]] * 3
    assert all("--worker=all" in call for call in cloud.calls() if is_ssh(call))
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
    assert launch(*shlex.split(down)[2:], *FAST)[0] == 0
    assert cloud.bills() == []


@pytest.mark.parametrize("loss", ["preempt", "halt", "vanish", "cut off"])
@pytest.mark.parametrize("queued", [False, True])
def test_a_lost_tpu_is_deleted_made_again_and_the_run_goes_on(loss, queued, cloud, launch):
    cloud.play(hosts=2, plays=[["wait", loss], "exit 0"])
    kind = ["--queued"] if queued else []
    status, _, err = launch(*RUN, *kind, "--spot", "--autodelete", "--", *STEPS)
    assert status == 0, words(err)
    assert "restart 1 of 20" in err
    for worker in (0, 1):
        assert cloud.starts(worker) == [[*STEPS, *OUTPUT], [*STEPS, *OUTPUT, "--resume"]]
    made = [call for call in cloud.calls() if "create" in call]
    assert len(made) == 2
    assert all("--spot" in call for call in made)
    verbs = [call[3] for call in cloud.calls() if call[:2] == ["compute", "tpus"]]
    second = len(verbs) - 1 - verbs[::-1].index("create")
    if queued or loss != "vanish":
        assert "delete" in verbs[:second]
    assert cloud.bills() == []


@pytest.mark.parametrize(
    ("death", "what"),
    [
        ("kill", "was killed by SIGKILL"),
        ("exit 3", "exited with status 3"),
        ("exit 4", "exited with status 4"),
        ("crash", "ended without a word"),
    ],
)
def test_a_dead_worker_is_started_again_with_the_others_on_the_same_tpu(death, what, cloud, launch):
    cloud.play(hosts=2, plays=[["wait", death], "exit 0"])
    status, _, err = launch(*RUN, "--autodelete", "--", *STEPS)
    assert status == 0, words(err)
    assert f"worker 1 {what}; ending the other 1" in err
    assert f"[1] plays {death}" in err
    assert [len(cloud.starts(worker)) for worker in (0, 1)] == [2, 2]
    assert cloud.starts(0)[1][-1] == "--resume"
    assert sum("create" in call for call in cloud.calls()) == 1
    assert cloud.bills() == []


@pytest.mark.parametrize("status", [1, 2, 77])
def test_what_would_fail_again_is_not_started_again(status, cloud, launch):
    cloud.play(hosts=2, plays=[f"exit {status}"])
    found, _, err = launch(*RUN, "--autodelete", "--", *STEPS)
    assert found == status
    assert len(cloud.starts()) == 1
    assert cloud.bills() == []
    assert any(line.endswith(f"exited with status {status}") for line in err) or "ending the other" in words(
        err
    )


def test_restarts_are_used_up(cloud, launch):
    cloud.play(plays=["exit 3", "kill", "exit 3"])
    status, _, err = launch(*RUN, "--autodelete", "--restarts", "2", "--", *STEPS)
    assert status == 3
    assert "no restart is left of 2" in err
    assert len(cloud.starts()) == 3
    assert cloud.bills() == []


def test_a_host_that_goes_down_and_lets_train_save_has_not_finished(cloud, launch):
    """Its SIGTERM makes train.py exit with 0, long before its last step."""
    cloud.play(plays=["exit 0"])
    (cloud.checkout / "scripts" / "train.py").write_text(
        "import os, pathlib, sys, time\n"
        "first = pathlib.Path(os.environ['FAKE_GCLOUD'], 'first')\n"
        "if not first.exists():\n"
        "    first.touch()\n"
        "    os.kill(os.getppid(), 15)\n"  # to systemd's unit, which passes it on when train.py has ended
        "    time.sleep(0.1)\n"
    )
    cloud.git("-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-aqm", "Stop")
    status, _, err = launch(*RUN, "--autodelete", "--", *STEPS)
    assert status == 0, words(err)
    assert "worker 0 was stopped by its host" in err
    assert "restart 1 of 20" in err


def test_hosts_that_are_slow_to_answer_are_called_again(cloud, launch):
    cloud.play(refused={"ssh": 2, "describe": 2})
    status, _, err = launch(*RUN, "--autodelete", "--", *STEPS)
    assert status == 0, words(err)
    assert sum(line.endswith("; trying again") for line in err) == 2


def test_hosts_that_never_answer_end_the_run(cloud, launch):
    cloud.play(refused={"ssh": 999})
    status, _, _ = launch(*RUN, "--autodelete", "--", *STEPS)
    assert status == 1
    assert cloud.starts() == []
    assert sum("create" in call for call in cloud.calls()) == 1
    assert cloud.bills() == []


def test_looks_that_fail_for_a_while_end_nothing(cloud, launch):
    cloud.play(plays=["blink 4"])
    status, _, err = launch(*RUN, "--autodelete", "--", *STEPS)
    assert status == 0, words(err)
    assert sum("Connection reset" in line for line in err) == 4
    assert len(cloud.starts()) == 1


def test_looks_that_fail_on_and_on_end_the_attempt(cloud, launch):
    cloud.play(plays=["blink 7", "exit 0"])
    status, _, err = launch(*RUN, "--autodelete", "--", *STEPS)
    assert status == 0, words(err)
    assert "TPU parallax-dev-tpu or a host of it cannot be reached any more" in err
    assert sum("create" in call for call in cloud.calls()) == 2
    assert cloud.bills() == []


def test_its_time_is_up_before_there_is_a_tpu(cloud, launch):
    cloud.play(create=["slow"])
    status, _, err = launch(*RUN, "--autodelete", "--max-hours", "0.0003", "--", *STEPS)
    assert status == 3, words(err)
    assert "0.0003 hours are over, before train.py was started" in err
    assert cloud.bills() == []


def test_capacity_that_comes_late(cloud, launch):
    cloud.play(create=["capacity", "leftover", "ok"])
    status, _, err = launch(*RUN, "--autodelete", "--", *STEPS)
    assert status == 0, words(err)
    assert sum("no more capacity" in line for line in err) == 2
    assert cloud.bills() == []


def test_a_creation_that_is_not_allowed_ends_the_run(cloud, launch):
    cloud.play(create=["denied"])
    status, _, err = launch(*RUN, "--autodelete", "--", *STEPS)
    assert status == 1
    assert any("PERMISSION_DENIED" in line for line in err)
    assert cloud.bills() == []


def test_a_deletion_that_fails_is_tried_again(cloud, launch):
    cloud.play(refused={"delete": 3})
    status, _, err = launch(*RUN, "--autodelete", "--", *STEPS)
    assert status == 0, words(err)
    assert cloud.bills() == []


def test_a_deletion_that_never_works_is_a_failure_and_said(cloud, launch):
    cloud.play(refused={"delete": 999})
    status, _, err = launch(*RUN, "--autodelete", "--", *STEPS)
    assert status == 1
    assert "may still bill; to delete it: python scripts/launch.py down --name" in err[-1]
