"""Runs several processes as one: they end together, and start again when what ended them may pass.

Invariant: no process outlives the attempt that started it, and nothing but a living process is waited for. What would
fail again by itself is not started again, and nothing is after it was asked to stop.
"""

import contextlib
import dataclasses
import os
import re
import select
import selectors
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from parallelism.exit_status import BAD_INPUT, DEVICE_FAILURE, LOST_PEER, OUTSIDE_FAILURE
from scripts.launching.child import Child, Command, say

CAUSE_SECONDS = 1.0
"""How long a process that seems to have lost a peer is not blamed, in case another turns out to have died."""


FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
"""Seconds before a restart; doubled with each that saves nothing new."""
SAME_STEP = 3
"""After so many crashes in a row in one step, as far as rows show it, that step is to blame."""
_TAIL = 1 << 16
"""Bytes of a log in which its last step is looked for."""


@dataclasses.dataclass(frozen=True)
class Death:
    """How an attempt ended that did not end well."""

    status: int
    """-n for signal n."""
    what: str
    """Who died of what, in words."""
    step: int | None = None
    """The last step that the run reported."""
    log: Path | None = None
    """What the process that died had written, where that is kept here."""

    @property
    def may_pass(self) -> bool:
        return self.crashed or self.status == OUTSIDE_FAILURE

    @property
    def crashed(self) -> bool:
        """Whether a process of the run went down; the machine may have taken it, or its own code."""
        return self.status < 0 or self.status in (LOST_PEER, DEVICE_FAILURE)

    @property
    def exit_status(self) -> int:
        return self.status if self.status > 0 else 128 - self.status


def keep_running(
    attempt: Callable[[int], Death | None],
    *,
    restarts: int,
    stopping: Callable[[], bool] = lambda: False,
    newest: Callable[[], int | None] = lambda: None,
    pause: float = FIRST_PAUSE,
    sleep: Callable[[float], object] = time.sleep,
) -> int:
    """Makes attempts until one ends well, or ends in a way that would not pass, or `restarts` are used up.

    Once a checkpoint is newer than at the last death all of them are there again, and the pause is as short as at
    first. After SAME_STEP crashes in the same step no attempt follows.

    Args:
      attempt: from its number, 1 at first, to how it died; None if it ended well.
      stopping: whether nothing is to be started any more.
      newest: the step of the newest checkpoint, None where that is not known.
      pause: seconds before the first restart.
      sleep: waits so many seconds, or until `stopping`.

    Returns:
      An exit status: 0, that of the last death, or 128 + n where signal n was the cause.
    """
    number = used = crashes = 0
    saved = step = None
    while True:
        number += 1
        death = attempt(number)
        if death is None:
            return 0
        if stopping() or not death.may_pass:
            return death.exit_status
        found = newest()
        if found is not None and (saved is None or found > saved):
            used, saved = 0, found
        crashes = 0 if not death.crashed else crashes + 1 if death.step == step else 1
        step = death.step
        if crashes == SAME_STEP:
            where = "before the first step" if step is None else f"after step {step}"
            say(f"not started again after {SAME_STEP} crashes in the same place, {where}")
            return death.exit_status
        if used == restarts:
            if restarts:
                say(f"no restart is left of {restarts}")
            return death.exit_status
        seconds = min(pause * 2**used, LONGEST_PAUSE)
        used += 1
        say(f"restart {used} of {restarts}{f' in {seconds:g} s' if seconds else ''}")
        sleep(seconds)
        if stopping():
            return death.exit_status


def last_step(log: str) -> int | None:
    """The last step in what train.py printed, of a row or of its start from a checkpoint; None before the first."""
    steps = re.findall(r"^(?:\[0\] )?(?:resume +from )?step (\d+)(?:/\d| of )", log, re.MULTILINE)
    return int(steps[-1]) if steps else None


CONSEQUENCES = (-signal.SIGABRT, LOST_PEER)
"""Statuses of a process whose peer is gone, of which the first may also be its own fault: JAX aborts a process that has
lost the one that coordinates the run."""


def first_to_fail(statuses: Mapping[int, int | None]) -> int | None:
    """Which process is to blame, by its index; None if none failed.

    Of several found dead at once, one that lost a peer is not the cause.

    Args:
      statuses: by index; None while it runs, -n for signal n.
    """

    def rank(index: int) -> int:
        status = statuses[index]
        return CONSEQUENCES.index(status) if status in CONSEQUENCES else -1

    return min((index for index, status in statuses.items() if status), key=rank, default=None)


def describe_status(status: int) -> str:
    """How a process ended, as a predicate."""
    return f"was killed by {signal_name(-status)}" if status < 0 else f"exited with status {status}"


