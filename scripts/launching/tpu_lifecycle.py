"""The life of a Cloud TPU: it is created, however long that takes, and deleted, whatever happens.

Invariant: nothing is created beside a node that is left over, and "deleted" is said only of what is seen to be gone.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from scripts.launching.gcloud import INCOMPLETE, GcloudError, Node, Tpu, find_node, find_queued, run

Found = TypeVar("Found")

LONGEST_PAUSE = 900
"""Seconds between two requests for a TPU that is not to be had."""
DELETIONS = 6
"""How often a deletion is tried."""


@dataclasses.dataclass(frozen=True)
class Keeper:
    """Creates and deletes one TPU.

    Args:
      say: takes a line for the person who watches.
      poll: seconds between two looks at something that is under way.
      pause: seconds before a request is repeated, at first; doubled every time.
    """

    tpu: Tpu
    say: Callable[[str], None]
    poll: float = 15.0
    pause: float = 30.0

    def ensure(self) -> Node:
        """Returns the node once it is ready: the one that is there, else a new one.

        Raises:
          ValueError: there is one of another kind, or one that was stopped.
          GcloudError: it is not to be had, for a reason that will not pass.
        """
        while True:
            node = self._ask(find_node)
            if node is not None:
                self._require_same(node)
                if node.state == INCOMPLETE and self._ask(find_queued) not in ("ACTIVE", None):
                    node = None  # the queued resource is at work on it
            if node is not None and node.ready:
                return node
            if node is not None and node.lost:
                self.say(f"{self.tpu.name} is {node.state}; deleting it before another is created")
                self.delete()
                node = None
            if node is None:
                self._create()
            else:
                self.say(f"{self.tpu.name} is {node.state}")
            time.sleep(self.poll)

    def delete(self) -> list[str]:
        """Deletes the nodes and the queued resource, each whatever becomes of the others; what there was to delete.

        Raises GcloudError if one of them may still be there.
        """
        parts = {f"queued resource {self.tpu.name}": (find_queued, self.tpu, self.tpu.delete_queued())}
        parts |= {f"TPU {node.name}": (find_node, node, node.delete()) for node in self.tpu.nodes()}
        deleted: dict[str, None] = {}
        tries_left, pauses = DELETIONS, self._pauses()
        while True:
            trouble, tries_left = None, tries_left - 1
            for what, (find, tpu, argv) in parts.items():
                try:
                    if find(tpu) is not None:
                        run(argv)
                        deleted[what] = None
                        if find(tpu) is not None:
                            trouble = GcloudError(argv, 0, "ERROR: it is still there afterwards")
                except GcloudError as error:
                    trouble = error
            if trouble is None:
                return list(deleted)
            if not tries_left:
                raise trouble
            self.say(f"{trouble}; trying again to delete")
            time.sleep(next(pauses))

    def _create(self) -> None:
        """Asks until it is granted; the node is then there or, if queued, soon will be."""
        for pause in self._pauses():
            try:
                if not self.tpu.queued:
                    self.say(f"creating {self.tpu.accelerator} {self.tpu.name} in {self.tpu.zone}")
                    run(self.tpu.create())
                    return
                if self._ask(find_queued) is None:
                    self.say(f"queueing for {self.tpu.accelerator} {self.tpu.name} in {self.tpu.zone}")
                    run(self.tpu.create())
                if self._granted():
                    return
                reason = "the queued resource came to nothing"
            except GcloudError as error:
                if not error.may_pass:
                    raise
                reason = str(error)
            self.say(f"{reason}; trying again in {pause:.0f} s")
            self.delete()  # a request that failed may leave a node behind
            time.sleep(pause)

    def _granted(self) -> bool:
        """Waits while the queued resource is in the queue: whether it got a node."""
        said = None
        while True:
            state = self._ask(find_queued)
            if state == "ACTIVE":
                return True
            if state in (None, "FAILED", "SUSPENDING", "SUSPENDED", "DELETING"):
                return False
            if state != said:
                self.say(f"queued resource {self.tpu.name} is {state}")
                said = state
            time.sleep(self.poll)

    def _ask(self, find: Callable[[Tpu], Found]) -> Found:
        """What there is, however long the network is away."""
        while True:
            try:
                return find(self.tpu)
            except GcloudError as error:
                if not error.may_pass:
                    raise
                self.say(f"{error}; asking again in {self.pause:.0f} s")
            time.sleep(self.pause)

    def _require_same(self, node: Node) -> None:
        name = self.tpu.name
        if node.accelerator and node.accelerator != self.tpu.accelerator:
            raise ValueError(
                f"--accelerator {self.tpu.accelerator} is not {node.accelerator}, which TPU {name} is; "
                f"give --accelerator {node.accelerator}, or another --name"
            )
        if node.state in ("STOPPED", "STOPPING", "HIDDEN", "HIDING"):
            raise ValueError(
                f"TPU {name} is {node.state}, not READY; delete it with launch.py down, or give another --name"
            )

    def _pauses(self) -> Iterator[float]:
        pause = self.pause
        while True:
            yield min(pause, LONGEST_PAUSE)
            pause *= 2
