"""A device that fails: a Batcher whose slots are gone after an error, as those are that a failed call was given.

Run as a program it is serve.py with such a Batcher: `python -m tests.parallax.serving.failing GATE --checkpoint …`. The
slots are made again once the file GATE is there. With "shut" in it they fail in their next step and for good.
"""

import sys
import time
from pathlib import Path

import jax

from parallax.inference.batching import Batcher
from parallax.serving import engine, process
from scripts import serve


class FailingBatcher(Batcher):
    """It fails once: in `admit` or the step after it, where the last slot is taken, or where an answer is kept."""

    fails_in = "step"
    broken = 0
    """How many attempts to make the slots again fail."""

    def admit(self, ticket, request):
        self._fail_if("admit", self.free == 1)
        return super().admit(ticket, request)

    def step(self):
        self._fail_if("step", self.free == 0)
        return super().step()

    def _keep(self, slot, running):
        self._fail_if("keep", True)
        super()._keep(slot, running)

    def rebuild(self):
        self.broken -= 1
        if self.broken >= 0:
            raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")
        super().rebuild()

    def _fail_if(self, place, now):
        if now and place == self.fails_in:
            self.fails_in = ""
            for x in jax.tree.leaves(self._slots):
                x.delete()
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.")


class GatedBatcher(FailingBatcher):
    """One that is whole again once its gate is open, and fails for good at the next step with a shut one."""

    gate = Path()

    def step(self):
        if self.gate.exists() and self.gate.read_text() == "shut":
            self.fails_in, self.broken = "step", len(engine.PAUSES)
        return super().step()

    def rebuild(self):
        while not self.gate.exists():
            time.sleep(0.01)
        super().rebuild()


if __name__ == "__main__":
    GatedBatcher.gate = Path(sys.argv.pop(1))
    engine.PAUSES = (0.0, 0.0)
    process.Batcher = GatedBatcher
    sys.exit(serve.main())
