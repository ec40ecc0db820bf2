"""`launch.py local`: one run as several processes of this machine, with simulated devices.

Invariant: what the processes know about each other comes from here alone, never from the environment.
"""

import contextlib
import dataclasses
import datetime
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scripts.common.command_line import flag_name, flag_value, parse, split_at_dashes
from scripts.launching.child import Command
from scripts.launching.supervisor import FIRST_PAUSE, supervise

TRAIN = Path(__file__).resolve().parent.parent / "train.py"

DESCRIPTION = """Run train.py on this machine, with the flags after --, as several processes forming one cluster:

launch.py local --processes 4 --devices 2 -- --mode distributed --steps 100

Their output is shown line by line behind the number of the process. The first process that fails ends the others. The
first SIGTERM or Ctrl-C lets all of them save and stop, the second kills them.

Exit status: 0 finished, or stopped as asked; 1 failed; 2 bad input; 3 failed through something outside, 4 lost a
process of the run, 5 lost a device, and each of these may be started again; 128 + n if a process was killed by
signal n."""

OWN_FLAGS = ("--coordinator", "--num-processes", "--process-id", "--local-device-ids")
"""Flags of train.py that are not the user's to give."""
FOREIGN = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_COORDINATOR_BIND_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "JAX_LOCAL_DEVICE_IDS",
)
"""Variables that describe another cluster."""
MOST_PROCESSES = 64
"""Each is a Python with JAX and the model of its own: a number mistyped could take all memory of the machine."""


@dataclasses.dataclass(frozen=True)
class LocalFlags:
    processes: int = 2
    """How many processes."""
    devices: int = 1
    """Simulated devices of each."""
    restarts: int = 0
    """How often to go on from the last checkpoint after a process was killed or lost something outside it; counted from
    the newest checkpoint on. After three crashes in one step it is not started again."""
    log_dir: str | None = None
    """Where attempt-K/process-I.log keeps all output; by default OUTPUT_DIR.logs, or runs/local-TIME.logs."""

    def __post_init__(self):
        for name, least, good in (("processes", 1, 2), ("devices", 1, 1), ("restarts", 0, 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}; try --{name} {good}")
        if self.processes > MOST_PROCESSES:
            rule = f"processes={self.processes} of one machine must be at most {MOST_PROCESSES}"
            raise ValueError(f"{rule}; try --processes 2, with more --devices")


def local(args: Sequence[str], train: Path = TRAIN, pause: float = FIRST_PAUSE) -> int:
    """Runs train.py on this machine; `args` are what follows the command's name, `train` is the program.

    The first restart comes after `pause` seconds.

    Raises ValueError if a flag is wrong, or the log folder cannot be made.
    """
    own, train_flags = split_at_dashes(args)
    flags = parse(LocalFlags, description=DESCRIPTION, args=own)
    if train_flags is None:
        raise ValueError("-- is missing before the flags of train.py; try launch.py local --processes 2 -- --steps 100")
    for arg in train_flags:
        if flag_name(arg) in OWN_FLAGS:
            raise ValueError(f"{flag_name(arg)} is given to each process by launch.py; leave it out")
    folder = flag_value(train_flags, "--output-dir") or None
    if flags.restarts and folder is None:
        raise ValueError(
            f"--restarts {flags.restarts} needs a run folder to go on from; add --output-dir runs/NAME after --"
        )
    log_dir = _log_dir(folder) if flags.log_dir is None else Path(flags.log_dir)
    commands = local_commands(flags, train_flags, train)
    return supervise(
        commands, restarts=flags.restarts, log_dir=log_dir, newest=lambda: newest_checkpoint(folder), pause=pause
    )


def newest_checkpoint(folder: str | None) -> int | None:
    """The step of a run folder's newest trusted checkpoint; None if there is none or the folder does not answer."""
    if folder is None:
        return None
    from parallax.storage import open_folder

    with contextlib.suppress(ValueError, OSError):
        found = [path.parent.name for path in open_folder(folder).glob("checkpoints/*/manifest.json")]
        return max((int(name) for name in found if name.isdecimal()), default=None)
    return None


def local_commands(flags: LocalFlags, train_flags: Sequence[str], train: Path) -> Callable[[int], list[Command]]:
    """From the attempt, 1 at first, to the command of each process. Every attempt has a port of its own."""
    env, ports = local_environment(os.environ, flags.devices), set()

    def commands(attempt: int) -> list[Command]:
        resume = ["--resume"] if attempt > 1 and "--resume" not in train_flags else []
        port = free_port()
        while port in ports:  # one of an attempt that died may not be heard at once
            port = free_port()
        ports.add(port)
        program = [sys.executable, str(train), *train_flags, *resume]
        cluster = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(flags.processes)]
        return [Command([*program, *cluster, "--process-id", str(i)], env) for i in range(flags.processes)]

    return commands


def local_environment(environ: Mapping[str, str], devices: int) -> dict[str, str]:
    """The environment of a process that has `devices` simulated devices, whatever was said of devices before."""
    env = {name: value for name, value in environ.items() if name not in FOREIGN}
    counts = r"(?<!\S)--xla_force_host_platform_device_count=\S*"
    if "XLA_FLAGS" in env:
        env["XLA_FLAGS"] = re.sub(counts, "", env["XLA_FLAGS"]).strip()
    return env | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """A TCP port of the loopback interface that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _log_dir(output_dir: str | None) -> Path:
    """Beside the run folder, which train.py must find absent or as it left it."""
    if output_dir is None or "://" in output_dir:
        return Path("runs") / f"local-{datetime.datetime.now():%Y%m%d-%H%M%S}.logs"
    return Path(f"{os.path.normpath(output_dir)}.logs")
