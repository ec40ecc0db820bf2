"""Ends a process whose steps have stopped: a hung collective raises nothing, and its peers wait for ever.

Invariant: what may take long the first time, as it compiles, gets more time, and the first step all that it takes.
"""

import collections
import contextlib
import faulthandler
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator

import jax

from parallax.training.loop import Stopwatch
from parallelism.exit_status import DEVICE_FAILURE

MEDIANS = 20
LEAST_SECONDS = 300.0
SLOW = 5
"""How many times the limit is what is done for the first time, or waits for storage."""
GRACE_SECONDS = 3.0
"""Between the stacks and the end, since whoever started all processes ends them when the first has ended."""
RECENT = 101
"""Of how many the median is taken."""
WATCHED = {"data": "step", "step": "step", "check": "check", "evaluation": "evaluation", "checkpoint": "checkpoint"}
"""From what the loop times to that whose median counts for it: a step is timed in parts."""


class Watchdog(Stopwatch):
    """A stopwatch that ends the process where what it times does not end: with DEVICE_FAILURE, after all stacks.

    Args:
      timeout: seconds for a step, 0 for no end; None for MEDIANS times the median, and no less than LEAST_SECONDS.
        Checks, evaluations and saves get as much, and no less than MEDIANS times their own median.
    """

    def __init__(self, timeout: float | None = None):
        super().__init__()
        self._timeout = timeout
        self._recent = {what: collections.deque[float](maxlen=RECENT) for what in set(WATCHED.values())}
        self._doing: str | None = None
        self._beats, self._spent = 0, 0.0
        self._done = threading.Event()

    @contextlib.contextmanager
    def timing(self, what: str) -> Iterator[None]:
        if what == "data":  # the last step, whose parts are timed one by one, is over
            spent = self.seconds.get("step", 0.0) + self.seconds.get("data", 0.0)
            if spent:
                self._recent["step"].append(spent - self._spent)
            self._spent = spent
        before = self.seconds.get(what, 0.0)
        self.beat()
        self._doing = what
        try:
            with super().timing(what):
                yield
        finally:
            self.beat()
            self._doing = "step"  # what is not timed, as the record, is a part of a step too
            if WATCHED.get(what, "step") != "step":
                self._recent[what].append(self.seconds[what] - before)

    def beat(self) -> None:
        """A part of what is timed is done."""
        self._beats += 1

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches within."""
        if self._timeout == 0:
            yield
            return
        # However a peer's end, or whoever started all processes, ends this one, its stacks are in its log.
        if not faulthandler.is_enabled():
            faulthandler.enable(2)
        faulthandler.register(signal.SIGQUIT, 2, chain=True)
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()
            faulthandler.unregister(signal.SIGQUIT)

    def limit(self, what: str) -> float:
        """Seconds that may go by in `what` without a beat."""
        kind = WATCHED[what]
        recent = list(self._recent[kind])
        usual = 0.0 if self._timeout is not None and kind == "step" else MEDIANS * statistics.median(recent or [0.0])
        least = LEAST_SECONDS if self._timeout is None else self._timeout
        return max(least, usual) * (SLOW if not recent or kind == "checkpoint" else 1)

    def _watch(self) -> None:
        tick = min(1.0, (self._timeout or LEAST_SECONDS) / 4)
        seen, waited, before = 0, 0.0, time.monotonic()
        while not self._done.wait(tick):
            now = time.monotonic()
            # A process that was suspended is not late: what went by meanwhile counts as two ticks.
            waited = waited + min(now - before, 2 * tick) if seen == self._beats else 0.0
            seen, before, what = self._beats, now, self._doing
            if what in WATCHED and waited > self.limit(what):
                _end(what, waited)


def _end(what: str, waited: float) -> None:
    line = f"error: process {jax.process_index()}: its {what} has not ended within {waited:.0f} s (--step-timeout)"
    os.write(2, f"{line}; what its threads do:\n".encode())
    faulthandler.dump_traceback(2)
    time.sleep(GRACE_SECONDS)
    os._exit(DEVICE_FAILURE)
