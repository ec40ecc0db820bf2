"""Data parallelism by `jax.pmap`: the state replicated, the batch dealt over devices, gradients averaged.

Invariant: replicas stay equal, since each applies the same averaged gradient to the same state. No array with a device
dim leaves this file.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from parallax import axes
from parallelism import reduction
from parallelism.hosts import StopRequest
from parallelism.strategy import Batch, State, deal_rows

AXIS = "batch"


class Pmap:
    """One replica of the state a device."""

    is_writer = True

    def __init__(self, init_state: Callable[[], State], accumulate: int = 1):
        self.gradients = reduction.pmean(AXIS, accumulate)
        self._accumulate = accumulate
        self._init_state = init_state
        self.devices = jax.local_devices()
        mesh = Mesh(np.array(self.devices), (AXIS,))
        self._split = NamedSharding(mesh, PartitionSpec(AXIS))
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._first = jax.jit(lambda tree: jax.tree.map(lambda x: x[0], tree), out_shardings=self._whole)
        self._spread = jax.jit(functools.partial(_repeat, len(self.devices)), out_shardings=self._split)
        self.stop_requested = StopRequest()

    def describe(self) -> str:
        return f"pmap: {len(self.devices)} {self.devices[0].device_kind} devices, state replicated"

    def rows(self, batch_size: int) -> np.ndarray:
        return deal_rows(batch_size, len(self.devices), self._accumulate, "devices")

    def init(self) -> State:
        return self.adopt(jax.jit(self._init_state, out_shardings=self._whole)())

    def compile(self, step: Callable) -> jax.stages.Wrapped:
        def on_one_device(state, batch):
            with axes.bound(None):
                return step(state, batch)

        return jax.pmap(
            on_one_device, axis_name=AXIS, out_axes=(0, None), donate_argnums=0, devices=self.devices
        )

    def lower(self, step: Callable, batch: Batch) -> jax.stages.Lowered:
        state = jax.eval_shape(functools.partial(_repeat, len(self.devices)), self.abstract())
        return self.compile(step).lower(state, jax.eval_shape(self._deal, batch))

    def compile_evaluation(self, evaluate: Callable) -> Callable[[Any, Batch], Any]:
        compiled = jax.jit(evaluate)
        return lambda params, batch: compiled(params, jax.device_put(batch, self._split))

    def put_batch(self, batch: Batch) -> Any:
        return jax.device_put(self._deal(batch), self._split)

    def _deal(self, batch: Batch) -> Batch:
        count = len(self.devices)
        return {name: x.reshape(count, x.shape[0] // count, *x.shape[1:]) for name, x in batch.items()}

    def canonical(self, state: State) -> State:
        return self._first(state)

    def abstract(self) -> State:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._whole),
            jax.eval_shape(self._init_state),
        )

    def adopt(self, canonical: State) -> State:
        return self._spread(canonical)


def _repeat(count: int, tree: Any) -> Any:
    """Each leaf `count` times along a new leading dim."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), tree)
