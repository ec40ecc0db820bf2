"""What accelerators can do, by the names under which users rent them and JAX reports them.

Invariant: a device that is not in the table has no peak, and no utilisation is reported for it.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from parallelism.planning.gpus import GIB, Gpus, cards, gpus
from parallelism.planning.network import HOP, NETWORK_HOP, Dim

MOST_SLICES = 256
"""Which `launch.py` can ask for."""
ON_CHIP = 104 * 2**20
"""Of the 128 MiB on a chip of v4 (CMEM), v5e and v6e (VMEM), bytes in which libtpu keeps temporaries: a middle, chosen
by 45 steps of SMALL and BASE for v4 and v5e. v5p, with 64 MiB a core, and v2 and v3, with 16, keep next to none."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of TPU; rates are a chip's.

    Sources: Google Cloud's page of each TPU, and "How to scale your model" (jax-ml.github.io/scaling-book); the memory
    and link rates of v2, and the network rates of v2 and v3, are unverified.
    """

    name: str
    kinds: tuple[str, ...]
    """What JAX calls its devices, which changes with the version of libtpu."""
    flops: float
    """bfloat16 operations a second."""
    memory_bytes: int
    memory_rate: float
    """Bytes a second to and from a chip's memory."""
    link_rate: float
    """Bytes a second one way through one link to a neighbour."""
    network_rate: float
    """Bytes a second that a chip sends through its host to other slices: the host's network cards, shared."""
    torus_dims: int
    ring: int
    """Chips of a side that closes to a ring: in two dims the side of a whole pod, in three that of a cube, of which
    optical switches join any number. Other sides are lines."""
    largest: int
    """Chips of its largest slice."""
    devices_per_chip: int = 1
    """A chip of v2, v3 or tpu7x shows as two JAX devices, which share its memory and its links."""
    pair_rate: float = 0.0
    """Bytes a second one way between the devices of a chip, where a link joins them."""
    cores_per_name: int = 2
    """How many of the number in an accelerator's name make a chip: cores, but chips for v5e and v6e."""
    splash: bool = True
    """Whether the compiler takes the splash attention kernel in bfloat16."""
    on_chip: int = 0
    """Bytes of a device's temporaries that its compiler keeps out of its main memory, at once."""


