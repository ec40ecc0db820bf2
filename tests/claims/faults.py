"""The faults that a soak test strikes a run with, and what each may cost it.

Invariant: whatever a fault broke is mended when it has struck, but for the checkpoints that it damaged: these the next
attempt must name, and do without.
"""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.scripts.runs import Layout, Training, rows, saving
from tests.scripts.scene import NAME, Scene, mount, require


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that breaks an attempt. `strike` says in a word what happened."""

    name: str
    strike: Callable[[Scene, Training], str]
    several: bool = False
    """Whether it takes a run of several processes."""
    restarts: int = 0
    begins: bool = True
    """Whether the attempt gets as far as to read a checkpoint."""

    def suits(self, layout: Layout) -> bool:
        return layout.processes > 1 or not self.several


def _end(training: Training, status: int, words: str = "") -> None:
    ended = training.end(90)
    require(ended == status, f"ended with status {ended} instead of {status}", training)
    require(words in training.err.read_text(), f"did not say {words!r}", training)


def _kill_one(scene: Scene, training: Training) -> str:
    """SIGKILL to one process of the run, which must end all of it, and at once."""
    workers = training.workers()
    number = scene.rng.randrange(len(workers))
    os.kill(workers[number], signal.SIGKILL)
    if training.layout.processes > 1:
        _end(training, 128 + signal.SIGKILL, f"process {number} was killed by SIGKILL")
    else:
        _end(training, -signal.SIGKILL)
    return f"process {number} at step {rows(scene.run)[-1]['step']}"


def kill_process(scene: Scene, training: Training) -> str:
    scene.advance(training)
    return _kill_one(scene, training)


def kill_in_save(scene: Scene, training: Training) -> str:
    scene.wait_for(training, saving(scene.run, scene.start + 1))
    return _kill_one(scene, training)


def kill_launcher(scene: Scene, training: Training) -> str:
    """SIGKILL to what started the processes: they must not live on."""
    scene.advance(training)
    workers = training.workers()
    training.kill()
    limit = time.monotonic() + 20
    while any(_alive(pid) for pid in workers):
        require(time.monotonic() < limit, "outlived the process that started it", training)
        time.sleep(0.01)
    return f"at step {rows(scene.run)[-1]['step']}"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_and_restart(scene: Scene, training: Training) -> str:
    """SIGKILL to one process; launch.py must start all again, and they must go on from the newest checkpoint."""
    scene.advance(training)
    scene.begin_again()
    os.kill(scene.rng.choice(training.workers()), signal.SIGKILL)
    struck = time.monotonic()
    scene.wait_for(training, lambda: True)
    first = rows(scene.run)[-1]["step"] if rows(scene.run) else 0
    scene.wait_for(training, lambda: (rows(scene.run) or [{"step": 0}])[-1]["step"] > first)
    seconds = time.monotonic() - struck
    training.process.send_signal(signal.SIGTERM)
    _end(training, 0, "was killed by SIGKILL")
    return f"{seconds:.1f} s to the first resumed step"


def terminate(scene: Scene, training: Training) -> str:
    """SIGTERM to the run: it saves and stops."""
    scene.advance(training)
    training.process.send_signal(signal.SIGTERM)
    _end(training, 0, "stopped   at step")
    return f"saved step {max(scene.trusted())}"


def terminate_one(scene: Scene, training: Training) -> str:
    """SIGTERM to one process: all of them save and stop at the same step."""
    scene.advance(training)
    os.kill(scene.rng.choice(training.workers()), signal.SIGTERM)
    _end(training, 0, "stopped   at step")
    return f"saved step {max(scene.trusted())}"


def hang(scene: Scene, training: Training) -> str:
    """One process goes on no more, though it lives and its heart beats: all must end, each with its stacks shown."""
    scene.advance(training)
    workers = training.workers()
    number = scene.rng.randrange(len(workers))
    os.kill(workers[number], signal.SIGUSR1)
    _end(training, 5, "(--step-timeout)")
    words = training.err.read_text()
    for prefix in [f"[{index}] " for index in range(len(workers))] if training.layout.processes > 1 else [""]:
        shown = re.search(rf"^{re.escape(prefix)}.*most recent call", words, re.MULTILINE)
        require(shown is not None, f"did not show the stacks of process {prefix}", training)
    require("in hang" in words, "did not show where it hung", training)
    return f"process {number} at step {rows(scene.run)[-1]['step']}"


def fail_device(scene: Scene, training: Training) -> str:
    scene.advance(training)
    workers = training.workers()
    number = scene.rng.randrange(len(workers))
    os.kill(workers[number], signal.SIGUSR2)
    _end(training, 5, "lost a device: INTERNAL: the device halted")
    return f"of process {number} at step {rows(scene.run)[-1]['step']}"


def _damage(scene: Scene, training: Training, alter: Callable[[Path], None]) -> str:
    scene.advance(training)
    scene.wait_for(training, lambda: len(scene.trusted()) > 1)  # one to damage, and the one before
    _kill_one(scene, training)
    step = max(scene.trusted())
    folder = scene.run / "checkpoints" / str(step)
    file = scene.rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))
    alter(file)
    scene.damaged = [step]
    return f"{file.relative_to(folder.parent)}"


def truncate_file(scene: Scene, training: Training) -> str:
    return _damage(scene, training, lambda file: os.truncate(file, file.stat().st_size // 2))


def flip_byte(scene: Scene, training: Training) -> str:
    def alter(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[scene.rng.randrange(len(content))] ^= 1 << scene.rng.randrange(8)
        file.write_bytes(content)

    return _damage(scene, training, alter)


def put_file_in_place(scene: Scene, training: Training) -> str:
    """A file where the checkpoints should be; the attempt that strikes here has not begun to train."""
    folder, away = scene.run / "checkpoints", scene.run / "checkpoints.away"
    training.kill()
    if folder.exists():
        folder.rename(away)
    scene.run.mkdir(exist_ok=True)
    if not (scene.run / "config.json").exists():
        scene.run.rmdir()
        return "there is no run yet"
    folder.touch()
    refused = Training(scene.folder, NAME, training.layout, scene.flags, disk=scene.disk)
    try:
        _end(refused, 2, "is a file")
    finally:
        folder.unlink()
        if away.exists():
            away.rename(folder)
    return "refused with status 2"


def fill_disk(scene: Scene, training: Training) -> str:
    scene.advance(training)
    filler = scene.disk / "filler"
    try:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 12))
        _end(training, 3, "error: ")
    finally:
        filler.unlink()
    return "ended with status 3"


def make_read_only(scene: Scene, training: Training) -> str:
    scene.advance(training, 6)
    folder = str(scene.run / "checkpoints")
    mount("--bind", folder, folder)
    try:
        mount("-o", "remount,bind,ro", folder)
        scene.wait_for(training, lambda: "could not be saved" in training.err.read_text())
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
    failed = max(scene.trusted(), default=0)
    scene.wait_for(training, lambda: max(scene.trusted(), default=0) > failed)
    return f"saved again at step {max(scene.trusted())}; then {_kill_one(scene, training)}"


FILE_IN_PLACE = Fault("a file in place of the checkpoints", put_file_in_place, begins=False)
SMOKE = [
    Fault("kill -9 in a save", kill_in_save),
    Fault("flipped byte", flip_byte),
    Fault("kill -9 of a process, restarted", kill_and_restart, several=True, restarts=1),
]
FAULTS = [
    Fault("kill -9 of a process", kill_process),
    *SMOKE[:2],
    Fault("SIGTERM", terminate),
    SMOKE[2],
    FILE_IN_PLACE,
    Fault("SIGTERM to a process", terminate_one),
    Fault("kill -9 of the launcher", kill_launcher, several=True),
    Fault("truncated file", truncate_file),
    Fault("hung process", hang),
    Fault("device error", fail_device),
]
MOUNT_FAULTS = [Fault("full disk", fill_disk), Fault("read-only disk", make_read_only)]
