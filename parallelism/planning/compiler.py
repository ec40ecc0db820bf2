"""Programs for TPUs and GPUs that are not here, by their real compilers, which run on any Linux machine.

Invariant: nothing is computed and no device is touched; what is reported is what the compiler says, loops counted.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from parallelism.planning.gpus import Gpus, target_config
from parallelism.planning.hardware import Accelerator, Machine
from parallelism.planning.hlo_collectives import crossed_axes, read_collectives, wire_bytes
from parallelism.planning.hlo_flops import read_flops

REPORT_VERSION = 5
"""To be raised when a report comes to say something else of the same program, so that no older one is found."""

NOT_COUNTED = "not counted"
"""The level of what communicates in a way that is not known: its bytes are in no number."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same axes of a mesh, in one step of one device."""

    kind: str
    axes: tuple[str, ...]
    count: int
    wire_bytes: float
    level: str = ""
    """The slowest link that they cross."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of a step, a device's share. A step that does not fit has nothing but `error`."""

    error: str = ""
    """The compiler's own words where the program is too large."""
    state_bytes: int = 0
    """Parameters, optimizer and batch: the arguments of the step."""
    temporary_bytes: int = 0
    """The most of a device's memory that is in use beside them, see `temporary_size`."""
    flops: int = 0
    """Matmuls outside kernels, loops and recomputation counted."""
    traffic: tuple[Traffic, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.error

    @property
    def shortage(self) -> tuple[float, float] | None:
        """Bytes that a step which does not fit would take, and bytes that there are, where the compiler says both."""
        found = re.search(r"([\d.]+)([MGT])\)? (?:of|exceeds available HBM) \(?([\d.]+)([MG])", self.error)
        if found is None:
            return None
        units = {"M": 2**20, "G": 2**30, "T": 2**40}
        return float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]

    @property
    def peak_bytes(self) -> int:
        return self.state_bytes + self.temporary_bytes


def topology_devices(accelerator: Machine) -> list[Any]:
    """The devices of a machine that is not here: good to lower and compile for.

    Raises ValueError if its compiler is not installed, or does not know the slice.
    """
    check_compiler(accelerator)
    return _gpus(accelerator) if isinstance(accelerator, Gpus) else _tpus(accelerator)


def check_compiler(accelerator: Machine) -> None:
    """Raises ValueError if the compiler for a machine is not installed."""
    if isinstance(accelerator, Gpus):
        for module in ("jax_plugins.xla_cuda13", "jax_cuda13_plugin", "nvidia.cudnn"):
            if not _is_installed(module):
                raise ValueError(
                    f'{module}, a part of the compiler for GPUs, is not installed; try pip install -e ".[plan-gpu]"'
                )
    elif not _is_installed("libtpu"):
        raise ValueError('libtpu, the compiler for TPUs, is not installed; try pip install -e ".[plan]"')


def _gpus(gpus: Gpus) -> list[Any]:
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the compiler's plugin looks for no GPU
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # and does not say what a report says: that a step is too large
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(gpus.generation), topology=gpus.topology
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"topology={gpus.name} is refused by XLA's compiler for GPUs ({_one_line(error)}); "
            'try pip install -e ".[plan-gpu]", which fits it to JAX'
        ) from None
    return list(described.devices)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _tpus(accelerator: Accelerator) -> list[Any]:
    # Live beside other processes that use libtpu, and ask no metadata server for what is not here.
    asked = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v3-8"}
    for name, value in {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **asked}.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": "megacore"} if accelerator.generation.name == "v4" else {}
    if accelerator.slices > 1:
        options["num_slices"] = accelerator.slices
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=accelerator.topology, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology={accelerator.name} is unknown to libtpu ({_one_line(error)}); try v3-8") from None
    return list(described.devices)


def compile_step(
    lowered: jax.stages.Lowered, accelerator: Machine, mesh_shape: Mapping[str, int], cache: Path
) -> Report:
    """Compiles a step that was lowered for the devices of a machine, or finds the report of an equal program.

    Args:
      accelerator: what the program, which names no chip, was lowered for.
      mesh_shape: sizes of the axes over which the program's devices are arranged, outermost first.
      cache: a folder for reports, by a hash of program, target and compiler; without one that can be written,
        nothing is kept.
    """
    is_gpu = isinstance(accelerator, Gpus)
    compiler = importlib.metadata.version("jax-cuda13-pjrt" if is_gpu else "libtpu")
    versions = (REPORT_VERSION, compiler, jax.__version__)
    target = f"{accelerator.topology} {target_config(accelerator.generation)}" if is_gpu else accelerator.topology
    target += f" × {accelerator.slices}" if accelerator.slices > 1 else ""
    identity = f"{versions}\n{target}\n{tuple(mesh_shape.items())}\n{lowered.as_text()}"
    file = cache / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # none, or damaged
        values = json.loads(file.read_text())
        traffic = tuple(Traffic(**each | {"axes": tuple(each["axes"])}) for each in values.pop("traffic"))
        return Report(**values, traffic=traffic)
    report = _compile(lowered, accelerator, mesh_shape)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(dataclasses.asdict(report)))
        partial.replace(file)
    return report


def _compile(lowered: jax.stages.Lowered, accelerator: Machine, mesh_shape: Mapping[str, int]) -> Report:
    # Without a GPU no variants of a kernel can be timed.
    options: Any = {"xla_gpu_autotune_level": "0"} if isinstance(accelerator, Gpus) else None
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Report(error=_shortage(str(error)))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise RuntimeError("the compiler says neither what memory a program takes nor what it does")
    return Report(
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=temporary_size(memory),
        flops=read_flops(text),
        traffic=_traffic(text, accelerator, mesh_shape),
    )


def temporary_size(memory: Any) -> int:
    """The lesser of two numbers.

    The peak is what steps for v2 were refused by, within a hundredth of it, but it counts the memory on a chip too.
    The laid-out size counts main memory alone, but gaps between arrays as well: a third and more, for steps that fit.
    """
    laid_out = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return min(memory.peak_memory_in_bytes - memory.argument_size_in_bytes, laid_out)


def _traffic(hlo_text: str, accelerator: Machine, mesh_shape: Mapping[str, int]) -> tuple[Traffic, ...]:
    sums: dict[tuple[str, tuple[str, ...], str], tuple[int, float]] = {}
    for each in read_collectives(hlo_text):
        level = accelerator.level(each.groups) if each.groups else NOT_COUNTED
        key = each.kind, crossed_axes(each, mesh_shape), level
        count, sent = sums.get(key, (0, 0.0))
        sums[key] = count + each.count, sent + each.count * wire_bytes(each)
    return tuple(Traffic(kind, axes, *sums[kind, axes, level], level) for kind, axes, level in sorted(sums))


def _shortage(message: str) -> str:
    """The sentence with the numbers, of a message of many lines."""
    found = re.search(r"(Used [\d.]+\w? of [\d.]+\w? hbm\..*?by [\d.]+\w?)", message)
    return found[1] if found else _one_line(message)[:200]


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())
