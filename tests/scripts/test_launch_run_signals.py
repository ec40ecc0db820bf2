"""Signals to launch.py run: train.py may save, and whatever was under way, nothing that bills is left."""

import os
import signal
import subprocess
import sys

import pytest

from tests.scripts.cloud import FAST, ROOT
from tests.scripts.launching.supervision import wait_until

DRIVER = """
import sys
from pathlib import Path
from scripts.launching.run import run
raise SystemExit(run(sys.argv[2:], checkout=Path(sys.argv[1])))
"""


@pytest.fixture
def heeded():
    """A child ignores the signals that its parent does, and a shell has commands in the background ignore some."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def start(cloud, heeded):
    """Starts launch.py run in a process of its own.

    It is to resume a run: then it need not import train.py, which takes as long as all else, to read flags.
    """
    processes = []

    def start(*flags, before=()):
        run = ["--bucket", "bkt", *FAST, *flags, "--", "--resume"]
        command = [*before, sys.executable, "-c", DRIVER, str(cloud.checkout), *run]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def end(process):
    _, err = process.communicate(timeout=60)
    return process.returncode, err.splitlines()


@pytest.fixture
def training(cloud, start):
    """Starts it with --autodelete, and waits until train.py runs on all hosts, until it is asked to stop."""

    def training(*flags, hosts=1, before=()):
        cloud.play(hosts=hosts, plays=["wait"])
        process = start(*flags, before=before)
        running = [cloud.world / "hosts" / str(number) / "training" for number in range(hosts)]
        wait_until(lambda: all(path.exists() for path in running))
        return process

    return training


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_first_lets_train_save_then_nothing_bills(number, cloud, training):
    process = training("--autodelete", hosts=2)
    process.send_signal(number)
    status, err = end(process)
    assert status == 0, err
    assert f"{number.name}: waiting for train.py to save and stop; a signal ends the wait" in err
    assert "train.py has saved and stopped" in err
    assert cloud.bills() == []


def test_time_that_is_up_lets_train_save(cloud, training):
    process = training("--autodelete", "--max-hours", "9.5")
    process.send_signal(signal.SIGALRM)  # what the timer sends
    status, err = end(process)
    assert status == 0, err
    assert "9.5 hours are over: waiting for train.py to save and stop; a signal ends the wait" in err
    assert cloud.bills() == []


def test_without_autodelete_train_stops_and_the_tpu_is_said_to_bill(cloud, training):
    process = training()
    process.send_signal(signal.SIGINT)
    status, err = end(process)
    assert status == 0, err
    assert "still bills; to delete it: python scripts/launch.py down" in err[-1]
    assert (cloud.world / "hosts/0/parallax/state/end").read_text() == "stopped 0"


def test_the_second_does_not_wait(cloud, training):
    script = cloud.checkout / "scripts" / "train.py"
    script.write_text(script.read_text().replace('print("saved", flush=True)', "time.sleep(600)"))
    cloud.git("-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-aqm", "Never save")
    process = training("--autodelete")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: any("host.sh stop" in " ".join(call) for call in cloud.calls()))
    process.send_signal(signal.SIGINT)
    status, err = end(process)
    assert status == 128 + signal.SIGINT
    assert "not waiting any longer" in err
    assert cloud.bills() == []


def test_while_a_tpu_is_being_created(cloud, start):
    cloud.play(create=["slow"])
    process = start("--autodelete")
    wait_until(lambda: cloud.bills() == ["node.json"])
    process.send_signal(signal.SIGINT)
    end(process)
    assert cloud.bills() == []


def test_while_waiting_for_capacity(cloud, start):
    cloud.play(create=["capacity"] * 999)
    process = start("--autodelete", "--retry-seconds", "3600")
    while "trying again in" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    status, err = end(process)
    assert (status, err[0]) == (128 + signal.SIGTERM, "SIGTERM, before train.py was started")
    assert cloud.bills() == []


def test_none_comes_between_a_tpu_and_its_deletion(cloud, start):
    cloud.play(refused={"delete": 2})
    process = start("--autodelete", "--retry-seconds", "0.5")
    while "trying again to delete" not in process.stderr.readline():
        pass
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "SIGINT: not now, since a TPU bills until it is deleted\n"
    assert end(process)[0] == 0
    assert cloud.bills() == []


def test_a_terminal_that_is_gone_stops_no_deletion(cloud, training):
    process = training("--autodelete")
    process.stderr.close()
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    process.wait(60)
    assert cloud.bills() == []


def test_nohup_is_respected(training):
    process = training("--autodelete", before=["bash", "-c", "trap '' HUP; exec \"$@\"", "bash"])
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    _, err = end(process)
    assert any(line.startswith("SIGTERM: waiting") for line in err)
