"""One program over a `jax.sharding.Mesh`; the compiler inserts the communication.

Invariant: every array lies as the rules say, from birth. The whole state is never on one device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from parallax import axes
from parallelism import reduction
from parallelism.hosts import StopRequest
from parallelism.rules import MESH_AXES, RULE_SETS, Rules, check_rules, partition_spec
from parallelism.strategy import Batch, State, deal_rows


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """Axis sizes from text like "data=2,fsdp=4"; "" means every device along data, "all" whatever is left.

    Raises:
      ValueError: an axis is unknown or repeated, a size is not a positive number, or the product is not `devices`.
    """
    sizes: dict[str, int] = {}
    wild = None
    for part in (text or "data=all").split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in MESH_AXES:
            raise ValueError(f"mesh={text!r} has unknown axis {axis!r}; known are {', '.join(MESH_AXES)}")
        if axis in sizes:
            raise ValueError(f"mesh={text!r} gives {axis} twice; give each axis once")
        if size == "all" and wild is None:
            wild, size = axis, "1"
        if not size.isdecimal() or int(size) < 1:
            remedy = f"{axis}={1 if '=all' in text else 'all'}"
            raise ValueError(f"mesh={text!r} needs a positive number for {axis}, not {size!r}; try {remedy}")
        sizes[axis] = int(size)
    if wild:
        sizes[wild] = max(1, devices // math.prod(sizes.values()))
    if math.prod(sizes.values()) != devices:
        raise ValueError(
            f"mesh={text!r} needs {math.prod(sizes.values())} devices but {devices} are visible; "
            f"try --mesh data={devices}"
        )
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


class MeshPlacement:
    """Binds the model's logical axes to one mesh and one rule set."""

    def __init__(self, mesh: Mesh, rules: Rules):
        self.mesh = mesh
        self.rules = check_rules(rules)

    def sharding(self, names: axes.Names, shape: Sequence[int]) -> NamedSharding:
        return NamedSharding(self.mesh, partition_spec(names, shape, self.rules, self.mesh.shape))

    def constrain(self, x: jax.Array, names: axes.Names) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, self.sharding(names, x.shape))

    def local(self, fn: Callable, in_names: Sequence[axes.Names], out_names: axes.Names) -> Callable:
        def on_shards(*shards):
            with axes.bound(None):
                return fn(*shards)

        def split(*arrays):
            in_specs = tuple(
                self.sharding(names, x.shape).spec for names, x in zip(in_names, arrays, strict=True)
            )
            # What fn returns is known only inside shard_map; a size that any mesh divides asks for the rule alone.
            out_spec = self.sharding(out_names, [self.mesh.size] * len(out_names)).spec
            return jax.shard_map(on_shards, mesh=self.mesh, in_specs=in_specs, out_specs=out_spec)(*arrays)

        return split


class MeshStrategy:
    """State and batch sharded over a mesh by a rule set."""

    is_writer = True

    def __init__(
        self,
        init_state: Callable[[], State],
        state_axes: State,
        mesh: str = "",
        accumulate: int = 1,
        rules: Rules = RULE_SETS["default"],
    ):
        self.gradients = reduction.mean(accumulate)
        self._accumulate = accumulate
        self._init_state = init_state
        sizes = parse_mesh(mesh, jax.device_count())
        types = (AxisType.Auto,) * len(sizes)
        self._mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
        self.devices = list(self._mesh.devices.flat)
        self._placement = MeshPlacement(self._mesh, rules)
        self._shardings = jax.tree.map(
            lambda leaf, names: self._placement.sharding(names, leaf.shape),
            jax.eval_shape(init_state),
            state_axes,
        )
        self.stop_requested = StopRequest()

    def describe(self) -> str:
        sizes = (
            ", ".join(f"{axis}={size}" for axis, size in self._mesh.shape.items() if size > 1) or "one device"
        )
        return f"mesh: {len(self.devices)} {self.devices[0].device_kind} devices as {sizes}"

    def rows(self, batch_size: int) -> np.ndarray:
        used = [axis for axis in self._placement.rules["batch"] if self._mesh.shape[axis] > 1]
        devices = math.prod(self._mesh.shape[axis] for axis in used)
        return deal_rows(batch_size, devices, self._accumulate, "×".join(used) or "devices")

    def init(self) -> State:
        return jax.jit(self._init_state, out_shardings=self._shardings)()

    def _bind(self, function: Callable) -> Callable:
        def bound(
            *arguments,
        ):  # a fresh closure: jit caches traces by function, and knows nothing of what is bound
            with axes.bound(self._placement):
                return function(*arguments)

        return bound

    def compile(self, step: Callable) -> jax.stages.Wrapped:
        whole = NamedSharding(self._mesh, PartitionSpec())
        return jax.jit(self._bind(step), donate_argnums=0, out_shardings=(self._shardings, whole))

    def lower(self, step: Callable, batch: Batch) -> jax.stages.Lowered:
        placed = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._batch_sharding(x))
            for name, x in batch.items()
        }
        return self.compile(step).lower(self.abstract(), placed)

    def compile_evaluation(self, evaluate: Callable) -> Callable[[Any, Batch], Any]:
        compiled = jax.jit(self._bind(evaluate))
        return lambda params, batch: compiled(params, self.put_batch(batch))

    def put_batch(self, batch: Batch) -> Any:
        return {name: jax.device_put(x, self._batch_sharding(x)) for name, x in batch.items()}

    def _batch_sharding(self, x: np.ndarray) -> NamedSharding:
        return self._placement.sharding(("batch", "length")[: x.ndim], x.shape)

    def canonical(self, state: State) -> State:
        return state

    def abstract(self) -> State:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self._init_state),
            self._shardings,
        )

    def adopt(self, canonical: State) -> State:
        return canonical
