"""Real processes under a supervisor: how one of them ends decides what becomes of all, and so do signals."""

import array
import fcntl
import os
import signal
import sys
import termios
from pathlib import Path

import pytest

from scripts.launching.supervisor import Death, describe_status, first_to_fail, keep_running, last_step, supervise
from tests.scripts.launching.supervision import state, supervisions, wait_until

start = pytest.fixture(supervisions)
HANG = "hang(signal.SIGTERM)"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
OTHERS_UP = "wait('up-0'); wait('up-2'); "


def test_all_that_end_well_are_waited_for(start):
    group = start("mark('first')", "wait('first'); time.sleep(0.1); print('last')", restarts=3)
    assert group.end() == (0, [])
    assert group.out == b"[1] last\n"
    assert group.log(1) == b"last\n"


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        ("sys.exit(1)", 1, "exited with status 1"),
        (KILLED, 137, "was killed by SIGKILL"),
        ("os.kill(os.getpid(), 40)", 168, "was killed by signal 40"),
    ],
)
def test_the_first_to_fail_is_named_and_ends_the_others(end, status, words, start):
    group = start(HANG, OTHERS_UP + end, HANG, "wait('up-0')")
    found, err = group.end()
    assert found == status
    assert group.alive() == []
    # The fourth may have ended before.
    assert err in [
        [f"process 1 {words}; ending the other {others}; its output: logs/attempt-1/process-1.log"] for others in (2, 3)
    ]


def test_of_two_found_dead_at_once_the_one_that_lost_its_peer_is_not_blamed(start):
    group = start("mark('up-0'); wait('go'); sys.exit(4)", "mark('up-1'); wait('go');" + KILLED)
    group.until("up-0", "up-1")
    group.driver.send_signal(signal.SIGSTOP)
    group.mark("go")
    pids = Path(f"/proc/{group.driver.pid}/task/{group.driver.pid}/children").read_text().split()
    wait_until(lambda: [state(pid) for pid in pids] == ["Z", "Z"])
    group.driver.send_signal(signal.SIGCONT)
    status, err = group.end()
    assert status == 137
    assert err == ["process 1 was killed by SIGKILL; its output: logs/attempt-1/process-1.log"]


def test_what_may_pass_is_started_again(start):
    ends = f"{{1: lambda: sys.exit(3), 2: lambda: {KILLED}, 3: lambda: None}}[ATTEMPT]()"
    group = start("ATTEMPT == 3 or hang()", f"print('attempt', ATTEMPT); {ends}", restarts=3)
    status, err = group.end()
    assert status == 0
    assert [line for line in err if line.startswith("restart")] == ["restart 1 of 3", "restart 2 of 3"]
    assert group.out.decode().splitlines() == [f"[1] attempt {attempt}" for attempt in (1, 2, 3)]
    assert [group.log(1, attempt) for attempt in (1, 2, 3)] == [b"attempt 1\n", b"attempt 2\n", b"attempt 3\n"]
    assert group.alive() == []


def test_logs_go_on_from_what_is_there(start, tmp_path):
    for attempt in (1, 7):
        (tmp_path / "logs" / f"attempt-{attempt}").mkdir(parents=True)
        (tmp_path / "logs" / f"attempt-{attempt}" / "process-0.log").write_text("kept")
    (tmp_path / "logs" / "attempt-old").mkdir()
    group = start("print('new', ATTEMPT)")
    assert group.end() == (0, [])
    assert [group.log(0, attempt) for attempt in (1, 7, 8)] == [b"kept", b"kept", b"new 1\n"]


def test_bad_input_leaves_nothing(start, tmp_path):
    group = start("print('error: no', file=sys.stderr); sys.exit(2)", log_dir="new/folder/logs")
    status, err = group.end()
    assert status == 2
    assert err == ["[0] error: no", "process 0 exited with status 2"]
    assert list(tmp_path.iterdir()) == []


def test_bad_input_leaves_what_was_there(start, tmp_path):
    (tmp_path / "logs" / "attempt-1").mkdir(parents=True)
    assert start("sys.exit(2)").end()[0] == 2
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["attempt-1"]


def test_a_log_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/attempt-1 cannot be made .*; try another --log-dir"):
        supervise(lambda attempt: [], restarts=0, log_dir=tmp_path / "file")


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
        "while True: os.write(1, b'x' * 999 + b'\\n')"
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


@pytest.mark.parametrize(
    ("end", "status"),
    [("os.kill(os.getpid(), signal.SIGSEGV)", 139), ("os.abort()", 134), ("sys.exit(4)", 4), ("sys.exit(5)", 5)],
)
def test_what_crashes_in_the_same_step_again_and_again_is_ended(end, status, start):
    """A process that is alone has no peer to lose, so that an abort is its own."""
    group = start(f"print('step 10/99  loss 1'); print('error: at step 3 of run'); {end}", restarts=20)
    found, err = group.end()
    assert found == status
    assert err[-1] == "not started again after 3 crashes in the same place, after step 10"
    assert sum(line.startswith("restart ") for line in err) == 2


