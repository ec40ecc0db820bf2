"""Several processes as one run: how they find each other, agree, and end.

Invariant: a run has one writer, process 0; and none outlives a peer that is gone.
"""

import contextlib
import dataclasses
import importlib.util
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from parallelism.exit_status import (
    DEVICE_FAILURE,
    FAILED,
    INTERRUPTED,
    LOST_PEER,
    OUT_OF_MEMORY,
    OUTSIDE_FAILURE,
    code_of,
    status_of,
)

HEARTBEAT_SECONDS = 20
"""After this long without a sign of life a process counts as dead; JAX's default of 100 s leaves a pod waiting."""
PATIENCE_HOURS = 24
"""How long processes wait for one that prepares data."""
SHUTDOWN_SECONDS = 30
"""How long a process that is done waits for the others."""
STOPPING = "stopping: this step is saved, then the run ends; a second Ctrl-C ends it at once, without saving\n"
NOTICE = "RECEIVED_PREEMPTION_NOTICE"
"""Where JAX's preemption service writes, for all processes, that one of them got SIGTERM."""
FIRST_WORD = "parallax/first-word"
"""Where it says "end" or "ask", whichever a process comes to first."""
NOTICE_SECONDS = 0.5
"""How often a process looks for it while it cannot ask."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where the processes of a run meet; fields that are None come from the environment or from what started them."""

    coordinator: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: Sequence[int] | None = None
    """Which of this machine's GPUs are this process's."""


TASKS = {"SLURM_STEP_NUM_TASKS": "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK", "PMI_SIZE": "PMI_RANK"}
"""Where srun, Open MPI and other MPIs say how many tasks they started, and which of them this is."""
POD = "JOB_COMPLETION_INDEX"
"""Where Kubernetes says which pod of an indexed Job this is; how many there are, JAX asks its server."""
ALONE = "--num-processes 1 makes a run of this process alone"


