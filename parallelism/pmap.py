"""Data parallelism by `jax.pmap`: the state replicated, the batch dealt over devices, gradients averaged.

Invariant: replicas stay equal, since each applies the same averaged gradient to the same state. The state has no device
dim: what a device holds is its replica, and nothing is copied for an evaluation, a save or a restore.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from parallax import axes
from parallelism import reduction
from parallelism.hosts import StopRequest
from parallelism.rows import Batch, RowBlocks, check_canonical, check_dealing
from parallelism.strategy import Layout, Part, State, everything, make_state

AXIS = "batch"


class Pmap:
    """One replica of the state a device. pmap sees this process's devices alone: of a batch [local devices, ...]."""

    length_parts = 1

    def __init__(self, init_state: Callable[[], State], layout: Layout, devices: Sequence[Any] | None = None):
        self._init_state = init_state
        # One order for rows, replicas and the mapped axis, in which the devices of a process are neighbours, as pmap
        # needs them. In jax.devices() they need not be.
        self.devices = sorted(devices or jax.devices(), key=lambda device: device.process_index)
        local = [device for device in self.devices if device.process_index == jax.process_index()]
        self._local = len(local)
        count = len(self.devices)
        if layout.reduction == "exact":
            check_canonical(layout.batch_size, count, "devices")
            self.gradients = reduction.exact(AXIS, count)
        else:
            check_dealing(layout.batch_size, count, layout.accumulate, "devices")
            self.gradients = reduction.pmean(AXIS, layout.accumulate)
        self._split, self._whole = _shardings(self.devices)
        self._local_split, self._local_whole = _shardings(local)
        self._blocks = RowBlocks(self._split, count)
        self.is_writer = jax.process_index() == 0
        self.stop_requested = StopRequest()

    @property
    def mesh_shape(self) -> Mapping[str, int]:
        return {AXIS: len(self.devices)}

    def describe(self) -> str:
        hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        return f"pmap: {len(self.devices)} {self.devices[0].device_kind} devices{hosts}, state replicated"

    def rows(self, batch_size: int) -> np.ndarray:
        return self._blocks.rows(batch_size)

    def init(self, part: Part = everything) -> State:
        return make_state(self._init_state, self._local_whole, part)

    def compile(self, step: Callable) -> jax.stages.Wrapped:
        def on_one_device(state, batch):
            with axes.bound(None):
                return step(state, batch)

        return jax.pmap(
            on_one_device, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=self.devices
        )

    def lower(self, step: Callable, batch: Batch) -> jax.stages.Lowered:
        count = len(self.devices)
        # All hosts' devices of a topology count as those of this process, which is alone.
        local = self._local if jax.process_count() > 1 else count
        state = jax.eval_shape(self._init_state)
        dealt = {
            name: jax.ShapeDtypeStruct((local, x.shape[0] // count, *x.shape[1:]), x.dtype) for name, x in batch.items()
        }
        return self.compile(step).lower(state, dealt)

    def compile_evaluation(self, evaluate: Callable) -> Callable[[Any, Batch], Any]:
        compiled = jax.jit(evaluate, out_shardings=self._whole)
        return lambda params, batch: compiled(params, self._blocks.place(batch, lambda shape: self._split))

    def put_batch(self, batch: Batch) -> Any:
        dealt = {name: x.reshape(self._local, x.shape[0] // self._local, *x.shape[1:]) for name, x in batch.items()}
        return jax.device_put(dealt, self._local_split)

    def canonical(self, state: State) -> State:
        return _regroup(state, self._whole)

    def abstract(self) -> State:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._whole),
            jax.eval_shape(self._init_state),
        )

    def adopt(self, canonical: State) -> State:
        return _regroup(canonical, self._local_whole)


def _shardings(devices: list[Any]) -> tuple[NamedSharding, NamedSharding]:
    """Split along dim 0 over these devices, and whole on each."""
    mesh = Mesh(np.array(devices), (AXIS,))
    return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())


def _regroup(tree: Any, sharding: NamedSharding) -> Any:
    """The same buffers as arrays over other devices: those of this process, or those of all. Nothing is copied."""

    def regrouped(x: jax.Array) -> jax.Array:
        buffers = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, buffers)

    return jax.tree.map(regrouped, tree)