def test_where_a_step_hung_all_show_their_stacks(start):
    """As train.py does; one that does not answer is killed as ever."""
    listening = "import faulthandler; faulthandler.register(signal.SIGQUIT, chain=True); hang()"
    group = start("wait('up-1'); wait('up-2'); sys.exit(5)", listening, "hang(signal.SIGQUIT)")
    assert group.end()[0] == 5
    assert b"most recent call first" in group.log(1)
    assert group.alive() == []


def test_crashes_in_other_steps_are_started_again(start):
    group = start(f"print(f'step {{ATTEMPT // 2}}/99  loss 1'); ATTEMPT == 6 or {KILLED}", restarts=20)
    assert group.end()[0] == 0


def test_a_pause_before_a_restart_ends_with_a_signal(start):
    group = start("sys.exit(3)", restarts=1, pause=600)
    while "restart 1 of 1 in 300 s" not in group.driver.stderr.readline().decode():
        pass
    group.driver.terminate()
    assert group.end()[0] == 3


def attempts(*statuses):
    """An attempt that ends with each of these in turn, each time in another step, and the numbers it was given."""
    numbers = []

    def attempt(number):
        numbers.append(number)
        status = statuses[number - 1]
        return Death(status, "it died", step=number) if status else None

    return attempt, numbers


@pytest.mark.parametrize(
    ("statuses", "restarts", "status", "made"),
    [
        ([0], 0, 0, 1),
        ([3, 0], 1, 0, 2),
        ([4, 0], 1, 0, 2),
        ([-9, 3, 0], 2, 0, 3),
        ([-9, 3], 1, 3, 2),
        ([3, -9], 1, 137, 2),
        ([1], 5, 1, 1),
        ([2], 5, 2, 1),
        ([3, 77], 5, 77, 2),
    ],
)
def test_only_what_may_pass_is_tried_again(statuses, restarts, status, made):
    attempt, numbers = attempts(*statuses)
    assert keep_running(attempt, restarts=restarts, pause=0) == status
    assert numbers == list(range(1, made + 1))


@pytest.mark.parametrize(
    ("saved", "pauses"),
    [
        ([None] * 12, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]),
        ([10] * 12, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]),  # all of them were there before the first
        ([None, 10, 10, 20, 20, 20], [1, 1, 2, 1, 2, 4]),
        ([10, None] * 6, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]),  # a bucket that does not always answer
    ],
)
def test_a_new_checkpoint_makes_the_restarts_whole_and_the_pauses_short(saved, pauses):
    attempt, _ = attempts(*[3] * 99)
    steps, slept = iter(saved), []
    restarts = len(pauses) if len(pauses) > 10 else 3
    status = keep_running(
        attempt, restarts=restarts, newest=lambda: next(steps, saved[-1]), pause=1, sleep=slept.append
    )
    assert (status, slept[: len(pauses)]) == (3, pauses)


@pytest.mark.parametrize(
    ("deaths", "made"),
    [
        ([(-9, 4), (-11, 4), (4, 4), (0, 0)], 3),
        ([(-9, 4), (-9, 5), (-9, 4), (-9, 4), (0, 0)], 5),
        ([(-9, 4), (-9, 4), (3, 4), (-9, 4), (-9, 4), (0, 0)], 6),  # a disk is not a crash
        ([(3, 4), (3, 4), (3, 4), (3, 4), (0, 0)], 5),
        ([(-11, None)] * 9, 3),
    ],
)
def test_three_crashes_in_a_row_in_one_step_are_enough(deaths, made):
    numbers = []

    def attempt(number):
        numbers.append(number)
        status, step = deaths[number - 1]
        return Death(status, "it died", step) if status else None

    keep_running(attempt, restarts=20, pause=0)
    assert len(numbers) == made


@pytest.mark.parametrize(
    ("log", "step"),
    [
        ("", None),
        ("steps     60 × 32 sequences\n", None),
        ("resume    from step 250 of runs/x\n", 250),
        ("resume    from step 250 of runs/x\nstep 260/600  loss 3.1\nstep 270/600  loss 3.0\n", 270),
        ("[0] step 40/600  loss 3.1\nerror: stopped: no; the last good checkpoint is step 30 of x\n", 40),
    ],
)
def test_the_last_step_of_a_log(log, step):
    assert last_step(log) == step


def test_nothing_is_tried_again_once_it_is_to_stop():
    attempt, numbers = attempts(3, 0)
    assert keep_running(attempt, restarts=5, stopping=lambda: True) == 3
    assert numbers == [1]


@pytest.mark.parametrize(
    ("statuses", "first"),
    [
        ({}, None),
        ({0: 0, 1: None}, None),
        ({0: 4, 1: -9}, 1),
        ({0: 4, 1: 1, 2: 2}, 1),
        ({0: None, 1: 4, 2: 4}, 1),
        ({0: 3, 1: 4, 2: -6}, 0),
        ({0: 4, 1: -6, 2: 3}, 2),
        ({0: 4, 1: -6}, 1),
    ],
)
def test_one_that_lost_a_peer_is_blamed_last(statuses, first):
    assert first_to_fail(statuses) == first


def test_words_for_a_status():
    assert describe_status(3) == "exited with status 3"
    assert describe_status(-signal.SIGKILL) == "was killed by SIGKILL"
    assert describe_status(-40) == "was killed by signal 40"
