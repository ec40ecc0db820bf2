"""What a strategy is, and how one is had by name.

Invariant: whoever holds a Strategy needs to know nothing of devices. State and batch go in and come out of it; outside
it there are only canonical arrays: global, with no device dim.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

from parallelism.hosts import StopRequest

STRATEGIES = ("single", "pmap", "mesh")

State: TypeAlias = Any
Batch = dict[str, np.ndarray]


class Strategy(Protocol):
    """Where a step runs and how its gradients are combined."""

    gradients: Callable[[Callable], Callable]
    """The gradient function for the step: loss_fn -> (params, batch, key) -> (sums, tokens, averaged gradient)."""
    devices: list[Any]
    """Those that the step runs on."""
    is_writer: bool
    """Whether this process writes the files that all processes share."""
    stop_requested: StopRequest
    """Called with a step: whether all processes agreed to stop after it."""

    def describe(self) -> str:
        """One line for a person: the devices and how they are arranged."""
        ...

    def rows(self, batch_size: int) -> np.ndarray:
        """Which rows of a global batch this process holds. Raises ValueError when they cannot be dealt evenly."""
        ...

    def init(self) -> State:
        """The first state, born in its place."""
        ...

    def compile(self, step: Callable) -> jax.stages.Wrapped:
        """The step, (state, batch) -> (state, metrics), on placed state and batch; it donates the state."""
        ...

    def lower(self, step: Callable, batch: Batch) -> jax.stages.Lowered:
        """The step of `compile` from shapes alone, to be compiled and looked at; nothing is computed."""
        ...

    def compile_evaluation(self, evaluate: Callable) -> Callable[[Any, Batch], Any]:
        """A function of canonical parameters and a host batch."""
        ...

    def put_batch(self, batch: Batch) -> Any:
        """This process's rows onto its devices."""
        ...

    def canonical(self, state: State) -> State:
        """The state as global arrays with no device dim: what checkpoints, hashes and evaluation see."""
        ...

    def abstract(self) -> State:
        """The canonical state as ShapeDtypeStructs with shardings, to restore onto."""
        ...

    def adopt(self, canonical: State) -> State:
        """A canonical state, placed for the step; the canonical one must not be used again."""
        ...


def get_strategy(
    name: str, init_state: Callable[[], State], axes: State, *, mesh: str = "", accumulate: int = 1
) -> Strategy:
    """The strategy called `name`.

    Args:
      name: one of STRATEGIES.
      init_state: makes the first state; traced, so that the state is born sharded.
      axes: the tree of a state with a PartitionSpec of logical names for each array.
      mesh: for "mesh", axis sizes like "data=2,fsdp=4"; empty means every device along data.
      accumulate: microbatches a step.

    Raises:
      ValueError: the name or the mesh is not known, or does not fit the devices.
    """
    if name != "mesh" and mesh:
        raise ValueError(f"mesh={mesh!r} needs strategy mesh, not {name}; add --strategy mesh")
    if name == "single":
        from parallelism.single import Single

        return Single(init_state, accumulate)
    if name == "pmap":
        from parallelism.pmap import Pmap

        return Pmap(init_state, accumulate)
    if name == "mesh":
        from parallelism.mesh import MeshStrategy

        return MeshStrategy(init_state, axes, mesh, accumulate)
    raise ValueError(f"strategy={name!r} is not one of {', '.join(STRATEGIES)}; try mesh")


def deal_rows(batch_size: int, devices: int, accumulate: int, what: str) -> np.ndarray:
    """All rows of a batch, when each of `devices` gets the same number in each microbatch.

    Raises:
      ValueError: they cannot be dealt evenly.
    """
    if batch_size % (devices * accumulate):
        parts = f"{what}={devices}" + (f" × accumulate={accumulate}" if accumulate > 1 else "")
        near = devices * accumulate * max(1, round(batch_size / (devices * accumulate)))
        raise ValueError(f"batch_size={batch_size} must be divisible by {parts}; try --batch-size {near}")
    return np.arange(batch_size)
