"""Signals to `launch.py run`, and the end of its time, as one exception.

Invariant: once a TPU is being deleted, no signal stops that.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from scripts.launching.restarts import signal_name

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


class Interrupted(BaseException):
    """A signal asks for the end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Signals:
    """Turns signals into Interrupted, until closing: then none comes between a TPU and its deletion."""

    def __init__(self):
        self.closing = False

    @contextlib.contextmanager
    def noticed(self, hours: float | None) -> Iterator[None]:
        """Handles signals within, and gives SIGALRM after some hours. What was ignored, as by nohup, stays so."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._note)
        signal.setitimer(signal.ITIMER_REAL, (hours or 0) * 3600)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.closing:
            raise Interrupted(number)
        with contextlib.suppress(OSError):  # not by print, which this may have interrupted
            os.write(2, f"{signal_name(number)}: not now, since a TPU bills until it is deleted\n".encode())
