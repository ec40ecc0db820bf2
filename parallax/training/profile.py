"""A trace of a few steps, for TensorBoard or Perfetto.

Invariant: at most one trace a run, of steps after compilation.
"""

from pathlib import Path

import jax

SKIPPED, TRACED = 3, 5


class Profiler:
    """Observes a run and traces five of its steps into `folder`, or fewer when the run ends before."""

    def __init__(self, folder: Path, start: int):
        self._folder, self._first = folder, start + SKIPPED
        self._running = False

    def step(self, step: int, metrics: dict) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self._first + TRACED:
            self.close()

    def row(self, row: dict) -> None:
        pass

    def close(self) -> None:
        """Writes the trace if one is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
