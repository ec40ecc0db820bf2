"""Where the parameters of a model go that is used and not trained.

Invariant: the placement is that of the training strategies, by the same rules.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from parallelism.strategies import get_strategy
from parallelism.strategy import Layout


class _State(NamedTuple):
    """A state without an optimizer."""

    params: Any


def on_mesh(mesh: str) -> Callable[[Callable[[], Any], Any], Any]:
    """A function of (init, axes) to what `init` gives, as ShapeDtypeStructs with shardings; nothing is computed.

    `axes` has the tree of `init()`, with a PartitionSpec of logical names for each array. Used as
    `parallax.load(folder, mesh=on_mesh("fsdp=8"))`. Raises ValueError from that function, where the mesh does not fit
    the devices or the model.
    """

    def place(init: Callable[[], Any], axes: Any) -> Any:
        devices = jax.device_count()  # nothing is fed, so one row and token a device fits any mesh
        layout = Layout(strategy="mesh", mesh=mesh, batch_size=devices, seq_len=devices)
        return get_strategy(layout, lambda: _State(init()), _State(axes)).abstract().params

    return place
