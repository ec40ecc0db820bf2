"""Everything on one device.

Invariant: this is the reference; the other strategies compute what it computes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from parallelism import reduction
from parallelism.hosts import StopRequest
from parallelism.rows import Batch, check_dealing
from parallelism.strategy import Layout, Part, State, everything, make_state


class Single:
    """The first visible device, however many there are."""

    is_writer = True
    length_parts = 1

    def __init__(self, init_state: Callable[[], State], layout: Layout, device: Any):
        if jax.process_count() > 1:
            raise ValueError(
                f"strategy=single runs in one process and not in {jax.process_count()}; try --strategy mesh"
            )
        check_dealing(layout.batch_size, 1, layout.accumulate, "devices")
        exact = layout.reduction == "exact"
        self.gradients = reduction.exact() if exact else reduction.mean(layout.accumulate)
        self._init_state = init_state
        self.devices = [device]
        self._device = jax.sharding.SingleDeviceSharding(device)
        self.stop_requested = StopRequest()

    @property
    def mesh_shape(self) -> Mapping[str, int]:
        return {"device": 1}

    def describe(self) -> str:
        return f"single: 1 of {jax.device_count()} {self.devices[0].device_kind} devices"

    def rows(self, batch_size: int) -> np.ndarray:
        return np.arange(batch_size)

    def init(self, part: Part = everything) -> State:
        return make_state(self._init_state, self._device, part)

    def compile(self, step: Callable) -> jax.stages.Wrapped:
        return jax.jit(step, donate_argnums=0)

    def lower(self, step: Callable, batch: Batch) -> jax.stages.Lowered:
        return self.compile(step).lower(self.abstract(), batch)

    def compile_evaluation(self, evaluate: Callable) -> Callable[[Any, Batch], Any]:
        compiled = jax.jit(evaluate)
        return lambda params, batch: compiled(params, self.put_batch(batch))

    def put_batch(self, batch: Batch) -> Any:
        return jax.device_put(batch, self._device)

    def canonical(self, state: State) -> State:
        return state

    def abstract(self) -> State:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._device),
            jax.eval_shape(self._init_state),
        )

    def adopt(self, canonical: State) -> State:
        return canonical