def signal_name(number: int) -> str:
    """SIGTERM for 15."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def supervise(
    commands: Callable[[int], Sequence[Command]],
    *,
    restarts: int,
    log_dir: Path,
    newest: Callable[[], int | None] = lambda: None,
    pause: float = FIRST_PAUSE,
) -> int:
    """Runs processes until all have ended with status 0, or one has not.

    The first that ends otherwise ends the others by SIGKILL. If it exited with OUTSIDE_FAILURE, LOST_PEER or
    DEVICE_FAILURE, or was killed by a signal, all start again, as `keep_running` decides. What process INDEX prints is
    shown line by line behind "[INDEX] ", and kept in `log_dir`/attempt-K/process-INDEX.log, where K goes on from what
    is there; an attempt that ends with BAD_INPUT leaves nothing there. The first SIGTERM or SIGINT is passed on as
    SIGTERM, and nothing is restarted afterwards; the second kills.

    Call it from the main thread: signals arrive there, and Linux takes the thread that starts a process for its parent.

    Args:
      commands: from the attempt, 1 at first, to a command for each process.
      newest, pause: as of `keep_running`.

    Returns:
      An exit status: 0, that of the process that died first, or 128 + n if that was killed by signal n; also 128 + n
      if n is the signal that came second.

    Raises:
      ValueError: the log folder cannot be made.
    """
    missing = [folder for folder in (log_dir, *log_dir.parents) if not folder.exists()]
    interrupts = _Interrupts()

    def attempt(number: int) -> Death | None:
        folder = _make_attempt(log_dir)
        death = _run(commands(number), folder, interrupts)
        if death is None:
            return None
        if interrupts.count > 1:
            say(f"{signal_name(interrupts.number)} came second; the processes were killed")
            return Death(-interrupts.number, "")
        if death.status == BAD_INPUT:
            _remove(folder, missing)
            say(death.what)
            return death
        say(f"{death.what}; its output: {death.log}")
        return dataclasses.replace(death, step=_read_step(folder / "process-0.log"))

    with interrupts.noticed():
        return keep_running(
            attempt,
            restarts=restarts,
            stopping=lambda: interrupts.count > 0,
            newest=newest,
            pause=pause,
            sleep=interrupts.sleep,
        )


class _Interrupts:
    """Passes the first SIGTERM or SIGINT on to every process as SIGTERM, and kills them at the second."""

    def __init__(self):
        self.processes: list[Child] = []
        self.count = self.number = 0
        self.woken = -1
        """A file with something to read once a signal has come, be it that a process has ended."""
        self._reported = False

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """Handles signals within."""
        self.woken, waker = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(waker, False)
        before = signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)
            signal.set_wakeup_fd(before)
            os.close(self.woken)
            os.close(waker)

    def pass_on(self, process: Child) -> None:
        """Does what has been asked so far to a process, which may have started only now."""
        if self.count == 1:
            process.terminate()
        elif self.count > 1:
            process.kill()

    def report(self) -> None:
        """Takes what woke; says what was asked."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.woken, 65536)
        if self.count and not self._reported:
            self._reported = True
            say(f"{signal_name(self.number)}: waiting for the processes to stop; a second one kills them")

    def sleep(self, seconds: float) -> None:
        """Waits, but not after a signal that asks to stop."""
        limit = time.monotonic() + seconds
        while not self.count and (left := limit - time.monotonic()) > 0:
            select.select([self.woken], [], [], left)
            with contextlib.suppress(BlockingIOError):
                os.read(self.woken, 65536)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Acts here, since the loop may be held up by a terminal that takes no output, but leaves output to the loop.
        self.count, self.number = self.count + 1, number
        for process in self.processes:
            self.pass_on(process)


def _run(commands: Sequence[Command], folder: Path, interrupts: _Interrupts) -> Death | None:
    """Runs one attempt to its end, and kills what is left of it; None when every process ended with status 0."""
    processes = interrupts.processes = []
    with selectors.DefaultSelector() as selector:
        selector.register(interrupts.woken, selectors.EVENT_READ, interrupts.report)
        try:
            for index, command in enumerate(commands):
                process = Child(index, command, folder / f"process-{index}.log", selector)
                processes.append(process)
                interrupts.pass_on(process)
            return _watch(processes, selector)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.finish()


def _watch(processes: Sequence[Child], selector: selectors.BaseSelector) -> Death | None:
    """Relays until one process has failed or all have ended."""
    running = list(processes)
    while running:
        for key, _ in selector.select():
            key.data()
        statuses = {process: process.status() for process in running}
        first = first_to_fail({process.index: status for process, status in statuses.items()})
        until = time.monotonic() + CAUSE_SECONDS
        while (
            first is not None
            and statuses[processes[first]] in CONSEQUENCES
            and None in statuses.values()
            and time.monotonic() < until
        ):  # the peer that it lost is seen dead only when all of its memory is given back
            time.sleep(0.05)
            statuses = {process: process.status() for process in running}
            first = first_to_fail({process.index: status for process, status in statuses.items()})
        running = [process for process, status in statuses.items() if status is None]
        if first is not None:
            status = processes[first].status() or 0
            if status == DEVICE_FAILURE:  # a step may have hung, for a reason that another process shows
                _quit(running)
            others = f"; ending the other {len(running)}" if running else ""
            what = f"process {first} {describe_status(status)}{others}"
            return Death(status, what, log=processes[first].log)
        for process, status in statuses.items():
            if status is not None:
                process.finish()
    return None


def _quit(processes: Sequence[Child]) -> None:
    """Lets processes show their stacks; those that do not listen are waited for no longer than CAUSE_SECONDS."""
    for process in processes:
        process.quit()
    until = time.monotonic() + CAUSE_SECONDS
    while time.monotonic() < until and any(process.status() is None for process in processes):
        time.sleep(0.01)


def _read_step(log: Path) -> int | None:
    """The last step in the log of process 0, which shows the run's rows."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        return last_step(file.read().decode(errors="replace"))
    return None


def _make_attempt(log_dir: Path) -> Path:
    numbers = [path.name.removeprefix("attempt-") for path in log_dir.glob("attempt-*")]
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    folder = log_dir / f"attempt-{last + 1}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"log folder {folder} cannot be made ({error.strerror}); try another --log-dir") from None
    return folder


def _remove(attempt: Path, made: Sequence[Path]) -> None:
    """Removes an attempt, and those of the folders made for it, innermost first, that are empty."""
    shutil.rmtree(attempt, ignore_errors=True)
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()
