"""Several processes as one run: how they find each other, agree, and end.

Invariant: a run has one writer, process 0; and none outlives a peer that is gone.
"""

import dataclasses
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from parallelism.exit_status import (
    DEVICE_FAILURE,
    FAILED,
    LOST_PEER,
    OUT_OF_MEMORY,
    OUTSIDE_FAILURE,
    code_of,
    status_of,
)

HEARTBEAT_SECONDS = 20
"""After this long without a sign of life a process counts as dead; JAX's default of 100 s leaves a pod waiting."""
SHUTDOWN_SECONDS = 30
"""How long a process that is done waits for the others."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where the processes of a run meet; fields that are None come from the environment or from TPU metadata."""

    coordinator: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    process_id: int | None = None


def join(cluster: Cluster) -> None:
    """Starts `jax.distributed` when flags, the environment or TPU metadata ask for it; must come before any device.

    Raises ValueError if the address or the numbers are not usable, or some are missing.
    """
    found = _from_environment(cluster)
    if found == Cluster():
        if _on_tpu():
            _initialize(None)
        return
    for field in dataclasses.fields(found):
        if getattr(found, field.name) is None:
            flag = field.name.replace("_", "-")
            raise ValueError(
                f"--{flag} is missing and several processes need it; give --coordinator HOST:PORT, "
                "--num-processes and --process-id together"
            )
    address, count, number = str(found.coordinator), found.num_processes or 0, found.process_id or 0
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator {address} must be HOST:PORT; try 127.0.0.1:8482")
    if count < 1:
        raise ValueError(f"--num-processes {count} must be at least 1; try 2")
    if not 0 <= number < count:
        raise ValueError(f"--process-id {number} must be from 0 to {count - 1}, --num-processes less one; try 0")
    if count > 1:
        _initialize(Cluster(coordinator=address, num_processes=count, process_id=number))


def _from_environment(cluster: Cluster) -> Cluster:
    """What the flags leave open, from the variables that JAX's own launchers set."""
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    numbers = {}
    for field, name in names.items():
        text = os.environ.get(name)
        if text is not None and not text.isdecimal():
            raise ValueError(f"{name}={text!r} must be a number; unset it, or set it to 0")
        given = getattr(cluster, field)
        numbers[field] = given if given is not None or text is None else int(text)
    coordinator = cluster.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    return Cluster(coordinator=coordinator, **numbers)


def _on_tpu() -> bool:
    """Whether this is a host with TPU chips, whose metadata tells JAX of the other hosts; never run on one yet."""
    chips = any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return chips and wanted and importlib.util.find_spec("libtpu") is not None


def _initialize(cluster: Cluster | None) -> None:
    given: dict[str, Any] = {}
    if cluster is not None:
        given = {
            "coordinator_address": cluster.coordinator,
            "num_processes": cluster.num_processes,
            "process_id": cluster.process_id,
        }
        if str(cluster.coordinator).startswith(("127.", "localhost:")):
            given["coordinator_bind_address"] = cluster.coordinator  # by default it listens on every interface
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=120,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the processes of this run did not meet: {reason}; check --coordinator") from None


def fix_cpu_rounding() -> None:
    """Makes XLA's CPU backend round alike on every layout, for exact reduction; call it before any device starts.

    - How a matmul is cut among threads decides how it rounds, and by default there are as many as cores or
      simulated devices. 16 is the most devices that exact reduction serves.
    - Whether a multiply-add is rounded once (fused) or twice depends on the shape that a device holds: vector
      code and its remainder choose differently. Without AVX2's instructions there is nothing to fuse.
    """
    os.environ["NPROC"] = "16"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX".strip()


def agree(text: str) -> str:
    """What process 0 says, in every process. All must call it."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    content = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        padded[:] = content
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().decode()


def fetch(tree: Any) -> Any:
    """Global arrays as whole numpy arrays, in every process. All must call it."""
    from jax.experimental import multihost_utils

    def whole(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def run_process(main: Callable[[], int]) -> int:
    """Runs a script's main function. A process that fails ends at once; exit handlers do not run.

    Returns:
      main's exit status, or `status_of` what it raised.
    """
    try:
        status = main()
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else FAILED
    except Exception as error:
        if code_of(error) is None and not has_peers():
            raise
        status, words = explain(error)
        if words.endswith(OUT_OF_MEMORY) or status != FAILED:
            print(f"error: {words}", file=sys.stderr)
        else:
            traceback.print_exc()
    if status in (FAILED, OUTSIDE_FAILURE, DEVICE_FAILURE) or (status and has_peers()):
        # Exit handlers would wait, for peers or for threads that a failed save has left waiting for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    return status


def explain(error: BaseException) -> tuple[int, str]:
    """The exit status for what ended this process, and a line that says it, with a remedy where one is known."""
    several, message = has_peers(), str(error)
    status, reason = status_of(error, several), (message.splitlines() or [""])[0]
    who = f"process {jax.process_index()}" if several else "the run"
    if status == LOST_PEER:
        return status, f"{who} lost a peer: {reason}"
    if status == DEVICE_FAILURE:
        return status, f"{who} lost a device: {reason}"
    if code_of(error) == "RESOURCE_EXHAUSTED":
        return status, f"{reason}; {OUT_OF_MEMORY}"
    return status, " ".join(message.split())


def has_peers() -> bool:
    """Whether other processes may wait for this one; a cluster may be one process, as on a v3-8."""
    try:
        return jax.distributed.is_initialized() and jax.process_count() > 1
    except RuntimeError:  # there are no devices, and the others may be waiting for them
        return True


class StopRequest:
    """Turns the first SIGTERM or Ctrl-C into a question that the loop asks; a second Ctrl-C interrupts at once.

    Over several processes JAX listens for SIGTERM itself, and all agree on the step after which they stop.
    """

    def __init__(self):
        self._requested = False
        self._together: Callable[[int], bool] | None = None

    def listen(self) -> None:
        """Installs the handlers; call it from the main thread, once a run is about to train."""
        if jax.process_count() > 1:  # a handler for SIGTERM would displace JAX's own
            from jax.experimental import multihost_utils

            self._together = multihost_utils.reached_preemption_sync_point
            return
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def __call__(self, step: int) -> bool:
        """Whether to stop after this step; several processes must all ask after every step."""
        return self._requested if self._together is None else self._together(step)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True
