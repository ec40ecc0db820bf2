"""What the exit status of one process of a run says to whoever started it.

Invariant: a supervisor decides by the status alone whether a run may be started again, and reads no message.
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
DEVICE_FAILURE = 5
"""A device failed, or a step did not end; it may be started again, unless it happens in the same step each time."""
INTERRUPTED = 130
"""Ctrl-C ended it at once: 128 and the number of the signal, as a shell has it."""

_PASSING = ("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "UNAVAILABLE")
_OF_DEVICE = ("UNKNOWN", "INTERNAL", "DATA_LOSS")
_REPEATED = (
    *("INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"),
    *("FAILED_PRECONDITION", "OUT_OF_RANGE", "UNIMPLEMENTED", "UNAUTHENTICATED"),
)
_CODE = re.compile(rf"({'|'.join((*_PASSING, *_OF_DEVICE, *_REPEATED))}): ")
_PEERS = re.compile(r"gloo|nccl|heartbeat|coordination|barrier|connection|socket|another task", re.IGNORECASE)
"""What the message names where a peer is lost and the code does not say so."""

OUT_OF_MEMORY = (
    "the devices' memory is too small for this run; try --remat full, a larger --accumulate or a --mesh that splits "
    "more, and see what fits with scripts/plan.py"
)


def code_of(error: BaseException) -> str | None:
    """The status code with which JAX's runtime raised this, or None where something else did.

    From some calls it raises a ValueError, not a JaxRuntimeError, so the message decides.
    """
    match = _CODE.match(str(error)) if isinstance(error, (RuntimeError, ValueError)) else None
    return match and match[1]


def status_of(error: BaseException, several: bool) -> int:
    """The exit status for an exception that nobody caught.

    Args:
      several: whether other processes belong to the run.
    """
    code, message = code_of(error), str(error)
    if code is None or code == "RESOURCE_EXHAUSTED":
        return FAILED
    if "compil" in message.lower() and code not in _PASSING:
        return FAILED
    if several and (code in _PASSING or _PEERS.search(message)):
        return LOST_PEER
    return FAILED if code in _REPEATED else DEVICE_FAILURE
