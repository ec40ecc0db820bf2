"""Which layout TPUs or GPUs should run: every legal one is estimated, the best are compiled by the real compiler.

Invariant: a number says where it comes from. What the compiler reports replaces the estimate. A time is always an
estimate: the least by the peaks of arithmetic, memory and links, and what to expect (`step_time.py`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from parallelism.mesh_shape import CROSSING, along_torus, show_mesh
from parallelism.planning.compiler import Report, compile_step
from parallelism.planning.hardware import Machine
from parallelism.planning.hlo_collectives import RAGGED
from parallelism.planning.network import Reach, Wait, axes_of, place, waits
from parallelism.planning.step_time import Expected, Work, calibration
from parallelism.rules import ACROSS, MESH_AXES, Rules, crosses_slices, in_parts, load_rules, split_by, whole_axis
from parallelism.strategies import get_strategy
from parallelism.strategy import Layout

ROOM = 1.2
"""An estimate beyond this share of a device's memory is not worth compiling. Of 400 steps none was estimated at more
than 1.16 times what the compiler reports, but for those of less than 0.1 GiB on v5e and v5p."""


class Cost(Protocol):
    """What the model costs a device; see `parallax/model/cost.py`."""

    def product_flops(self, sizes: Mapping[str, int]) -> float: ...

    def kernel_flops(self) -> float: ...

    def model_flops(self) -> float: ...

    def expert_flops(self) -> float: ...

    def elementwise_bytes(self, sizes: Mapping[str, int]) -> float: ...

    @property
    def embed_dim(self) -> int: ...

    @property
    def num_experts(self) -> int: ...

    def temporary_bytes(self, sizes: Mapping[str, int], parameter_bytes: float, on_chip: float) -> float: ...

    def evaluation_bytes(self, sizes: Mapping[str, int], parameter_bytes: float) -> float: ...

    def sent(self, sizes: Mapping[str, int]) -> Sequence[Any]: ...

    def even_share(self, sizes: Mapping[str, int]) -> float: ...


@dataclasses.dataclass(frozen=True)
class Build:
    """What the script makes of one choice of rematerialisation, microbatches and dtype."""

    init_state: Callable[[], Any]
    axes: Any
    """The tree of a state with a PartitionSpec of logical names for each array."""
    make_step: Callable[[Callable], Callable]
    """From a strategy's gradient function to the step."""
    batch: Any
    """ShapeDtypeStructs of a global batch."""
    cost: Cost
    attention: str
    """What computes attention, for a person to read."""

    @functools.cached_property
    def state(self) -> Any:
        """ShapeDtypeStructs of the first state: many choices ask for them, and JAX takes 2 ms to give them."""
        return jax.eval_shape(self.init_state)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to run: a layout, and what of the model it changes."""

    layout: Layout
    sizes: Mapping[str, int]
    """Mesh axes to devices."""
    remat: str
    dtype: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A choice with its numbers, a device's share."""

    choice: Choice
    attention: str
    parameter_bytes: int
    optimizer_bytes: int
    estimated_bytes: float
    """State, in whole tiles, and temporaries of a step, by the analytic model."""
    evaluation_bytes: float
    """The same while a batch of the held-out text is evaluated, always by the analytic model."""
    save_bytes: float
    """The same while a checkpoint is saved. To restore one takes no more than the state."""
    flops: float
    """By the compiler where there is a report, kernels added by the analytic model."""
    wire_bytes: Mapping[str, float]
    """Along each mesh axis at even load; a collective over several axes counts along each of them."""
    sent_bytes: float
    """In all, as if the buffers in which tokens travel to experts were full: they have room for all to go one way."""
    held_bytes: float
    """In all, with what these buffers hold at even load, where all experts are used alike."""
    waits: Sequence[Wait]
    """How long each kind of collective takes, by the rates of the links."""
    report: Report | None
    compute_seconds: float
    memory_seconds: float
    link_seconds: float
    expected: Expected
    """What a step should take, with what programs reach of these peaks."""
    utilisation: float
    """Of the peak by the model's operations, in the expected time (MFU)."""

    @property
    def tokens(self) -> int:
        """Of a step, of all devices."""
        return self.choice.layout.batch_size * self.choice.layout.seq_len

    @property
    def source(self) -> str:
        """Where memory, operations and traffic come from."""
        return "compiled" if self.report and self.report.fits else "estimate"

    @property
    def peak_bytes(self) -> float:
        """Of a step."""
        return self.report.peak_bytes if self.report and self.report.fits else self.estimated_bytes

    @property
    def needed_bytes(self) -> float:
        """Of a run."""
        return max(self.peak_bytes, self.evaluation_bytes, self.save_bytes)

    def fits(self, memory_bytes: float) -> bool:
        """Whether steps fit a device, and evaluations and saves too.

        The compiler for TPUs refuses a step that does not; that for GPUs refuses none, and its peak is compared.
        """
        refused = self.report is not None and not self.report.fits
        return not refused and self.needed_bytes <= memory_bytes

    @property
    def bound(self) -> str:
        """Which of the three needs the most time."""
        return max(("compute", "memory", "links"), key=lambda name: self._seconds[name])

    @property
    def seconds(self) -> float:
        """The least a step can take: as if everything overlapped, at the peak of what binds."""
        return max(self._seconds.values())

    @property
    def _seconds(self) -> dict[str, float]:
        return {"compute": self.compute_seconds, "memory": self.memory_seconds, "links": self.link_seconds}


