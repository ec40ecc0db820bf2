"""How SIGTERM ends a run that does not train yet, and how one ends whose main thread is in a call of some length.

Invariant: a run that has done no step ends at once, in all of its processes, and leaves nothing half-written that the
main thread could remove.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from parallelism.exit_status import OUTSIDE_FAILURE
from parallelism.hosts import explain, has_peers, leave_together, watch_notice, watch_signals

CLEANING_SECONDS = 3.0
"""How long the main thread has to remove what it is writing, before the process ends without that."""


@contextlib.contextmanager
def ending_early(at_end: Callable[[], None]) -> Iterator[None]:
    """Within, SIGTERM ends the run with status 0, in all of its processes: nothing is done yet that could be lost.

    The main thread, which must call this, is interrupted as by Ctrl-C, so that it removes what it is writing. Where it
    is in a call that nothing interrupts, the process ends without it.

    Args:
      at_end: called just before the process ends, in the main thread or in another.
    """
    asked, left = threading.Event(), threading.Event()

    def end() -> None:
        if not asked.is_set():
            asked.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            if not left.wait(CLEANING_SECONDS):
                end_without_main_thread(at_end)

    try:
        with _watched(end):
            try:
                yield
            finally:
                left.set()
    except BaseException:  # whatever follows from the end
        if not asked.is_set():
            raise
    if asked.is_set():
        if has_peers():  # at exit JAX may go on waiting for one that has left
            end_without_main_thread(at_end)
        at_end()
        raise SystemExit(0)


def end_without_main_thread(at_end: Callable[[], None]) -> None:
    """Ends this process with the others, whatever its main thread does."""
    try:
        at_end()
        leave_together()
    except Exception as error:  # the main thread may wait for this process to end
        print(f"error: stopped: {explain(error)[1]}", file=sys.stderr, flush=True)
        os._exit(OUTSIDE_FAILURE)
    os._exit(0)


@contextlib.contextmanager
def _watched(end: Callable[[], None]) -> Iterator[None]:
    """Calls `end` in another thread at a SIGTERM to this process, or to any of the run. Waits for a call under way."""
    if has_peers():  # a handler would displace JAX's own
        done = threading.Event()
        thread, close = threading.Thread(target=watch_notice, args=(done, end), daemon=True), done.set
        thread.start()
    else:
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        thread, stop = watch_signals((signal.SIGTERM,), end)

        def close() -> None:
            signal.signal(signal.SIGTERM, before)
            stop()

    try:
        yield
    finally:
        close()
        thread.join()
