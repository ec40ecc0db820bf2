"""What a run begins with that another learned: its first parameters, or the base beside which it learns adapters.

Invariant: a base is written once, in the run that learned it. Checkpoints of adapters name it by hash, and a run does
not go on beside another.
"""

import dataclasses
from typing import Any

from parallax.model.adapters import join, take_adapters, take_base
from parallax.run_folder import Source, read_base, read_checkpoint
from parallax.training.checkpoint import Restored
from parallax.training.state import TrainState
from scripts.training.job import Job, say


class Base:
    """The parameters that a job takes from another run."""

    def __init__(self, job: Job):
        self._strategy, self._folder, self._adapts = job.strategy, job.folder, job.flags.model.lora.rank > 0
        self._source: Source | None = None

    def describe(self) -> dict[str, Any]:
        """What config.json says of it: nothing, unless it stays frozen."""
        return {} if self._source is None else {"base": self._source._asdict()}

    def begin(self, run: str) -> TrainState:
        """The first state, with the parameters of that run's best checkpoint in it.

        Raises ValueError if it has no intact checkpoint, or one of other shapes.
        """
        # Moments and adapters begin as they do whatever the parameters.
        first = self._strategy.canonical(self._strategy.init(_all_but_base))
        params, source = read_checkpoint(run, take_base(self._strategy.abstract().params), notify=say)
        self._source = source if self._adapts else None
        say(f"from      step {source.step} of {run}")
        return self._strategy.adopt(dataclasses.replace(first, params=join(params, first.params)))

    def without(self, state: TrainState) -> TrainState:
        """What a checkpoint holds of a canonical state, with arrays or abstract: not what stays frozen."""
        return _all_but_base(state) if self._adapts else state

    def restore(self, restored: Restored) -> TrainState:
        """The canonical state of a checkpoint, with what stays frozen; raises ValueError as `read_base` does."""
        if not self._adapts:
            return restored.state
        frozen = take_base(self._strategy.abstract().params)
        base, self._source = read_base(self._folder, restored.documents["config"], frozen)
        return dataclasses.replace(restored.state, params=join(base, restored.state.params))


def _all_but_base(state: TrainState) -> TrainState:
    return dataclasses.replace(state, params=take_adapters(state.params))