def legal_meshes(devices: int, fits: Callable[[Mapping[str, int]], bool], slices: int = 1) -> Iterator[dict[str, int]]:
    """Every shape over all devices that `fits` takes; slices are crossed by one axis alone."""
    across = [{axis + ACROSS: slices} for axis in CROSSING] if slices > 1 else [{}]
    for outer, within in itertools.product(across, _factors(devices // slices, len(MESH_AXES))):
        sizes = outer | dict(zip(MESH_AXES, within, strict=True))
        if fits(sizes):
            yield sizes


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as a product of so many, small ones first."""
    if count == 1:
        yield (number,)
        return
    for factor in range(1, number + 1):
        if number % factor == 0:
            for rest in _factors(number // factor, count - 1):
                yield (factor, *rest)


def estimate(choice: Choice, build: Build, accelerator: Machine, report: Report | None = None) -> Row:
    """A row, from the analytic model and, where there is one, the compiler's report."""
    cost, generation, state = build.cost, accelerator.generation, build.state
    devices = math.prod(choice.sizes.values())
    rules = in_parts(load_rules(choice.layout.rules), list(choice.sizes))
    parameters = held_bytes(state.params, build.axes.params, rules, choice.sizes)
    optimizer = held_bytes(state, build.axes, rules, choice.sizes) - parameters
    stored = tiled_size if accelerator.tiled else math.prod
    laid_out = held_bytes(state, build.axes, rules, choice.sizes, stored)
    own = held_bytes(state.params, build.axes.params, rules, choice.sizes, stored)
    evaluation = cost.evaluation_bytes(choice.sizes, own)
    temporary = estimated = cost.temporary_bytes(choice.sizes, own, generation.on_chip)
    flops, sent = cost.product_flops(choice.sizes) / devices, cost.sent(choice.sizes)
    experts = cost.expert_flops() / devices
    if report is not None and report.fits:
        # Those inside experts are in kernels on TPUs and GPUs, into which the compiler does not see.
        in_kernels = experts if report.flops < flops - experts / 2 else 0.0
        flops, sent = report.flops + in_kernels, report.traffic
        temporary = report.temporary_bytes
    allocated, share = sum(each.wire_bytes for each in sent), cost.even_share(choice.sizes)
    sent = [_filled(each, share) if each.kind == RAGGED else each for each in sent]
    kernels = cost.kernel_flops() / devices
    wire = _by_axis(sent)
    found = waits(sent, _paths(choice, accelerator))
    # State is read and written once; in each microbatch what is in use at its fullest is, and parameters are read
    # three times.
    moved = 2 * (parameters + optimizer) + choice.layout.accumulate * (2 * temporary + 3 * parameters)
    work = Work(
        matmuls=max(0.0, flops - experts) / accelerator.device_flops,
        experts=experts / accelerator.device_flops,
        num_experts=cost.num_experts,
        kernels=kernels / accelerator.device_flops,
        elementwise=cost.elementwise_bytes(choice.sizes) / accelerator.device_memory_rate,
        update=2 * (parameters + optimizer) / accelerator.device_memory_rate,
        in_layer=sum(each.seconds for each in found if each.in_layer),
        beside=sum(each.seconds for each in found if not each.in_layer),
        embed_dim=cost.embed_dim,
    )
    computing, memory = (flops + kernels) / accelerator.device_flops, moved / accelerator.device_memory_rate
    links = max([0.0, *(sum(each.seconds for each in found if axis in each.axes) for axis in wire)])
    expected = calibration().expected(work, generation.name, least=max(computing, memory, links))
    return Row(
        choice=choice,
        attention=build.attention,
        parameter_bytes=parameters,
        optimizer_bytes=optimizer,
        estimated_bytes=laid_out + estimated,
        evaluation_bytes=laid_out + evaluation,
        save_bytes=laid_out + copied_bytes(state, build.axes, rules, choice.sizes),
        flops=flops + kernels,
        wire_bytes=wire,
        sent_bytes=allocated,
        held_bytes=sum(each.wire_bytes for each in sent),
        waits=found,
        report=report,
        compute_seconds=computing,
        memory_seconds=memory,
        link_seconds=links,
        expected=expected,
        utilisation=cost.model_flops() / devices / accelerator.device_flops / expected.seconds,
    )


def held_bytes(
    arrays: Any, axes: Any, rules: Rules, sizes: Mapping[str, int], numbers: Callable[[Sequence[int]], int] = math.prod
) -> int:
    """Bytes of a device's shards of arrays with these logical axes; `numbers` says how many a shape takes."""

    def of(leaf: Any, names: Any) -> int:
        return numbers(_shard(leaf, names, rules, sizes)[0]) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of, arrays, axes)))