# fmt: off
GENERATIONS = {
    each.name: each
    for each in (
        Generation("v2", ("TPU v2",), 45e12, 16 * GIB, 700e9, 62e9, 3.125e9, 2, 16, 256,
                   devices_per_chip=2, splash=False),
        Generation("v3", ("TPU v3",), 123e12, 32 * GIB, 900e9, 100e9, 3.125e9, 2, 32, 1024,
                   devices_per_chip=2, splash=False),
        Generation("v4", ("TPU v4",), 275e12, 32 * GIB, 1200e9, 45e9, 6.25e9, 3, 4, 4096, on_chip=ON_CHIP),
        Generation("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 810e9, 45e9, 3.125e9, 2, 16, 256,
                   cores_per_name=1, on_chip=ON_CHIP),
        Generation("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, 90e9, 6.25e9, 3, 4, 6144),
        Generation("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9, 90e9, 12.5e9, 2, 16, 256,
                   cores_per_name=1, on_chip=ON_CHIP),
        Generation("tpu7x", ("TPU7x",), 2307e12, 192 * GIB, 7380e9, 100e9, 12.5e9, 3, 4, 9216,
                   devices_per_chip=2, pair_rate=600e9),  # six times a link, by Google's page of it
    )
}
# fmt: on
ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x"}
OTHER_PEAKS = {
    "TPU v4 lite": 137e12,
    **dict.fromkeys(("A100-SXM4-40GB", "A100-PCIE-40GB", "A100 80GB PCIe"), 312e12),
    **dict.fromkeys(("GH200 120GB", "GH200 144G HBM3e", "GH200 480GB"), 989e12),
    **dict.fromkeys(("H100 NVL", "H200 NVL"), 835e12),
    "H100 PCIe": 756e12,
    "A10G": 70e12,
    "L40S": 362e12,
}
"""Peak bfloat16 operations a second, without sparsity, of devices that are not planned for: by JAX's tpu_info for TPUs,
by data sheets for GPUs, whose names are CUDA's without "NVIDIA ". A part of one (MIG) has another name, and no peak."""


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A slice as one rents it, or several, which only the data-center network connects."""

    name: str
    generation: Generation
    shape: tuple[int, ...]
    """Chips along each dim of a slice's torus."""
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.generation.devices_per_chip

    @property
    def network(self) -> tuple[int, ...]:
        """Devices along each dim of a slice's network, those of a chip last."""
        return (*self.shape, self.generation.devices_per_chip)

    tiled = True
    """Arrays fill whole tiles of the memory."""

    @property
    def attention(self) -> str:
        """What attends fastest on it."""
        return "splash" if self.generation.splash else "xla"

    def level(self, groups: Sequence[Sequence[int]]) -> str:
        """What joins the devices of a group, by their positions: links between chips, or the network between slices."""
        of_a_slice = self.devices // self.slices
        crossing = any(len({place // of_a_slice for place in group}) > 1 for group in groups)
        return "network" if crossing else "links"

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The network, outermost dim first, that between slices before all; rates are a device's."""
        generation, devices = self.generation, self.generation.devices_per_chip
        cubes = all(side % generation.ring == 0 for side in self.shape)
        found = []
        if self.slices > 1:
            found.append(Dim("network", self.slices, generation.network_rate / devices, "switch", NETWORK_HOP))
        for side in self.shape:
            closed = cubes if generation.torus_dims == 3 else side == generation.ring
            rate = generation.link_rate / devices
            found.append(Dim("links", side, rate, "ring" if closed else "line", HOP))
        if devices > 1:  # where no link joins them, the other reads what one writes to the chip's memory
            rate = generation.pair_rate or generation.memory_rate / (2 * devices)
            found.append(Dim("chip", devices, rate, "switch", 0.0))
        return tuple(found)

    @property
    def topology(self) -> str:
        """The name by which its compiler knows a slice, such as v3:4x4."""
        return f"{self.generation.name}:{'x'.join(map(str, self.shape))}"

    @property
    def device_flops(self) -> float:
        return self.generation.flops / self.generation.devices_per_chip

    @property
    def device_memory(self) -> float:
        """Bytes; a compiler keeps a few in a hundred of them to itself."""
        return self.generation.memory_bytes / self.generation.devices_per_chip

    @property
    def device_memory_rate(self) -> float:
        return self.generation.memory_rate / self.generation.devices_per_chip


Machine: TypeAlias = Accelerator | Gpus
"""Where a step runs."""


def machine(name: str) -> Machine:
    """The slice or the GPUs of that name, such as v3-8, v5litepod-256 or h100-64.

    Raises ValueError if there is no such generation or card, or not in that number.
    """
    return gpus(name) if name.partition("-")[0] in cards() else accelerator(name)


def accelerator(name: str) -> Accelerator:
    """The slice of that name, such as v3-8, v4-64, v5litepod-256, v5p-6144 or v6e-256; or several, as 2xv5p-128.

    Raises ValueError if there is no such generation, or no slice of that size.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w+)-(\d+)", name)
    generation = GENERATIONS.get(ALIASES.get(match[2], match[2])) if match else None
    if match is None or generation is None:
        known = ", ".join((*GENERATIONS, *ALIASES, *cards()))
        raise ValueError(f"topology={name!r} must be one of {known} with a size behind it; try v3-8")
    unit = generation.cores_per_name
    slices = {math.prod(shape) * unit: shape for shape in _slices(generation)}
    size, count = int(match[3]), int(match[1] or 1)
    if not 1 <= count <= MOST_SLICES:
        raise ValueError(f"topology={name!r} must have 1 to {MOST_SLICES} slices; try 2x{match[2]}-{size}")
    if size not in slices:
        near = min(slices, key=lambda known: abs(known - size))
        several = f"{count}x" if count > 1 else ""
        raise ValueError(f"topology={name!r} is no slice that can be rented; try {several}{match[2]}-{near}")
    return Accelerator(name, generation, slices[size], count)


def _slices(generation: Generation) -> list[tuple[int, ...]]:
    """The chips along each dim of each slice that can be rented.

    In two dims powers of two, of which the smallest pods lack one. In three, parts of a cube of 4 × 4 × 4 chips, and
    then any number of such cubes (Google Cloud's pages of v4, v5p and tpu7x), as near to one cube as it goes.
    """
    if generation.torus_dims == 3:
        cubes = range(1, generation.largest // 64 + 1)
        return [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *(tuple(4 * side for side in _cuboid(n)) for n in cubes)]
    least, missing = (4, 8) if generation.cores_per_name == 2 else (1, 2)
    powers = [power for power in range(13) if least <= 2**power <= generation.largest and 2**power != missing]
    return [(2 ** (power // 2), 2 ** (power - power // 2)) for power in powers]


def _cuboid(volume: int) -> tuple[int, int, int]:
    """Whole sides of that volume, smaller ones first, of which the largest is as small as can be."""
    sides = (
        (a, b, volume // a // b)
        for a in range(1, volume + 1)
        if volume % a == 0
        for b in range(a, volume // a + 1)
        if volume // a % b == 0 and b <= volume // a // b
    )
    return min(sides, key=lambda found: found[::-1])


def generation_of(device_kind: str) -> Generation | None:
    """The generation of a JAX device, or None where it is not known."""
    return next((each for each in GENERATIONS.values() if device_kind in each.kinds), None)


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 operations a second of one JAX device, or None where it is not known."""
    generation = generation_of(device_kind)
    if generation is None:
        kind = device_kind.removeprefix("NVIDIA ")
        planned = {kind: card.flops for card in cards().values() for kind in card.kinds}
        return (planned | OTHER_PEAKS).get(kind)
    return generation.flops / generation.devices_per_chip


def attention_of(device: Any) -> str:
    """What attends fastest on a JAX device: splash or cudnn, which are kernels, xla, or blocks, measured on CPUs alone.

    cuDNN's kernel needs compute capability 8.0.
    """
    generation = generation_of(device.device_kind)
    if generation is not None:
        return "splash" if generation.splash else "xla"
    if device.platform != "gpu":
        return "blocks"
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return "cudnn" if major.isdecimal() and int(major) >= 8 else "xla"
