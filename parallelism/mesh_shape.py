"""The shape of a mesh: as the user writes it, or as the devices, the batch and the model allow it.

Invariant: a shape that is returned uses every device exactly once.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from parallelism.rows import canonical_shards
from parallelism.rules import MESH_AXES, Rules, check_experts, check_used, partition_spec, parts_of, split_by
from parallelism.strategy import Layout, State

STATE_SHARE = 0.5
"""Share of a device's memory for parameters and optimizer before they are sharded: the rest is activations."""


def parse_mesh(text: str, devices: int, platform: str = "") -> dict[str, int]:
    """Axis sizes from text like "data=2,fsdp=4"; "" means every device along data, "all" whatever is left.

    "fsdp=4x8" is an axis of 32 devices laid along two dims of the network, and becomes the two axes fsdp.0 and fsdp.1.
    Raises ValueError if an axis is unknown or repeated, a size is not a positive number, or the product is not
    `devices`; on the platform cpu, whose devices are as many as one asks for, the remedy is to ask for them.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    wild = None
    for part in (text or "data=all").split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in MESH_AXES:
            raise ValueError(f"mesh={text!r} has unknown axis {axis!r}; known are {', '.join(MESH_AXES)}")
        if axis in sizes:
            raise ValueError(f"mesh={text!r} gives {axis} twice; give each axis once")
        if size == "all" and wild is None:
            wild, size = axis, "1"
        factors = size.split("x")
        if not all(factor.isdecimal() and int(factor) >= 1 for factor in factors):
            remedy = f"{axis}={1 if '=all' in text else 'all'}"
            raise ValueError(f"mesh={text!r} needs a positive number for {axis}, not {size!r}; try {remedy}")
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
    shape: dict[str, int] = {}
    for axis in MESH_AXES:
        factors = sizes.get(axis, (1,))
        shape |= dict(zip(parts_of(axis, len(factors)), factors, strict=True))
    return shape


def show_mesh(shape: Mapping[str, int]) -> str:
    """The text that `parse_mesh` reads, without axes of one device: "data=2,fsdp=4x8"."""
    parts: dict[str, list[str]] = {}
    for axis, size in shape.items():
        if size > 1:
            parts.setdefault(axis.partition(".")[0], []).append(str(size))
    return ",".join(f"{axis}={'x'.join(sizes)}" for axis, sizes in parts.items())


def choose_mesh(
    devices: Sequence[Any], rules: Rules, shapes: State, state_axes: State, layout: Layout
) -> tuple[dict[str, int], str]:
    """A legal shape for --mesh auto, and why.

    As many devices as the batch allows share its rows, since that costs one reduction a step: along data, or along fsdp
    where the whole state would fill too much of a device. Devices that are left share the model (tensor), or else the
    sequence, in the largest numbers that divide them. On a TPU fsdp follows the network, see `along_torus`. All
    processes call it and come to one choice. Raises ValueError if no shape uses every device.
    """
    count = len(devices)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    memory = _memory(devices)
    sharded = memory is not None and state_bytes > STATE_SHARE * memory
    row_axis = "fsdp" if sharded else "data"
    size = f"state of {state_bytes / 2**20:,.0f} MiB"
    reason = f"{size} is too much for one device" if sharded else f"{size} fits on every device"
    for rows in _divisors(count):
        for tensor in _divisors(count // rows):
            shape = {row_axis: rows, "tensor": tensor, "sequence": count // rows // tensor}
            sizes = {axis: shape.get(axis, 1) for axis in MESH_AXES}
            if is_legal(sizes, rules, shapes, state_axes, layout):
                return along_torus(sizes, network_dims(devices)), _explain(sizes, reason, layout.batch_size)
    unit = math.lcm(count * layout.accumulate, 16 if layout.reduction == "exact" else 1)
    raise ValueError(
        f"mesh=auto finds no shape for {count} devices and batch_size={layout.batch_size}; "
        f"try --batch-size {unit * max(1, round(layout.batch_size / unit))}"
    )


def _explain(sizes: dict[str, int], reason: str, batch_size: int) -> str:
    if sizes["tensor"] * sizes["sequence"] == 1:
        return reason
    return f"{reason}; no more devices can share batch_size={batch_size}"


def along_torus(sizes: Mapping[str, int], dims: Sequence[int]) -> dict[str, int]:
    """The axes of a mesh; fsdp that spans several dims of the network in parts: 256 on 16×16 is fsdp=16x16.

    Data takes the outer dims and experts the innermost, so fsdp has those between. Beside tensor or sequence the
    compiler gathers as it likes, and fsdp stays whole.

    Args:
      dims: devices along each dim of the network, outermost first; the devices of a chip are the innermost.
    """
    shape = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
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
    return {"data": shape["data"], **split, "expert": shape["expert"], "sequence": 1, "tensor": 1}


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
