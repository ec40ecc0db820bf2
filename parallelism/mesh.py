"""One program over a `jax.sharding.Mesh`; the compiler inserts the communication.

Invariant: every array is sharded as the rules say, from birth. The whole state is never on one device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from parallax import axes
from parallelism import reduction
from parallelism.gathers import OnShards, ShardPlacement
from parallelism.hosts import StopRequest
from parallelism.mesh_shape import choose_mesh, count_slices, lay_out, parse_mesh, show_mesh
from parallelism.rows import Batch, RowBlocks, check_canonical, check_dealing
from parallelism.rules import (
    Rules,
    check_activations,
    check_experts,
    check_used,
    crosses_slices,
    in_parts,
    load_rules,
    partition_spec,
    split_by,
)
from parallelism.strategy import Layout, Part, State, everything, make_state

RAGGED = ("TPU v5", "TPU v5p")
"""Kinds of devices for which libtpu compiles a ragged all-to-all. Those of v5e it refuses, for their limited routing;
others were not tried."""


class MeshPlacement(axes.Placement):
    """Binds the model's logical axes to one mesh and one rule set.

    Args:
      mapped: axes of the mesh over which a `shard_map` is under way: the rules hold for what is left.
      exact: whether the same bits are promised on all layouts.
    """

    def __init__(self, mesh: Mesh, rules: Rules, mapped: Sequence[str] = (), exact: bool = False):
        self.rules = in_parts(rules, mesh.axis_names)
        self.ragged = mesh.devices.flat[0].device_kind in RAGGED
        self._mesh, self._mapped, self._exact = mesh, mapped, exact
        self._sizes = {axis: size for axis, size in mesh.shape.items() if axis not in mapped}

    def spec(self, names: axes.Names, shape: Sequence[int]) -> PartitionSpec:
        return partition_spec(names, shape, self.rules, self._sizes)

    def sharding(self, names: axes.Names, shape: Sequence[int]) -> NamedSharding:
        return NamedSharding(self._mesh, self.spec(names, shape))

    def constrain(self, x: jax.Array, names: axes.Names) -> jax.Array:
        # Inside shard_map the mesh is that of the context, which knows what is mapped.
        where = self.spec if self._mapped else self.sharding
        return jax.lax.with_sharding_constraint(x, where(names, x.shape))

    def local(self, fn: Callable, in_names: Sequence[axes.Names], out_names: axes.Names, *, checked: bool) -> Callable:
        # What fn returns is known only inside shard_map; a size that any mesh divides asks for the rule alone.
        out_spec = self.spec(out_names, [self._mesh.size] * len(out_names))
        named = {name for names in (*in_names, out_names) for name in names if name}
        split = {name: tuple(split_by(name, self.rules, self._sizes)) for name in named}
        over = tuple(axis for axis in self._sizes if any(axis in each for each in split.values()))
        where = {"mesh": None if self._mapped else self._mesh, "axis_names": set(self._sizes)}
        checked = checked and not self._mapped  # JAX loses track of what it keeps of a shard_map within another

        def call(*arrays):
            in_specs = tuple(
                PartitionSpec() if x is None else self.spec(names, x.shape)
                for names, x in zip(in_names, arrays, strict=True)
            )

            def on_shards(*shards):
                if checked:  # so that gradients of what is whole are added up once, behind fn and no loop in it
                    shards = (_vary(x, over, spec) for x, spec in zip(shards, in_specs, strict=True))
                with axes.bound(OnShards(split, self.ragged)):
                    return fn(*shards)

            run = jax.shard_map(on_shards, in_specs=in_specs, out_specs=out_spec, check_vma=checked, **where)
            return run(*arrays)

        return call

    def alike(self, fn: Callable) -> Callable:
        if not self._exact:
            return fn
        whole = PartitionSpec()
        return jax.shard_map(fn, mesh=self._mesh, in_specs=whole, out_specs=whole, check_vma=False)


class MeshStrategy:
    """State and batch sharded over a mesh by a rule set."""

    def __init__(self, init_state: Callable[[], State], state_axes: State, layout: Layout, devices: Sequence[Any]):
        self._init_state = init_state
        rules, shapes = load_rules(layout.rules), jax.eval_shape(init_state)
        self._why = ""
        if layout.mesh == "auto":
            sizes, self._why = choose_mesh(devices, rules, shapes, state_axes, layout)
        else:
            sizes = parse_mesh(layout.mesh, len(devices), devices[0].platform, count_slices(devices))
        check_used(in_parts(rules, list(sizes)), sizes)
        check_experts(sizes, state_axes)
        # An axis of one device splits nothing; without it there is no collective over a group of one.
        sizes = {axis: size for axis, size in sizes.items() if size > 1} or {"data": 1}
        self._mesh = Mesh(lay_out(devices, sizes), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        self.devices = list(self._mesh.devices.flat)
        self._placement, self._rules = MeshPlacement(self._mesh, rules, exact=layout.reduction == "exact"), rules
        rules = self._placement.rules
        self._shardings = jax.tree.map(
            lambda leaf, names: self._placement.sharding(names, leaf.shape), shapes, state_axes
        )
        check_activations(rules, sizes)
        over = split_by("batch", rules, sizes)
        parts, what = math.prod(over.values()), "×".join(over) or "devices"
        self._rows_spec = PartitionSpec(tuple(over) or None)
        if layout.reduction == "exact":
            self.gradients = self._exact(over, layout, what)
        else:
            check_dealing(layout.batch_size, parts, layout.accumulate, what)
            # Then a device needs nothing of the others but parameters, a layer at a time.
            rows_alone = set(over) == set(sizes) and not split_by("layers", rules, sizes)
            slices = tuple(axis for axis in over if crosses_slices(axis))
            if rows_alone:
                self.gradients = self._by_shards(over, layout)
            elif slices and not self._splits_parameters(slices):
                self.gradients = self._by_slices(slices, layout)
            else:
                self.gradients = reduction.mean(layout.accumulate)
        self.length_parts = pieces = math.prod(split_by("length", rules, sizes).values())
        if layout.seq_len % pieces:
            raise ValueError(
                f"seq_len={layout.seq_len} must be divisible by {pieces}, the devices that share a sequence; "
                f"try --seq-len {layout.seq_len + -layout.seq_len % pieces}"
            )
        self._blocks = RowBlocks(NamedSharding(self._mesh, self._rows_spec), parts)
        self.is_writer = jax.process_index() == 0
        self.stop_requested = StopRequest()

    def _exact(self, over: dict[str, int], layout: Layout, what: str) -> Callable[[Callable], Callable]:
        """Exact reduction on whole parameters, a device at a time; what comes back is whole on every device."""
        for axis, size in self._mesh.shape.items():
            if axis not in over and size > 1:
                raise ValueError(
                    f"reduction=exact adds up whole gradients, and {axis}={size} splits each of them among devices "
                    f"that round on their own; try --mesh data={self._mesh.size}, or --reduction mean"
                )
        parts = math.prod(over.values())
        check_canonical(layout.batch_size, parts, what)
        of_rows = reduction.exact(tuple(over), parts)

        def gradients(loss_fn: Callable) -> Callable:
            checked = _is_checkable(loss_fn)

            def on_device(params, batch, key):
                if checked:  # else JAX would give the sum of the gradients of all devices
                    params = jax.tree.map(lambda x: _vary(x, tuple(over)), params)
                with axes.bound(None):
                    return of_rows(loss_fn)(params, batch, key)

            whole = PartitionSpec()
            specs = (whole, self._rows_spec, whole)
            return jax.shard_map(on_device, mesh=self._mesh, in_specs=specs, out_specs=whole, check_vma=checked)

        return gradients

    def _by_shards(self, over: dict[str, int], layout: Layout) -> Callable[[Callable], Callable]:
        """Each device takes the gradient of its own rows; it holds, and gets back, its shards of each parameter."""
        specs = jax.tree.map(lambda sharding: sharding.spec, self._shardings.params)
        unreduced = jax.tree.map(lambda spec: tuple(axis for axis in over if axis not in _flat(spec)), specs)
        of_rows = reduction.scatter(tuple(over), unreduced, layout.accumulate)
        placement = ShardPlacement(self._placement.rules, self._mesh.shape, self._placement.ragged)

        def gradients(loss_fn: Callable) -> Callable:
            checked = _is_checkable(loss_fn)

            def on_device(params, batch, key):
                if checked:  # else JAX would add up the gradients of each layer and microbatch among all devices
                    params = jax.tree.map(_vary, params, unreduced)
                with axes.bound(placement):
                    return of_rows(loss_fn)(params, batch, key)

            whole = PartitionSpec()
            given, found = (specs, self._rows_spec, whole), (whole, whole, reduction.of_learned(loss_fn, specs))
            return jax.shard_map(on_device, mesh=self._mesh, in_specs=given, out_specs=found, check_vma=checked)

        return gradients

    def _splits_parameters(self, mesh_axes: Sequence[str]) -> bool:
        specs = [_flat(sharding.spec) for sharding in jax.tree.leaves(self._shardings.params)]
        return any(axis in spec for spec in specs for axis in mesh_axes)

    def _by_slices(self, slices: tuple[str, ...], layout: Layout) -> Callable[[Callable], Callable]:
        """Each slice takes the gradient of its own rows, as if it were alone; what it sends to others is shards."""
        placement = MeshPlacement(self._mesh, self._rules, mapped=slices)
        within = {axis: size for axis, size in self._mesh.shape.items() if axis not in slices}
        shapes = jax.eval_shape(self._init_state).params
        specs = jax.tree.map(lambda sharding: sharding.spec, self._shardings.params)
        shards = jax.tree.map(lambda leaf, spec: _spread(spec, leaf.shape, within), shapes, specs)
        of_rows = reduction.slices(slices, shards, specs, layout.accumulate)

        def gradients(loss_fn: Callable) -> Callable:
            def on_slice(params, batch, key):
                with axes.bound(placement):
                    return of_rows(loss_fn)(params, batch, key)

            whole, rows = PartitionSpec(), PartitionSpec(slices)
            return jax.shard_map(
                on_slice,
                mesh=self._mesh,
                in_specs=(whole, rows, whole),
                out_specs=whole,
                axis_names=set(slices),
                check_vma=False,  # as within, see MeshPlacement.local
            )

        return gradients

    @property
    def mesh_shape(self) -> Mapping[str, int]:
        return self._mesh.shape

    def describe(self) -> str:
        shape = (show_mesh(self._mesh.shape) or "data=1").replace(",", ", ")
        hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        kind = f"{len(self.devices)} {self.devices[0].device_kind} devices{hosts}"
        return f"mesh: {kind} as {shape}" + (f" ({self._why})" if self._why else "")

    def rows(self, batch_size: int) -> np.ndarray:
        return self._blocks.rows(batch_size)

    def init(self, part: Part = everything) -> State:
        return make_state(self._init_state, self._shardings, part)

    def _bind(self, function: Callable) -> Callable:
        def bound(*arguments):  # a fresh closure: jit caches traces by function, and knows nothing of what is bound
            with axes.bound(self._placement):
                return function(*arguments)

        return bound

    def compile(self, step: Callable) -> jax.stages.Wrapped:
        whole = NamedSharding(self._mesh, PartitionSpec())
        return jax.jit(self._bind(step), donate_argnums=0, out_shardings=(self._shardings, whole))

    def lower(self, step: Callable, batch: Batch) -> jax.stages.Lowered:
        placed = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._batch_sharding(x.shape))
            for name, x in batch.items()
        }
        return self.compile(step).lower(self.abstract(), placed)

    def compile_evaluation(self, evaluate: Callable) -> Callable[[Any, Batch], Any]:
        whole = NamedSharding(self._mesh, PartitionSpec())
        compiled = jax.jit(self._bind(evaluate), out_shardings=whole)
        return lambda params, batch: compiled(params, self.put_batch(batch))

    def put_batch(self, batch: Batch) -> Any:
        return self._blocks.place(batch, self._batch_sharding)

    def _batch_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        return self._placement.sharding(("batch", "length")[: len(shape)], shape)

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


def _flat(spec: PartitionSpec) -> list[str]:
    """The mesh axes that a spec names."""
    return [axis for part in spec for axis in (part if isinstance(part, tuple) else (part,)) if axis]


def _spread(spec: PartitionSpec, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """The spec with the axes that it leaves out on one dim more, where a dim can be cut so."""
    unused = tuple(axis for axis in sizes if axis not in _flat(spec))
    parts = [*spec, *(None,) * (len(shape) - len(spec))]
    for dim, (part, size) in enumerate(zip(parts, shape, strict=True)):
        axes_of_dim = (*_flat(PartitionSpec(part)), *unused)
        if size % math.prod(sizes[axis] for axis in axes_of_dim) == 0:
            return PartitionSpec(*parts[:dim], axes_of_dim or None, *parts[dim + 1 :])
    return spec


def _is_checkable(loss_fn: Callable) -> bool:
    """Whether JAX can follow what differs between devices, and refuse a sum that is missing: not through kernels."""
    return not getattr(loss_fn, "has_kernels", False)


def _vary(x: Any, over: Sequence[str], spec: PartitionSpec = PartitionSpec()) -> Any:
    """A real array inside shard_map, known as different along the axes `over`, as it is along those of its spec."""
    if x is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jax.lax.pcast(x, tuple(axis for axis in over if axis not in _flat(spec)), to="varying")
