"""Signals in a real process: a request to stop waits for the step, a second Ctrl-C does not."""

import contextlib
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from parallelism.hosts import StopRequest

ROOT = pathlib.Path(__file__).parents[2]
CHILD = """
    import sys, time
    from parallelism.hosts import StopRequest

    stop = StopRequest()
    stop.listen()
    for step in range(1, 1000):
        print("begin", step, flush=True)
        sys.stdin.readline()  # the step takes until the parent says so
        print("end", step, flush=True)
        if stop(step):
            print("saved", step, flush=True)
            break
"""


class Child:
    """A process that runs steps one line of standard input long."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def expect(self, line):
        assert self._process.stdout.readline().strip() == line

    def finish_step(self):
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def signal(self, number):
        self._process.send_signal(number)

    def ends_within(self, seconds):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.poll() is not None

    def end(self):
        """Exit status, what was printed since, and standard error."""
        out, error = self._process.communicate(timeout=60)
        return self._process.returncode, out, error

    def close(self):
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            pipe.close()


@pytest.fixture
def child():
    child = Child()
    child.expect("begin 1")
    yield child
    child.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_after_the_step_it_fell_into(child, number):
    child.finish_step()
    child.expect("end 1")
    child.expect("begin 2")
    child.signal(number)
    child.finish_step()
    child.expect("end 2")
    child.expect("saved 2")
    assert child.end() == (0, "", "")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_interrupts_at_once(child, first):
    child.signal(first)
    assert not child.ends_within(0.3), "the first one waits for the step"
    for _ in range(200):  # signals that arrive together count as one
        child.signal(signal.SIGINT)
        if child.ends_within(0.3):
            break
    status, out, error = child.end()
    assert status == -signal.SIGINT
    assert out == ""
    assert error.rstrip().endswith("KeyboardInterrupt")


def test_repeated_sigterm_still_waits_for_the_step(child):
    for _ in range(3):
        child.signal(signal.SIGTERM)
    child.finish_step()
    child.expect("end 1")
    child.expect("saved 1")
    assert child.end() == (0, "", "")


def test_nothing_is_requested_and_no_handler_installed_until_asked():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stop = StopRequest()
    assert not any(stop(step) for step in range(5))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
