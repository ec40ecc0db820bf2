"""What the exit status of one process of a run says to whoever started it.

Invariant: a supervisor decides by the status alone whether to start a run again.
"""

import re

FAILED = 1
"""The run failed by itself, and would again."""
BAD_INPUT = 2
"""The process did nothing, since its input is wrong."""
OUTSIDE_FAILURE = 3
"""The run failed through something outside it, as a disk, and may be started again."""
LOST_PEER = 4
"""Another process of the run is gone, and knows why; it may be started again."""
INTERRUPTED = 130
"""Ctrl-C ended it at once: 128 and the number of the signal, as a shell has it."""


def is_of_runtime(error: Exception) -> bool:
    """Whether JAX's runtime raised this, as when a peer is gone: from some calls it does so as a ValueError."""
    return re.match(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED): ", str(error)) is not None