def copied_bytes(arrays: Any, axes: Any, rules: Rules, sizes: Mapping[str, int]) -> int:
    """Bytes of the slices that a device makes for a checkpoint: of what several hold, each of them writes a part."""

    def of(leaf: Any, names: Any) -> int:
        shard, parts = _shard(leaf, names, rules, sizes)
        replicas = math.prod(sizes.values()) // parts
        shared = replicas > 1 and any(dim % replicas == 0 for dim in shard)
        return math.prod(shard) * leaf.dtype.itemsize // replicas if shared else 0

    return sum(jax.tree.leaves(jax.tree.map(of, arrays, axes)))


def _shard(leaf: Any, names: Any, rules: Rules, sizes: Mapping[str, int]) -> tuple[list[int], int]:
    """The shape of a device's shard of an array with these logical axes, and how many different ones there are."""
    parts = [math.prod(split_by(name or "", rules, sizes).values()) for name in names]
    return [dim // part for dim, part in zip(leaf.shape, parts, strict=True)], math.prod(parts)


def _filled(sent: Any, share: float) -> Any:
    return dataclasses.replace(sent, wire_bytes=sent.wire_bytes * share)


def _by_axis(sent: Sequence[Any]) -> dict[str, float]:
    """Bytes along each mesh axis, parts within slices as one; those of a collective over several count along each."""
    sums: dict[str, float] = {}
    for each in sent:
        for axis in {whole_axis(axis): None for axis in axes_of(each)}:
            sums[axis] = sums.get(axis, 0.0) + each.wire_bytes
    return sums


def _paths(choice: Choice, accelerator: Machine) -> dict[str, tuple[Reach, ...]]:
    """Along which dims of the network each mesh axis runs, fsdp by its parts; the axis of pmap is called batch."""
    shape, dims = along_torus(choice.sizes, accelerator.network), accelerator.dims
    across = {axis: size for axis, size in shape.items() if crosses_slices(axis)}
    levels = len(across) and 1
    paths = place(across, dims[:levels])
    paths |= place({axis: size for axis, size in shape.items() if axis not in across}, dims[levels:])
    everything = tuple(reach for path in paths.values() for reach in path)
    return paths | {"batch": everything} if choice.layout.strategy == "pmap" else paths


def rank(rows: Sequence[Row], memory_bytes: float) -> list[Row]:
    """What fits first, most tokens a second first, of equals what moves less; else by how much it lacks."""

    def key(row: Row) -> tuple[bool, float, float]:
        fits = row.fits(memory_bytes)
        moving = (row.memory_seconds + row.link_seconds) / row.tokens
        return not fits, row.expected.seconds / row.tokens if fits else row.needed_bytes, moving

    return sorted(rows, key=key)


def choose_to_compile(rows: Sequence[Row], memory_bytes: float, count: int) -> list[list[Row]]:
    """The rows of each layout that may fit, best first, layouts by their best row, pmap before all meshes."""
    layouts: dict[str, list[Row]] = {}
    for row in rank(rows, memory_bytes):
        if row.estimated_bytes <= ROOM * memory_bytes:
            layouts.setdefault(name_of(row.choice), []).append(row)
    pmap = [layouts.pop("pmap")] if "pmap" in layouts else []
    return [*pmap, *layouts.values()][:count]


def name_of(choice: Choice) -> str:
    """pmap, or the mesh as train.py takes it."""
    return choice.layout.mesh or choice.layout.strategy


def compile_choice(choice: Choice, build: Build, accelerator: Machine, devices: Sequence[Any], cache: Path) -> Report:
    """What the compiler says of a choice; raises ValueError if it does not fit the devices, the batch or the model."""
    strategy = get_strategy(choice.layout, build.init_state, build.axes, devices)
    lowered = strategy.lower(build.make_step(strategy.gradients), build.batch)
    return compile_step(lowered, accelerator, strategy.mesh_shape, cache)


def mesh_text(sizes: Mapping[str, int], accelerator: Machine) -> str:
    """The --mesh for these sizes on this slice."""
    return show_mesh(along_torus(sizes, accelerator.network)) or "data=1"


LANES = 128
SUBLANES = 8


def tiled_size(shape: Sequence[int]) -> int:
    """Numbers that an array of this shape takes where one dim fills lanes and another sublanes.

    The compiler chooses both dims so that the least is wasted: f32[4,16,4,32] is stored as if it were [4, 16, 4, 128].
    """
    dims = [1] * (2 - len(shape)) + list(shape)
    sizes = []
    for lanes, sublanes in itertools.permutations(range(len(dims)), 2):
        laid = list(dims)
        laid[lanes] = _whole(dims[lanes], LANES)
        laid[sublanes] = _whole(dims[sublanes], _rows(dims[sublanes]))
        sizes.append(math.prod(laid))
    return min(sizes)


def _rows(size: int) -> int:
    """Rows of a tile; a short dim gets one of 1, 2 or 4 rows."""
    return min(SUBLANES, 1 << max(0, size - 1).bit_length())


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit
