"""How a run is asked to stop: by SIGTERM or Ctrl-C, of which the loop learns between steps.

Invariant: all processes of a run stop after the same step, or, before any has been taken, all at once.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax

STOPPING = "stopping: this step is saved, then the run ends; a second Ctrl-C ends it at once, without saving\n"
NOTICE = "RECEIVED_PREEMPTION_NOTICE"
"""Where JAX's preemption service writes, for all processes, that one of them got SIGTERM."""
FIRST_WORD = "parallax/first-word-after-a-stop"
NOTICE_SECONDS = 0.5
"""How often a process looks for it while it cannot ask."""


class StopRequest:
    """Turns the first SIGTERM or Ctrl-C into a question that the loop asks; a second Ctrl-C interrupts at once.

    Over several processes JAX listens for SIGTERM itself, and all agree on the question at which they stop. Until the
    first question nothing is done that could be lost, and the main thread may be in a compilation, which nothing
    interrupts: then they end without it.
    """

    def __init__(self):
        self._requested = False
        self._asked = 0
        self._together: Callable[[int], bool] | None = None

    def listen(self, at_once: Callable[[], None] = lambda: None) -> None:
        """Installs the handlers; call it from the main thread, once a run is about to train.

        Args:
          at_once: called in another thread at each signal, for the main thread may be in a call that no handler
            interrupts, such as a compilation. It may end the process. Over several processes it is called in all of
            them, only if none has asked yet, and must end them.
        """
        if jax.process_count() > 1:  # a handler for SIGTERM would displace JAX's own
            from jax.experimental import multihost_utils

            self._together = multihost_utils.reached_preemption_sync_point
            threading.Thread(target=self._watch_notice, args=(at_once,), daemon=True).start()
            return
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=_watch_signals, args=(reading, at_once), daemon=True).start()

    def __call__(self) -> bool:
        """Whether to stop now; several processes must all ask equally often. Of them, all get one True at once."""
        self._asked += 1
        if self._together is None:
            return self._requested
        if self._asked == 1 and _first_word("ask") != "ask":
            threading.Event().wait()  # until the other thread ends this process, as all others end
        return self._together(self._asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self._requested = not self._requested, True  # at once: another signal may come while this one is handled
        if first:
            os.write(2, STOPPING.encode())  # a handler may have interrupted a print
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _watch_notice(self, at_once: Callable[[], None]) -> None:
        """Calls `at_once` in each process if one gets SIGTERM before any has asked whether to stop."""
        while (word := _said(FIRST_WORD)) != "ask":
            if word == "end" or (_said(NOTICE) and _first_word("end") == "end"):
                at_once()
                return
            time.sleep(NOTICE_SECONDS)


def _watch_signals(reading: int, at_once: Callable[[], None]) -> None:
    """Calls `at_once` for each signal that Python writes into this pipe, whatever the main thread does."""
    while number := os.read(reading, 1):
        if number[0] in (signal.SIGTERM, signal.SIGINT):
            at_once()


def _first_word(word: str) -> str | None:
    """The word of that process of the run which was the first to say one."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is one
        _client().key_value_set(FIRST_WORD, word)
    return _said(FIRST_WORD)


def _said(key: str) -> str | None:
    """What all processes of the run can read under that key, or None."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return _client().key_value_try_get(key)
    return None


def _client() -> Any:
    from jax._src import distributed  # JAX has no public name for what its processes say to each other

    return distributed.global_state.client
