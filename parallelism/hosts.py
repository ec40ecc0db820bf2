"""Signals that ask a run to stop.

Invariant: a request is noticed between steps, never in the middle of one.
"""

import signal
from types import FrameType


class StopRequest:
    """Turns the first SIGTERM or Ctrl-C into a question that the loop asks; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self._requested = False

    def listen(self) -> None:
        """Installs the handlers; call it from the main thread, once a run is about to train."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def __call__(self, step: int) -> bool:
        """Whether to stop after this step."""
        return self._requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True
