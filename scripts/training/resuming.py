"""A run that goes on: what it was before, and the command that goes on with it.

Invariant: a command that is printed is whole. Pasted where the run was started, it goes on with the same layout.
"""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
from etils import epath

from parallax.config import OptimizerConfig
from parallax.storage import is_of_storage, reason_of
from parallax.training.checkpoint import Checkpointer
from parallax.training.loop import Diverged
from scripts.training.flags import LAYOUT, Flags, changes, flags_from_dict
from scripts.training.job import Job


def resume_command(flags: Flags, folder: epath.Path, *changed: str) -> str:
    """What to type to go on with a run in `folder`, with flags that differ from the run's in `changed`."""
    words = ["--resume", "--output-dir", str(folder)]
    for name in ("data_dir", *LAYOUT):
        value, usual = getattr(flags, name), "single" if name == "strategy" else getattr(Flags, name)
        if name != "mode" and value != usual:  # a strategy says all that a mode does
            words += [f"--{name.replace('_', '-')}", value]
    words += ["--print-param-hash"] if flags.print_param_hash else []
    words += [] if flags.step_timeout is None else ["--step-timeout", f"{flags.step_timeout:g}"]
    words += changed
    processes, devices = jax.process_count(), jax.local_device_count()
    simulated = jax.default_backend() == "cpu" and flags.strategy != "single" and devices > 1
    if processes == 1:
        return f"{f'JAX_NUM_CPU_DEVICES={devices} ' if simulated else ''}{_program('train')} {shlex.join(words)}"
    address = flags.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if address.startswith(("127.", "localhost:")):
        local = f"{_program('launch')} local --processes {processes} --devices {devices}"
        return f"{local} -- {shlex.join(words)}"
    cluster = f" --coordinator {address} --num-processes {processes} --process-id I" if address else ""
    # As the number of a process, its devices are its own, and others have others.
    cluster += " --local-device-ids IDS" if flags.local_device_ids else ""
    return f"{_program('train')} {shlex.join(words)}{cluster} (in each of {processes} processes)"


def describe_remedy(job: Job, checkpoints: Checkpointer, failure: Exception) -> str:
    """The newest checkpoint and, for a run that diverged, the command that goes on from it in another way."""
    flags, folder = job.flags, job.folder
    try:
        latest = checkpoints.latest_step()
    except Exception as error:
        if not is_of_storage(error):
            raise
        return f"{folder} does not say what is saved ({reason_of(error)}); go on with --resume when it does"
    saved = f"{folder} has no checkpoint"
    if latest is not None:
        saved = f"the last good checkpoint is step {latest} of {folder}"
    if not isinstance(failure, Diverged):
        return saved
    if latest is not None and latest >= failure.last_finite:
        saved = f"no step from checkpoint {latest} of {folder} was finite"
    rate = min(flags.learning.learning_rate / 10, OptimizerConfig().learning_rate)
    narrow = ", or with --dtype float32 instead of that rate" if flags.model.dtype != "float32" else ""
    return f"{saved}; try {resume_command(flags, folder, '--learning-rate', f'{rate:g}')}{narrow}"


def _program(script: str) -> str:
    """`parallax train`, or `python scripts/train.py`, as this process was called."""
    called = sys.argv[0]
    if called.startswith("parallax "):
        return f"parallax {script}"
    return f"python {shlex.quote(str(Path(called).with_name(f'{script}.py')))}"


class Earlier:
    """What config.json says of the run before this attempt writes its own.

    Raises ValueError if it is not the config of a run.
    """

    def __init__(self, folder: epath.Path):
        self._values = json.loads((folder / "config.json").read_text())
        self._flags = flags_from_dict(self._values)

    def describe_layout(self) -> str:
        """Where the run was placed before; in a run that older code began, by its flags."""
        run = self._values["run"]
        return self._values.get("layout") or " ".join(filter(None, (run["strategy"], run["mesh"])))

    def changes(self, flags: Flags) -> dict[str, list[Any]]:
        """Flags to [before, now], of how the run learns; not of where it is placed."""
        return {
            change.flag: [change.before, change.after] for change in changes(self._flags, flags) if change.part != "run"
        }
