"""How long a collective takes on a network of several levels, by its public rates.

Invariant: a time is a lower bound, each link at its rate, by the algorithm that sends the least over the links that
there are. What programs reach of it is fitted elsewhere (`step_time.py`).
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from parallelism.rules import whole_axis

SERIAL = {"sequence", "tensor", "expert"}
"""Mesh axes whose collectives a layer waits for. Those along other axes, which gather the next layer's parameters and
reduce gradients, can run beside matmuls."""

HOP, NETWORK_HOP = 1e-6, 1e-5
"""Seconds to a chip's neighbour or through the switch of a host, and through a network: orders of magnitude, not
measured. "How to scale your model" gives half a microsecond to one from a chip to its neighbour."""

_PASSES = {"all-reduce": 2}
"""An all-reduce is a reduce-scatter and an all-gather."""


@dataclasses.dataclass(frozen=True)
class Dim:
    """One dim of a network: devices in a line, in a ring, or at a switch."""

    level: str
    """chip, links between chips, nvlink, network between hosts or slices: for a person to read."""
    size: int
    rate: float
    """Bytes a second that each device sends one way: to one neighbour, or into the switch."""
    form: Literal["line", "ring", "switch"]
    latency: float
    """Seconds for a hop to a neighbour, or through the switch."""


@dataclasses.dataclass(frozen=True)
class Reach:
    """The part of a dim along which a mesh axis has its devices."""

    dim: Dim
    size: int
    """Devices of a group along this dim."""
    stride: int
    """How far apart they are. The groups between them use the same links."""

    @property
    def is_ring(self) -> bool:
        """A link leads from a ring's last device to its first; between two devices it is the one that is there."""
        return self.dim.form == "ring" and self.size > 2 and self.size * self.stride == self.dim.size

    @property
    def link_rate(self) -> float:
        """Bytes a second of one group over one link, one way."""
        return self.dim.rate / (1 if self.dim.form == "switch" else self.stride)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that each device sends in a gather or a reduction.

        A ring sends both ways at once. The end of a line has one link, through which all must come.
        """
        return self.link_rate * (2 if self.is_ring else 1)

    @property
    def bisection(self) -> float:
        """Bytes a second that each device sends in an all-to-all; half of them cross the middle of the dim."""
        if self.dim.form == "switch":
            return self.link_rate
        # Half of the devices send half of what they have over the one link of a line, or the two of a ring.
        return self.link_rate * (self.size - 1) / self.size * (8 if self.is_ring else 4) / self.size

    @property
    def hops(self) -> int:
        """Until what the farthest device has is here."""
        if self.dim.form == "switch":
            return math.ceil(math.log2(self.size))
        return self.stride * (self.size // 2 if self.is_ring else self.size - 1)


def place(mesh_shape: Mapping[str, int], dims: Sequence[Dim]) -> dict[str, tuple[Reach, ...]]:
    """Along which dims each axis of a mesh runs, as `jax.experimental.mesh_utils.create_device_mesh` chooses them.

    The last axis chooses first. It takes whole dims where some have its size together, as many as possible, or else
    factors of what is left of the innermost.

    Args:
      mesh_shape: sizes by axis, outermost first; parts such as fsdp.0 are axes of their own.
      dims: of the network, outermost first.

    Raises:
      ValueError: the mesh has not as many devices as the network.
    """
    if math.prod(mesh_shape.values()) != math.prod(dim.size for dim in dims):
        raise ValueError(f"a mesh of {dict(mesh_shape)} must have the devices of {[dim.size for dim in dims]}")
    strides = [1] * len(dims)
    paths: dict[str, tuple[Reach, ...]] = {}
    for axis, size in reversed(list(mesh_shape.items())):
        left = [dim.size // stride for dim, stride in zip(dims, strides, strict=True)]
        sizes = _whole_dims(size, dims, left) or _factors(size, left)
        places = [place for place, along in enumerate(sizes) if along > 1]
        paths[axis] = tuple(Reach(dims[place], sizes[place], strides[place]) for place in places)
        strides = [stride * along for stride, along in zip(strides, sizes, strict=True)]
    return {axis: paths[axis] for axis in mesh_shape}


def _whole_dims(size: int, dims: Sequence[Dim], left: Sequence[int]) -> list[int]:
    """How much of each dim, where dims that are free have that size together; else []."""
    free = [place for place, dim in reversed(list(enumerate(dims))) if left[place] == dim.size > 1]
    for count in range(len(free), 0, -1):
        for chosen in itertools.combinations(free, count):
            if math.prod(dims[place].size for place in chosen) == size:
                return [dim.size if place in chosen else 1 for place, dim in enumerate(dims)]
    return []


def _factors(size: int, left: Sequence[int]) -> list[int]:
    """How much of each dim, as far inside as possible."""
    sizes = [1] * len(left)
    for place in reversed(range(len(left))):
        sizes[place] = math.gcd(size, left[place])
        size //= sizes[place]
    return sizes


@dataclasses.dataclass(frozen=True)
class Wait:
    """The collectives of one kind in a step, and how long they take."""

    axes: tuple[str, ...]
    """Of the mesh, along which they run, without parts."""
    seconds: float

    @property
    def in_layer(self) -> bool:
        """Whether the next matmul waits for them."""
        return not SERIAL.isdisjoint(self.axes)


def waits(sent: Sequence[Any], paths: Mapping[str, tuple[Reach, ...]]) -> list[Wait]:
    """How long each of the collectives of a step takes.

    Args:
      sent: with a kind, axes or an axis, wire_bytes and a count, as the compiler's or the analytic model's are.
      paths: by `place`. What is sent along an axis that has parts there goes along one part after the other.
    """
    found = []
    for each in sent:
        axes = axes_of(each)
        parts = [path for name, path in paths.items() if whole_axis(name) in axes]
        if all(axis in paths for axis in axes):  # of none too: groups of one device, or what is not counted
            legs = [(each.wire_bytes, tuple(reach for axis in axes for reach in paths[axis]))]
        elif parts:
            legs = _by_part(each.wire_bytes, parts)
        else:
            raise ValueError(f"{each.kind} runs along {', '.join(axes)}, and the mesh has {', '.join(paths)}")
        seconds = sum(collective_seconds(each.kind, sent, path, each.count) for sent, path in legs)
        found.append(Wait(tuple({whole_axis(axis): None for axis in axes}), seconds))
    return found


def axes_of(sent: Any) -> tuple[str, ...]:
    """Along which mesh axes it goes: one by the analytic model, any number by the compiler."""
    return sent.axes if hasattr(sent, "axes") else (sent.axis,)


def _by_part(wire_bytes: float, parts: Sequence[tuple[Reach, ...]]) -> list[tuple[float, tuple[Reach, ...]]]:
    """What of it goes along each part; the innermost completes what the others carried as shards of it."""
    sizes = [math.prod(reach.size for reach in path) for path in parts]
    size, legs = math.prod(sizes), []
    whole = wire_bytes * size / max(1, size - 1)
    for count, path in reversed(list(zip(sizes, parts, strict=True))):
        legs.append((whole * (1 - 1 / count), path))
        whole /= count
    return legs


def collective_seconds(kind: str, wire_bytes: float, path: Sequence[Reach], count: int = 1) -> float:
    """How long collectives take that run one after the other.

    Along several dims of one level a gather uses the links of all of them. From level to level it goes inwards, so that
    the outer, slower ones carry shards, which an inner one completes.

    Args:
      kind: as `hlo_collectives.py` names it.
      wire_bytes: what a device sends in all of them, by the algorithms that send the least.
      path: the dims along which a group has its devices, outermost first.
      count: how many they are.
    """
    size = math.prod(reach.size for reach in path)
    if size == 1:
        return 0.0
    if kind == "collective-permute":  # to the next device, in whichever dim that is
        return max(count * reach.stride * reach.dim.latency + wire_bytes / reach.link_rate for reach in path)
    seconds, whole = 0.0, wire_bytes * size / (size - 1)
    levels = itertools.groupby(reversed(path), key=lambda reach: reach.dim.level)
    for level in (list(group) for _, group in levels):
        parts = math.prod(reach.size for reach in level)
        if kind.endswith("all-to-all"):
            seconds += max(whole * (1 - 1 / reach.size) / reach.bisection for reach in level)
            continue
        seconds += whole * (1 - 1 / parts) / sum(reach.bandwidth for reach in level)
        whole /= parts
    return seconds + count * _PASSES.get(kind, 1) * sum(reach.hops * reach.dim.latency for reach in path)
