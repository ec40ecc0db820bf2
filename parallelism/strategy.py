"""What a strategy is.

Invariant: whoever holds a Strategy needs to know nothing of devices. State and batch go in and come out of it; outside
it there are only canonical arrays: global, with no device dim.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

from parallelism.hosts import StopRequest
from parallelism.rows import Batch

State: TypeAlias = Any
"""A dataclass of arrays, with the parameters in its field `params`."""
Part: TypeAlias = Callable[[State], Any]
"""What is taken of a state, whether of arrays or of their shardings."""


def everything(state: State) -> State:
    """All of a state."""
    return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is placed over the devices, in the user's words, and the size of its batches."""

    strategy: str = "single"
    """single, pmap or mesh."""
    mesh: str = ""
    """For mesh: axis sizes like "data=2,fsdp=4", empty for every device along data, or "auto"."""
    rules: str = "default"
    """For mesh: a rule set by name, or a file of rules."""
    reduction: str = "mean"
    """mean, or exact for the same bits on every layout."""
    accumulate: int = 1
    """Microbatches a step, at least one."""
    batch_size: int
    """Rows of a global batch."""
    seq_len: int
    """Tokens of a row."""

    def __post_init__(self):
        if self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate} must be at least 1; try 1")


class Strategy(Protocol):
    """Where a step runs and how its gradients are combined."""

    gradients: Callable[[Callable], Callable]
    """The gradient function for the step: loss_fn -> (params, batch, key) -> (sums, tokens, averaged gradient)."""
    devices: list[Any]
    """Those that the step runs on, in all processes."""
    is_writer: bool
    """Whether this process writes the files that all processes share."""
    stop_requested: StopRequest
    """Whether all processes agreed to stop now."""

    length_parts: int
    """How many devices share a sequence."""

    @property
    def mesh_shape(self) -> Mapping[str, int]:
        """Sizes of the axes over which `devices` are arranged, outermost first."""
        ...

    def describe(self) -> str:
        """One line for a person: the devices and how they are arranged."""
        ...

    def rows(self, batch_size: int) -> np.ndarray:
        """Which rows of a global batch this process holds."""
        ...

    def init(self, part: Part = everything) -> State:
        """The first state, born in its place, or a part of it: what else there is takes no time or memory."""
        ...

    def compile(self, step: Callable) -> jax.stages.Wrapped:
        """The step, (state, batch) -> (state, metrics), on placed state and batch; it donates the state."""
        ...

    def lower(self, step: Callable, batch: Batch) -> jax.stages.Lowered:
        """The step of `compile` from shapes alone, of a global batch, to be compiled and looked at."""
        ...

    def compile_evaluation(self, evaluate: Callable) -> Callable[[Any, Batch], Any]:
        """A function of canonical parameters and a host batch."""
        ...

    def put_batch(self, batch: Batch) -> Any:
        """This process's rows onto its devices."""
        ...

    def canonical(self, state: State) -> State:
        """The state as global arrays: what checkpoints, hashes and evaluation see. They share its buffers."""
        ...

    def abstract(self) -> State:
        """The canonical state as ShapeDtypeStructs with shardings, to restore onto."""
        ...

    def adopt(self, canonical: State) -> State:
        """A canonical state, placed for the step in the same buffers: the canonical one must not be used again."""
        ...


def make_state(init_state: Callable[[], Any], shardings: Any, part: Part) -> Any:
    """A part of what `init_state` makes, by one compiled program whose results get the shardings.

    For CPUs it is compiled in haste, which spares every start a second: for NANO and SMALL 0.6 instead of 1.6 s, with
    the same bits and as fast. A level of optimization that XLA_FLAGS names is kept.

    Args:
      shardings: one for all, or a tree like what `init_state` makes.
    """
    level = "xla_backend_optimization_level"
    hasty = jax.default_backend() == "cpu" and level not in os.environ.get("XLA_FLAGS", "")
    placed = shardings if isinstance(shardings, jax.sharding.Sharding) else part(shardings)

    def make_part() -> Any:
        return part(init_state())

    make = init_state if part is everything else make_part  # JAX compiles a function that it knows no second time
    return jax.jit(make, out_shardings=placed, compiler_options={level: 1} if hasty else None)()
