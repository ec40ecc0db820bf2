"""Whether a run that died is started again, wherever its processes are.

Invariant: what would fail again by itself is not started again, and nothing is after it was asked to stop.
"""

import dataclasses
import signal
from collections.abc import Callable, Mapping

from parallelism.exit_status import LOST_PEER, OUTSIDE_FAILURE
from scripts.launching.child import say


@dataclasses.dataclass(frozen=True)
class Death:
    """How an attempt ended that did not end well."""

    status: int
    """-n for signal n."""
    what: str
    """Who died of what, in words."""

    @property
    def may_pass(self) -> bool:
        return self.status < 0 or self.status in (OUTSIDE_FAILURE, LOST_PEER)

    @property
    def exit_status(self) -> int:
        return self.status if self.status > 0 else 128 - self.status


def keep_running(
    attempt: Callable[[int], Death | None], *, restarts: int, stopping: Callable[[], bool] = lambda: False
) -> int:
    """Makes attempts until one ends well, or ends in a way that would not pass, or `restarts` are used up.

    Args:
      attempt: from its number, 1 at first, to how it died; None if it ended well.
      stopping: whether nothing is to be started any more.

    Returns:
      An exit status: 0, that of the last death, or 128 + n where signal n was the cause.
    """
    number = 0
    while True:
        number += 1
        death = attempt(number)
        if death is None:
            return 0
        if stopping() or not death.may_pass:
            return death.exit_status
        if number > restarts:
            if restarts:
                say(f"no restart is left of {restarts}")
            return death.exit_status
        say(f"restart {number} of {restarts}")


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
