"""Everything on one device.

Invariant: this is the reference; the other strategies compute what it computes.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from parallelism import reduction
from parallelism.hosts import StopRequest
from parallelism.strategy import Batch, State, deal_rows


class Single:
    """The first visible device, however many there are."""

    is_writer = True

    def __init__(self, init_state: Callable[[], State], accumulate: int = 1):
        self.gradients = reduction.mean(accumulate)
        self._accumulate = accumulate
        self._init_state = init_state
        self.devices = jax.local_devices()[:1]
        self._device = jax.sharding.SingleDeviceSharding(self.devices[0])
        self.stop_requested = StopRequest()

    def describe(self) -> str:
        return f"single: 1 of {jax.device_count()} {self.devices[0].device_kind} devices"

    def rows(self, batch_size: int) -> np.ndarray:
        return deal_rows(batch_size, 1, self._accumulate, "devices")

    def init(self) -> State:
        return jax.jit(self._init_state, out_shardings=self._device)()

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
