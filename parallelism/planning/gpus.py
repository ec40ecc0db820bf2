"""GPUs by the names that plans give them, such as h100-64: cards, and the hosts and networks that join them.

Invariant: every number of a card and of its links stands in gpus.json, with its source.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallelism.planning.network import HOP, NETWORK_HOP, Dim

GIB = 2**30
USED = 0.9
"""Of a card's memory, the share that JAX's pool may take (XLA_CLIENT_MEM_FRACTION; without it JAX takes 0.75). The rest
is kept for what is outside of the pool: the CUDA context and its modules, NCCL's buffers, and cuBLAS's and cuDNN's own.
"""
LARGEST = 4096
"""GPUs of a plan, at most."""


@dataclasses.dataclass(frozen=True)
class Card:
    """One kind of GPU, and how the hosts that are sold with it are built."""

    name: str
    kinds: tuple[str, ...]
    """What JAX calls its devices, without "NVIDIA "."""
    flops: float
    """bfloat16 operations a second, without sparsity."""
    memory_bytes: int
    """As CUDA reports it."""
    memory_rate: float
    """Bytes a second to and from its memory."""
    host_gpus: int
    """GPUs of a host, which is one process."""
    joined: int
    """GPUs that the inner link joins: those of a host, or of several in one NVLink domain."""
    link: str
    """What that link is."""
    link_rate: float
    """Bytes a second that a GPU sends one way through it."""
    network: str
    """What joins hosts or domains, or "" where nothing does."""
    network_rate: float
    target: Any
    """What XLA's compiler must know of it; see `target_config`."""

    on_chip = 0
    """Bytes of temporaries that stay out of its memory."""


@dataclasses.dataclass(frozen=True)
class Gpus:
    """So many GPUs of a kind, in whole hosts or in a part of one."""

    name: str
    generation: Card
    devices: int

    network = ()
    """No torus: an axis of a mesh is never cut along the dims of one."""
    attention = "cudnn"
    """What attends fastest on it."""
    slices = 1
    """Hosts are a level of one network."""
    tiled = False
    """Arrays take their own bytes: there are no tiles to fill."""

    @property
    def chips(self) -> int:
        return self.devices

    @property
    def hosts(self) -> int:
        return -(-self.devices // self.generation.host_gpus)

    @property
    def topology(self) -> str:
        """Slices, hosts and GPUs of a host, as XLA counts them."""
        return f"1x{self.hosts}x{self.devices // self.hosts}"

    @property
    def device_flops(self) -> float:
        return self.generation.flops

    @property
    def device_memory(self) -> float:
        """Bytes that a program can have."""
        return USED * self.generation.memory_bytes

    @property
    def device_memory_rate(self) -> float:
        return self.generation.memory_rate

    def level(self, groups: Sequence[Sequence[int]]) -> str:
        """The slowest link between the devices of a group, by their positions: that in a host, or the network."""
        within = all(len({place // self.generation.joined for place in group}) == 1 for group in groups)
        return self.generation.link if within else self.generation.network

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The network: hosts or domains at one switch, the GPUs of each at another."""
        card, inner = self.generation, min(self.devices, self.generation.joined)
        within = Dim(card.link, inner, card.link_rate, "switch", HOP)
        if inner == self.devices:
            return (within,)
        return Dim(card.network, self.devices // inner, card.network_rate, "switch", NETWORK_HOP), within


@functools.cache
def cards() -> dict[str, Card]:
    """Every card of gpus.json by name."""
    values = json.loads(Path(__file__).with_name("gpus.json").read_text("utf-8"))
    return {name: _card(name, each) for name, each in values["cards"].items()}


def _card(name: str, values: Any) -> Card:
    host, network = values["host"], values["network"] or {"link": "", "gb_per_s": 0.0}
    return Card(
        name=name,
        kinds=tuple(values["kinds"]),
        flops=values["bf16_tflops"] * 1e12,
        memory_bytes=round(values["memory_gib"] * GIB),
        memory_rate=values["memory_gb_per_s"] * 1e9,
        host_gpus=host["gpus"],
        joined=host["joined"],
        link=host["link"],
        link_rate=host["gb_per_s"] * 1e9,
        network=network["link"],
        network_rate=network["gb_per_s"] * 1e9,
        target=values["target"],
    )


def gpus(name: str) -> Gpus:
    """The GPUs of that name: h100-8 is a host of eight, h100-64 eight such hosts.

    Raises ValueError if the card is not known, or the GPUs are no power of two or fill no whole hosts.
    """
    match = re.fullmatch(r"(\w+)-(\d+)", name)
    card = cards().get(match[1]) if match else None
    if match is None or card is None:
        raise ValueError(f"topology={name!r} must be one of {', '.join(cards())} with a number of GPUs; try h100-8")
    count = int(match[2])
    most = LARGEST if card.network else card.joined
    if not 1 <= count <= most or count & (count - 1):
        near = 2 ** max(0, min(int(math.log2(most)), round(math.log2(max(1, count)))))
        why = "must be a power of two, which all meshes divide"
        if count > most:
            why = f"is more than {most}" + ("" if card.network else ", which no network joins")
        elif card.host_gpus < count:
            why = f"must be whole hosts of {card.host_gpus} GPUs, and a power of two of them"
        raise ValueError(f"topology={name!r} {why}; try {card.name}-{near}")
    return Gpus(name, card, count)


def target_config(card: Card) -> str:
    """The card as XLA's GpuTargetConfigProto in text form, which stands for one that is not here."""
    target = card.target
    major, minor = target["capability"]
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": target["shared_per_core"],
        "threads_per_core_limit": target["threads_per_core"],
        "core_count": target["cores"],
        "fpus_per_core": target["fpus_per_core"],
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": round(card.memory_rate),
        "l2_cache_size": target["l2_bytes"],
        "clock_rate_ghz": target["clock_ghz"],
        "device_memory_size": card.memory_bytes,
        "shared_memory_per_block_optin": target["shared_per_block"],
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    described = " ".join(f"{name}: {value}" for name, value in fields.items())
    return (
        f"gpu_device_info {{ {described} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } '
        f'runtime_version {{ major: 13 minor: 0 patch: 0 }} device_description_str: "NVIDIA {card.kinds[0]}"'
    )