def join(cluster: Cluster) -> None:
    """Starts `jax.distributed` when flags, the environment or a launcher that JAX knows ask for it.

    JAX knows Cloud TPU, SLURM, Open MPI and Kubernetes. Must come before any device.

    Raises ValueError if the address or the numbers are not usable or some are missing, if the processes do not meet,
    or if several tasks were started and JAX finds no cluster.
    """
    found = _from_environment(cluster)
    given = (found.coordinator, found.num_processes, found.process_id)
    if given in ((None, 1, None), (None, None, None)):
        alone = given[1] == 1 or not _join_what_jax_detects(found)
        if alone and found.local_device_ids:
            raise ValueError("--local-device-ids is for several processes and this one runs alone; leave it out")
        return
    for name, value in zip(("coordinator", "num-processes", "process-id"), given, strict=True):
        if value is None:
            raise ValueError(
                f"--{name} is missing and several processes need it; give --coordinator HOST:PORT, "
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
        _initialize(found)


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
    return dataclasses.replace(cluster, coordinator=coordinator, **numbers)


def _join_what_jax_detects(cluster: Cluster) -> bool:
    """Joins the cluster that JAX finds; False where this is a run of one process.

    JAX is asked where several tasks were started, in a pod of an indexed Job, and on a TPU.
    """
    counts = {name: int(text) for name in TASKS if (text := os.environ.get(name, "")).isdecimal()}
    several = [name for name, count in counts.items() if count > 1]
    tpu = _on_tpu()
    pod = not tpu and POD in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ
    if pod and importlib.util.find_spec("kubernetes") is None:
        raise ValueError(
            f"{POD}={os.environ[POD]} means a pod of a Job, and the package kubernetes, with which JAX finds the "
            f"others, is missing; try pip install 'jax[k8s]', or {ALONE}"
        )
    if not several and not pod and not tpu:
        return False
    if _initialize(cluster):
        return True
    if several:
        name = several[0]
        raise ValueError(
            f"{name}={counts[name]} tasks were started, and JAX finds no cluster of them; try --coordinator HOST:PORT "
            f"--num-processes {counts[name]} --process-id ${TASKS[name]}, or {ALONE}"
        )
    print("no other host of this TPU is known, so it trains by itself", file=sys.stderr)
    return False


def _on_tpu() -> bool:
    """Whether this is a host with TPU chips, whose metadata tells JAX of the other hosts; never run on one yet."""
    chips = any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return chips and wanted and importlib.util.find_spec("libtpu") is not None


def _initialize(cluster: Cluster) -> bool:
    """Meets the other processes; False where JAX was to find them and knows none.

    Machines of a pod do not start at one moment, so they get JAX's own 300 s for it.
    """
    options: dict[str, Any] = {
        "coordinator_address": cluster.coordinator,
        "num_processes": cluster.num_processes,
        "process_id": cluster.process_id,
        "local_device_ids": cluster.local_device_ids,
    }
    if cluster.coordinator is not None:
        options["cluster_detection_method"] = "deactivate"  # else SLURM's and others' numbers fill what is None
    if str(cluster.coordinator).startswith(("127.", "localhost:")):
        options["coordinator_bind_address"] = cluster.coordinator  # by default it listens on every interface
        options["initialization_timeout"] = 120
    try:
        jax.distributed.initialize(
            **options, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS
        )
    except (ValueError, OSError) as error:  # OSError: of requests, where there is no metadata server
        if cluster.coordinator is not None or not (isinstance(error, OSError) or "defined" in str(error)):
            raise
        return False
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the processes of this run did not meet: {reason}; check --coordinator, or {ALONE}") from None
    jax.process_count()  # the devices too are found together
    return True


def fix_cpu_rounding() -> None:
    """Makes XLA's CPU backend round alike on every layout, for exact reduction; call it before any device starts.

    - How a matmul is cut among threads decides how it rounds, and by default there are as many as cores or
      simulated devices. 16 is the most devices that exact reduction serves.
    - Whether a multiply-add is rounded once (fused) or twice depends on the shape that a device holds: vector
      code and its remainder choose differently. Without AVX2's instructions there is nothing to fuse.
    """
    os.environ["NPROC"] = "16"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX".strip()


def wait_for_all(what: str) -> None:
    """Returns when every process of the run has come here, however long the others take.

    There is no public barrier without a collective, which would time out.
    """
    client = _client()
    if client is not None:
        client.wait_at_barrier(what, timeout_in_ms=PATIENCE_HOURS * 3_600_000)


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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except Exception as error:
        if code_of(error) is None and not has_peers():
            raise
        status, words = explain(error)
        said_in_a_line = status == DEVICE_FAILURE or words.endswith(OUT_OF_MEMORY)
        if not said_in_a_line:  # where a process lost its peer, too: the peer may have hung elsewhere
            traceback.print_exc()
        if said_in_a_line or status == LOST_PEER:
            print(f"error: {words}", file=sys.stderr)
    if status in (FAILED, OUTSIDE_FAILURE, DEVICE_FAILURE, INTERRUPTED) or (status and has_peers()):
        # Exit handlers would wait, for peers or for threads that a failed save has left waiting for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    leave_together()
    return status


def leave_together() -> None:
    """Waits for the other processes, which process 0 serves until all have come here."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


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

    Over several processes JAX listens for SIGTERM itself, and all agree on the question at which they stop. Until the
    first question nothing is done that could be lost, and the main thread may be in a compilation, which nothing
    interrupts: then they end without it.
    """

    def __init__(self):
        self._requested = False
        self._asked = 0
        self._together: Callable[[int], bool] | None = None

    def listen(self, at_once: Callable[[], None] = lambda: None) -> None:
        """Installs the handlers; call it from the main thread, once a run is about to train.

        Args:
          at_once: called in another thread at each signal, for the main thread may be in a call that no handler
            interrupts, such as a compilation. It may end the process. Over several processes it is called in all of
            them, only if none has asked yet, and must end them.
        """
        if jax.process_count() > 1:  # a handler for SIGTERM would displace JAX's own
            from jax.experimental import multihost_utils

            self._together = multihost_utils.reached_preemption_sync_point
            threading.Thread(target=watch_notice, args=(threading.Event(), at_once), daemon=True).start()
            return
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        watch_signals((signal.SIGTERM, signal.SIGINT), at_once)

    def __call__(self) -> bool:
        """Whether to stop now; several processes must all ask equally often. Of them, all get one True at once."""
        self._asked += 1
        if self._together is None:
            return self._requested
        if self._asked == 1 and _first_word("ask") == "end":
            threading.Event().wait()  # until the other thread ends this process, as all others end
        return self._together(self._asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self._requested = not self._requested, True  # at once: another signal may come while this one is handled
        if first:
            os.write(2, STOPPING.encode())  # a handler may have interrupted a print
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


def watch_signals(numbers: Collection[int], at_once: Callable[[], None]) -> tuple[threading.Thread, Callable[[], None]]:
    """Calls `at_once` in another thread for each of these signals that has a handler, whatever the main thread does.

    Returns that thread, and what ends it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(reading, 1):
            if number[0] in numbers:
                at_once()
        os.close(reading)

    def stop() -> None:
        signal.set_wakeup_fd(before)
        os.close(writing)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread, stop


def watch_notice(done: threading.Event, at_once: Callable[[], None]) -> None:
    """Calls `at_once` in each process if one gets SIGTERM before any has asked whether to stop, and before `done`."""
    while not done.is_set() and jax.distributed.is_initialized() and (word := _said(FIRST_WORD)) != "ask":
        if word == "end" or (_said(NOTICE) and _first_word("end") == "end"):
            at_once()
            return
        done.wait(NOTICE_SECONDS)


def _first_word(word: str) -> str | None:
    """The word of that process of the run which was the first to say one."""
    client = _client()
    if client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is one
            client.key_value_set(FIRST_WORD, word)
    return _said(FIRST_WORD)


def _said(key: str) -> str | None:
    """What all processes of the run can read under that key, or None, also where they cannot be reached any more."""
    client = _client()
    if client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return client.key_value_try_get(key)
    return None


def _client() -> Any:
    """None once this process has left the others."""
    from jax._src import distributed  # JAX has no public name for what its processes say to each other

    return distributed.global_state.client
