"""The shape of a mesh: as the user writes it, or as the devices, the batch and the model allow it.

Invariant: a shape that is returned uses every device exactly once.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh

from parallelism.rows import canonical_shards
from parallelism.rules import (
    ACROSS,
    MESH_AXES,
    Rules,
    check_experts,
    check_used,
    crosses_slices,
    in_parts,
    partition_spec,
    parts_of,
    split_by,
)
from parallelism.strategy import Layout, State

CROSSING = ("data", "fsdp")
"""Axes that may cross slices: once a step, or once a layer. What others exchange a layer waits for."""
STATE_SHARE = 0.5
"""Share of a device's memory for parameters and optimizer before they are sharded: the rest is activations."""


def parse_mesh(text: str, devices: int, platform: str = "", slices: int = 1) -> dict[str, int]:
    """Axis sizes from text like "data=2,fsdp=4"; "" means every device along data, "all" whatever is left.

    "fsdp=4x8" is an axis of 32 devices laid along two dims of the network, and becomes the two axes fsdp.0 and fsdp.1.
    "data=2@dcn,fsdp=256" is two slices of 256 devices each, and becomes data.dcn, the outermost, and fsdp; an axis may
    have a part within slices beside the one across them, as in "data=2@dcn,data=4,fsdp=64".
    Raises ValueError if an axis is unknown or repeated, a size is not a positive number, or the product is not
    `devices`; on the platform cpu, whose devices are as many as one asks for, the remedy is to ask for them.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    wild = None
    for part in (text or (f"data={slices}@dcn,data=all" if slices > 1 else "data=all")).split(","):
        name, _, size = part.strip().partition("=")
        size, at, network = size.partition("@")
        if name not in MESH_AXES:
            raise ValueError(f"mesh={text!r} has unknown axis {name!r}; known are {', '.join(MESH_AXES)}")
        axis = name + ACROSS if at else name
        if at and (network != "dcn" or name not in CROSSING):
            raise ValueError(
                f"mesh={text!r} has {part.strip()}, and only {' and '.join(CROSSING)} can cross slices, as in "
                "data=2@dcn; write so, or leave @ out"
            )
        if axis in sizes:
            raise ValueError(f"mesh={text!r} gives {name}{at}{network} twice; give each axis once")
        if size == "all" and wild is None:
            wild, size = axis, "1"
        factors = size.split("x")
        if not all(factor.isdecimal() and int(factor) >= 1 for factor in factors) or (at and len(factors) > 1):
            remedy = f"{name}={1 if '=all' in text else 'all'}{at}{network}"
            raise ValueError(
                f"mesh={text!r} needs a positive number for {name}{at}{network}, not {size!r}; try {remedy}"
            )
        sizes[axis] = tuple(map(int, factors))
    product = math.prod(math.prod(factors) for factors in sizes.values())
    if wild:
        sizes[wild] = (max(1, devices // product),)
        product *= sizes[wild][0]
    if product != devices:
        simulated, rest = divmod(product, jax.process_count())
        each = " in each process" if jax.process_count() > 1 else ""
        remedy = f"JAX_NUM_CPU_DEVICES={simulated}{each}, or " if platform == "cpu" and not rest else ""
        raise ValueError(
            f"mesh={text!r} needs {product} devices but {devices} {'is' if devices == 1 else 'are'} visible; "
            f"try {remedy}--mesh data={devices}"
        )
    shape = {axis: factors[0] for axis, factors in sizes.items() if crosses_slices(axis)}
    for axis in MESH_AXES:
        factors = sizes.get(axis, (1,))
        shape |= dict(zip(parts_of(axis, len(factors)), factors, strict=True))
    return shape


def show_mesh(shape: Mapping[str, int]) -> str:
    """The text that `parse_mesh` reads, without axes of one device: "data=2@dcn,fsdp=4x8"."""
    parts: dict[tuple[str, str], list[str]] = {}
    for axis, size in shape.items():
        if size > 1:
            network = "@dcn" if crosses_slices(axis) else ""
            parts.setdefault((axis.partition(".")[0], network), []).append(str(size))
    return ",".join(f"{axis}={'x'.join(sizes)}{network}" for (axis, network), sizes in parts.items())


def count_slices(devices: Sequence[Any]) -> int:
    """How many slices of TPUs these devices form: within one they have a network of their own, between them not."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def lay_out(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """The devices as an array of these axes, neighbours along its last dims being neighbours in the network.

    Axes that cross slices come first. Slices are those of TPUs, hosts of GPUs as far as JAX tells them apart, and
    otherwise equal groups of processes, or of the simulated devices of one process.

    Raises ValueError if the axes that cross slices are not as many devices as there are slices.
    """
    across = {axis: size for axis, size in sizes.items() if crosses_slices(axis)}
    within = tuple(size for axis, size in sizes.items() if axis not in across) or (1,)
    groups = _slices(devices, math.prod(across.values()))
    # Unlike jax.make_mesh, which takes whole dims of the network alone, on most TPUs.
    laid = [create_device_mesh(within, group, allow_split_physical_axes=True) for group in groups]
    return np.stack(laid).reshape(tuple(sizes.values()))


def _slices(devices: Sequence[Any], count: int) -> list[list[Any]]:
    """The devices in `count` equal groups, none of which cuts a slice, a host or a process."""
    what, units = "slices", [getattr(device, "slice_index", 0) for device in devices]
    if len(set(units)) == 1 and devices[0].platform != "tpu":
        what, units = "processes", [device.process_index for device in devices]
    found = len(set(units))
    # A TPU's slice can be neither cut nor joined to another; the simulated devices of one process can be cut.
    equal = found == count if devices[0].platform == "tpu" else (len(devices) if found == 1 else found) % count == 0
    if not equal:
        remedy = f"data={found}@dcn beside the axes within" if found > 1 else "a mesh without @dcn"
        raise ValueError(f"mesh axes at @dcn hold {count} devices, and there are {found} {what}; try {remedy}")
    ordered = [device for _, device in sorted(zip(units, devices, strict=True), key=lambda pair: pair[0])]
    size = len(devices) // count
    return [ordered[start : start + size] for start in range(0, len(devices), size)]


def choose_mesh(
    devices: Sequence[Any], rules: Rules, shapes: State, state_axes: State, layout: Layout
) -> tuple[dict[str, int], str]:
    """A legal shape for --mesh auto, and why.

    As many devices as the batch allows share its rows, since that costs one reduction a step: along data, or along fsdp
    where the whole state would fill too much of a device. Devices that are left share the model (tensor), or else the
    sequence, in the largest numbers that divide them. On a TPU fsdp follows the network, see `along_torus`, and data
    crosses its slices, once a step. All processes call it and come to one choice. Raises ValueError if no shape uses
    every device.
    """
    slices = count_slices(devices)
    count = len(devices) // slices
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    memory = _memory(devices)
    sharded = memory is not None and state_bytes > STATE_SHARE * memory
    row_axis = "fsdp" if sharded else "data"
    size = f"state of {state_bytes / 2**20:,.0f} MiB"
    reason = f"{size} is too much for one device" if sharded else f"{size} fits on every device"
    across = {"data" + ACROSS: slices} if slices > 1 else {}
    dims = network_dims(_slices(devices, slices)[0])
    for rows in _divisors(count):
        for tensor in _divisors(count // rows):
            shape = {row_axis: rows, "tensor": tensor, "sequence": count // rows // tensor}
            sizes = across | {axis: shape.get(axis, 1) for axis in MESH_AXES}
            if is_legal(sizes, rules, shapes, state_axes, layout):
                if rows < count:
                    reason += f"; no more devices can share batch_size={layout.batch_size}"
                return along_torus(sizes, dims), reason
    unit = math.lcm(len(devices) * layout.accumulate, 16 if layout.reduction == "exact" else 1)
    raise ValueError(
        f"mesh=auto finds no shape for {len(devices)} devices and batch_size={layout.batch_size}; "
        f"try --batch-size {unit * max(1, round(layout.batch_size / unit))}"
    )


def along_torus(sizes: Mapping[str, int], dims: Sequence[int]) -> dict[str, int]:
    """The axes of a mesh; fsdp that spans several dims of the network in parts: 256 on 16×16 is fsdp=16x16.

    Data takes the outer dims and experts the innermost, so fsdp has those between. Beside tensor or sequence the
    compiler gathers as it likes, and fsdp stays whole.

    Args:
      dims: devices of a slice along each dim of its network, outermost first; those of a chip are the innermost.
    """
    across = {axis: size for axis, size in sizes.items() if crosses_slices(axis)}
    shape = across | {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    inner, left, parts = shape["expert"], shape["fsdp"], []
    for dim in reversed(dims):
        taken = math.gcd(inner, dim)
        inner //= taken
        piece = math.gcd(left, dim // taken)
        left //= piece
        parts += [piece] if piece > 1 else []
    if len(parts) < 2 or left > 1 or shape["tensor"] * shape["sequence"] > 1:
        return shape
    split = dict(zip(parts_of("fsdp", len(parts)), reversed(parts), strict=True))
    return across | {"data": shape["data"], **split, "expert": shape["expert"], "sequence": 1, "tensor": 1}


def network_dims(devices: Sequence[Any]) -> tuple[int, ...]:
    """Devices along each dim of a TPU's network, the smallest dim first and those of a chip last; () for others."""
    if devices[0].platform != "tpu":
        return ()
    places = zip(*((*device.coords, device.core_on_chip) for device in devices), strict=True)
    *chips, cores = (len(set(along)) for along in places)
    dims = (*sorted(chips), cores)
    return dims if math.prod(dims) == len(devices) else ()


