"""The machines of published steps, by the words of their sources.

Invariant: rates are those of the tables that plan.py uses, where the machine is one of them.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from parallelism.planning.gpus import GIB, Gpus, cards
from parallelism.planning.hardware import GENERATIONS, Accelerator, Generation
from parallelism.planning.network import Dim

HOST_RATE = 32e9
"""Bytes a second to the memory of the host and from it, by PCI Express: of v6e and later, and of GPUs; before half."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a device of it can do, and the network of all devices."""

    generation: str
    flops: float
    memory: float
    memory_rate: float
    host_rate: float
    """Bytes a second to the memory of the host, each way."""
    dims: tuple[Dim, ...]

    @property
    def devices(self) -> int:
        return math.prod(dim.size for dim in self.dims)


CARDS = {
    # Of 500 W and with HBM2e: torchtitan puts its peak between those of the SXM and the NVL card. It has the latter's.
    "H100-96GB-HBM2e-500W": {"flops": 835e12, "memory_bytes": 96 * GIB, "memory_rate": 2.4e12},
    # Google's a3-highgpu-8g has four network cards of 200 Gb/s for the eight of a host.
    "H100-80GB (A3)": {"network_rate": 12.5e9},
}
"""What differs from the card of that name in `gpus.json`."""


def machine_of(row: Mapping[str, str]) -> Machine:
    """Raises ValueError if the row's chip is in no table."""
    chips, slices = int(row["chips"]), int(row["slices"] or 1)
    if generation := GENERATIONS.get(row["chip"]):
        return _tpu(generation, chips // slices, slices)
    name = re.split(r"\W", row["chip"].lower())[0]
    if name not in cards():
        raise ValueError(f"ran on {row['chip'] or 'no stated chip'}, whose rates are not in the tables")
    card = dataclasses.replace(cards()[name], **CARDS.get(row["chip"], {}))
    dims = Gpus("", card, chips).dims
    return Machine(name, card.flops, card.memory_bytes, card.memory_rate, HOST_RATE, dims)


def _tpu(generation: Generation, chips: int, slices: int) -> Machine:
    all_slices = Accelerator("", generation, _sides(chips, generation), slices)
    host = HOST_RATE / (1 if generation.name in ("v6e", "tpu7x") else 2) / generation.devices_per_chip
    flops, memory, rate = all_slices.device_flops, all_slices.device_memory, all_slices.device_memory_rate
    return Machine(generation.name, flops, memory, rate, host, all_slices.dims)


def _sides(chips: int, generation: Generation) -> tuple[int, ...]:
    """As near to a square or a cube as it goes, in three dims of whole cubes of four where there are any."""
    unit = generation.ring if generation.torus_dims == 3 and chips % generation.ring**3 == 0 else 1
    left, sides = chips // unit**generation.torus_dims, []
    for dims in range(generation.torus_dims, 0, -1):
        side = next(side for side in range(round(left ** (1 / dims)), 0, -1) if left % side == 0)
        sides.append(unit * side)
        left //= side
    return tuple(sides)
