"""The strategies by name.

Invariant: a layout that contradicts itself is refused before any device is asked.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from parallelism.mesh import MeshStrategy
from parallelism.pmap import Pmap
from parallelism.single import Single
from parallelism.strategy import Layout, State, Strategy

STRATEGIES = ("single", "pmap", "mesh")


def get_strategy(
    layout: Layout, init_state: Callable[[], State], axes: State, devices: Sequence[Any] | None = None
) -> Strategy:
    """The strategy that a layout names.

    Args:
      layout: what the user asked for.
      init_state: makes the first state; traced, so that the state is born sharded.
      axes: the tree of a state with a PartitionSpec of logical names for each array.
      devices: those of the run; by default all that are visible. Those of a topology that is not here can be lowered
        for, and nothing can run.

    Raises:
      ValueError: the layout is not known, contradicts itself, or does not fit the devices, the batch or the model.
    """
    name = layout.strategy
    if name not in STRATEGIES:
        raise ValueError(f"strategy={name!r} is not one of {', '.join(STRATEGIES)}; try mesh")
    if name != "mesh" and layout.mesh:
        raise ValueError(f"mesh={layout.mesh!r} needs strategy mesh, not {name}; add --strategy mesh")
    if name != "mesh" and layout.rules != "default":
        raise ValueError(f"rules={layout.rules!r} needs strategy mesh, not {name}; add --strategy mesh")
    if name == "single":
        return Single(init_state, layout, (devices or jax.local_devices())[0])
    if name == "pmap":
        return Pmap(init_state, layout, devices)
    return MeshStrategy(init_state, axes, layout, devices or jax.devices())
