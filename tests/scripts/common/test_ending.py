"""SIGTERM to real processes that do not train yet."""

import signal

import pytest

from tests.parallelism.processes import HANG_SECONDS, pair, started

UNINTERRUPTED = "signal.signal(signal.SIGINT, signal.SIG_IGN); ending.CLEANING_SECONDS = 0.3"
EARLY = """
    import signal, threading
    from parallelism.hosts import run_process, wait_for_all
    from scripts.common import ending

    ending.CLEANING_SECONDS = 60.0

    def lose_a_worker():
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            raise ValueError("it ended") from None

    def main():
        BEFORE
        with ending.ending_early(lambda: print("ended", flush=True)):
            try:
                print("begin", flush=True)
                WORK
            finally:
                print("cleaned", flush=True)
        print("trains", flush=True)
        threading.Event().wait()

    raise SystemExit(run_process(main))
"""


@pytest.mark.parametrize(
    ("before", "work", "said"),
    [
        ("", "threading.Event().wait()", "begin\ncleaned\nended\n"),
        ("", "lose_a_worker()", "begin\ncleaned\nended\n"),
        (UNINTERRUPTED, "threading.Event().wait()", "begin\nended\n"),
    ],
    ids=["interrupted", "what the end brings is no error", "where nothing interrupts it"],
)
def test_sigterm_before_a_run_trains_ends_it_and_what_it_was_writing_is_removed(before, work, said):
    with started(EARLY.replace("BEFORE", before).replace("WORK", work)) as child:
        line = child.stdout.readline()
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, line + out, err) == (0, said, "")


def test_ctrl_c_before_a_run_trains_interrupts_it():
    with started(EARLY.replace("BEFORE", "").replace("WORK", "threading.Event().wait()")) as child:
        assert child.stdout.readline() == "begin\n"
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=60) == ("cleaned\n", "interrupted\n")
        assert child.returncode == 130


def test_signals_are_as_before_once_a_run_is_about_to_train():
    with started(EARLY.replace("BEFORE", "").replace("WORK", "pass")) as child:
        assert [child.stdout.readline() for _ in range(3)] == ["begin\n", "cleaned\n", "trains\n"]
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == -signal.SIGTERM


def test_sigterm_to_one_ends_all_processes_while_one_prepares_and_the_others_wait_for_it():
    before = "join(cluster); ending.CLEANING_SECONDS = 60.0 if number == 0 else 0.3"
    work = "threading.Event().wait() if number == 0 else wait_for_all('the data set is prepared')"
    with pair(EARLY.replace("BEFORE", before).replace("WORK", work)) as processes:
        assert [process.stdout.readline() for process in processes] == ["begin\n"] * 2
        processes[1].send_signal(signal.SIGTERM)
        ended = [process.communicate(timeout=HANG_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert ended[0][0] == "cleaned\nended\n"
    assert "ended\n" in ended[1][0]