def _memory(devices: Sequence[Any]) -> int | None:
    """Bytes of the smallest device that says what it has; CPUs do not. The same in all processes, which all call it."""
    limit = _own_memory(devices)
    if jax.process_count() == 1:
        return limit
    from jax.experimental import multihost_utils

    kibibytes = multihost_utils.process_allgather(np.int32((limit or 0) >> 10))
    return int(kibibytes.min()) << 10 or None


def _own_memory(devices: Sequence[Any]) -> int | None:
    """Bytes of one that this process can ask: those of others cannot be asked."""
    own = next(device for device in devices if device.process_index == jax.process_index())
    return (own.memory_stats() or {}).get("bytes_limit")


def _divisors(number: int) -> list[int]:
    return [size for size in range(number, 0, -1) if number % size == 0]


def is_legal(sizes: Mapping[str, int], rules: Rules, shapes: State, state_axes: State, layout: Layout) -> bool:
    """Whether these sizes of mesh axes suit the rules, the batch, the length and every array of the state."""
    rules = in_parts(rules, list(sizes))
    parts = math.prod(split_by("batch", rules, sizes).values())
    if layout.reduction == "exact":
        if canonical_shards(layout.batch_size) % parts or parts != math.prod(sizes.values()):
            return False
    elif layout.batch_size % (parts * layout.accumulate):
        return False
    try:
        check_used(rules, sizes)
        check_experts(sizes, state_axes)
        partition_spec((None, "length"), (1, layout.seq_len), rules, sizes)
        jax.tree.map(lambda leaf, names: partition_spec(names, leaf.shape, rules, sizes), shapes, state_axes)
    except ValueError:
        return False
    return True
