"""Real processes under a supervisor: how one of them ends decides what becomes of all."""

import signal
from pathlib import Path

import pytest

from scripts.launching.supervisor import supervise
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
        [f"process 1 {words}; ending the other {others}; its output: logs/attempt-1/process-1.log"]
        for others in (2, 3)
    ]


def test_one_alone_has_no_others_to_end(start):
    group = start("sys.exit(1)")
    assert group.end() == (1, ["process 0 exited with status 1; its output: logs/attempt-1/process-0.log"])


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
    assert [group.log(1, attempt) for attempt in (1, 2, 3)] == [
        b"attempt 1\n",
        b"attempt 2\n",
        b"attempt 3\n",
    ]
    assert group.alive() == []


def test_restarts_are_used_up(start):
    group = start(HANG, "wait('up-0'); sys.exit(3)", restarts=2)
    status, err = group.end()
    assert status == 3
    assert err[1::2] == ["restart 1 of 2", "restart 2 of 2", "no restart is left of 2"]
    assert [line.split(";")[0] for line in err[::2]] == ["process 1 exited with status 3"] * 3
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
