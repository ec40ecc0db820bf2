"""Signals to a supervisor: the first asks all processes to stop, the second kills them, and none outlives it."""

import array
import fcntl
import os
import signal
import sys
import termios

import pytest

from tests.scripts.launching.supervision import supervisions, wait_until

start = pytest.fixture(supervisions)
SAVE = "save_on_sigterm()"
STUBBORN = "hang(signal.SIGTERM, signal.SIGINT)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_asks_each_process_once_to_stop_and_waits(number, start):
    group = start(SAVE, SAVE, SAVE, restarts=3)
    group.until("up-0", "up-1", "up-2")
    os.killpg(group.driver.pid, number)  # as a terminal sends Ctrl-C: to the whole group
    line = group.driver.stderr.readline().decode()
    assert line == f"{number.name}: waiting for the processes to stop; a second one kills them\n"
    assert len(group.alive()) == 3
    group.mark("saved")
    assert group.end() == (0, [])
    assert sorted(group.out.splitlines()) == [b"[0] SIGTERM", b"[1] SIGTERM", b"[2] SIGTERM"]


def test_nothing_is_started_again_after_it(start):
    group = start("save_on_sigterm(3)", STUBBORN, restarts=3)
    group.until("up-0", "up-1")
    group.driver.terminate()
    group.mark("saved")
    status, err = group.end()
    assert status == 3
    assert len(err) == 2
    assert err[1].startswith("process 0 exited with status 3; ending the other 1")
    assert group.alive() == []


def test_processes_that_do_not_listen_yet_die_of_it(start):
    group = start("hang()", "hang()", restarts=3)
    group.until("up-0", "up-1")
    group.driver.terminate()
    status, err = group.end()
    assert status == 128 + signal.SIGTERM
    assert "was killed by SIGTERM" in err[1]
    assert group.alive() == []


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_kills(second, start):
    group = start(STUBBORN, STUBBORN, restarts=3)
    group.until("up-0", "up-1")
    group.driver.terminate()
    group.driver.stderr.readline()
    assert len(group.alive()) == 2
    group.driver.send_signal(second)
    assert group.end() == (128 + second, [f"{second.name} came second; the processes were killed"])
    assert group.alive() == []


def test_it_is_passed_on_while_nobody_reads_the_output(start):
    group = start(
        "signal.signal(signal.SIGTERM, lambda *_: (mark('asked'), os._exit(0))); mark('up-0')\n"
        "while True: os.write(1, b'x' * 999 + b'\\n')",
    )
    group.until("up-0")
    unread = array.array("i", [0])

    def is_full():
        fcntl.ioctl(group.driver.stdout, termios.FIONREAD, unread)
        return unread[0] > 60_000

    wait_until(is_full)
    group.driver.terminate()
    group.until("asked")
    assert group.end()[0] == 0


if sys.platform == "linux":  # nothing like it exists elsewhere

    @pytest.mark.parametrize("count", [1, 3])
    def test_killing_the_supervisor_leaves_nobody(count, start):
        group = start(*[STUBBORN] * count)
        group.until(*(f"up-{index}" for index in range(count)))
        assert len(group.alive()) == count
        group.driver.kill()
        wait_until(lambda: not group.alive())
