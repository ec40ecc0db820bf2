"""Real training runs, started as a user starts them: one process of train.py, or several through launch.py.

Invariant: a run started here has the devices that its layout names, whatever the environment says, and compiled
programs are kept in one folder, since the same ones are started often.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scripts.launching.local import local_environment

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ROOT / "scripts"
SMALL = [*("--model.num-layers", "1", "--model.embed-dim", "32"), *("--model.mlp-dim", "32", "--model.head-dim", "8")]
SHORT = [*("--steps", "12", "--batch-size", "16", "--seq-len", "16"), *("--log-interval", "4", "--eval-interval", "6")]
TIMING = {"tokens_per_second", "step_time", "mfu"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a run is placed: flags of train.py, over processes of so many simulated devices."""

    flags: tuple[str, ...] = ()
    processes: int = 1
    devices: int = 1

    def __str__(self) -> str:
        """As in `2 × 4, mesh fsdp=8`."""
        words = [word for word in self.flags if word not in ("--strategy", "--mesh")]
        if "pmap" in words:
            words.insert(1, str(self.processes * self.devices))
        elif "mesh" not in words:
            words.insert(0, "single")
        name = " ".join(word.removeprefix("--") for word in words)
        return f"{self.processes} × {self.devices}, {name}" if self.processes > 1 else name


def single(*flags: str) -> Layout:
    return Layout(flags)


def pmap(devices: int, processes: int = 1, *flags: str) -> Layout:
    return Layout(("--strategy", "pmap", *flags), processes, devices // processes)


def mesh(shape: str, processes: int = 1, *flags: str) -> Layout:
    devices = 1
    for part in shape.split(","):
        devices *= int(part.partition("=")[2].partition("@")[0])
    return Layout(("--strategy", "mesh", "--mesh", shape, *flags), processes, devices // processes)


def run_script(script: str, *args: str, cwd: Path, env: dict[str, str] | None = None, stdin: str = ""):
    """A script from its start to its end, in a process of its own: its exit status and, as text, what it wrote."""
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, args)],
        cwd=cwd,
        env=os.environ | (env or {}),
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=900,
        check=False,
    )


class Training:
    """A run under way in `folder`/`name`, with its output in files there, so that nothing waits to be read.

    Args:
      disk: where the run folder is, if not in `folder`.
      restarts: how often launch.py may start it again.
      path: a folder whose modules Python finds before all others.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        layout: Layout,
        flags: list[str],
        *,
        disk: Path | None = None,
        restarts: int = 0,
        path: Path | None = None,
    ):
        self.run, self.layout = (disk or folder) / name, layout
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        train = [*flags, *layout.flags, "--output-dir", str(self.run)]
        several = ["launch.py", "local", "--processes", str(layout.processes)]
        several += ["--devices", str(layout.devices), "--restarts", str(restarts)]
        script, *arguments = [*several, "--", *train] if layout.processes > 1 else ["train.py", *train]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        # A run that is killed may leave half of a program there: few programs, so that it hardly ever does.
        kept = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        first = {"PYTHONPATH": str(path)} if path else {}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPTS / script), *arguments],
                cwd=folder,
                env=cache | local_environment(os.environ, layout.devices) | kept | first,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def workers(self) -> list[int]:
        """Process ids of the train.py processes that are alive."""
        if self.layout.processes == 1:
            return [self.process.pid] if self.process.poll() is None else []
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with contextlib.suppress(OSError):
            return [int(pid) for pid in children.read_text().split()]
        return []

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300) -> bool:
        """Waits until the condition holds, or the run has ended: whether it held."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if condition():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        raise RuntimeError(f"nothing happened for {seconds} s\n{self.words()}")

    def kill(self) -> None:
        """SIGKILL to the run as a whole."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self, seconds: float = 600) -> int:
        """Its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"the run did not end within {seconds} s\n{self.words()}") from None

    def finish(self) -> str:
        """Waits for a run to end well; the last line that it printed, without the number of its process."""
        status = self.end()
        if status != 0:
            raise RuntimeError(f"exit status {status}\n{self.words()}")
        return self.out.read_text().splitlines()[-1].removeprefix("[0] ")

    def words(self) -> str:
        """The end of what it said to the person who watches."""
        return "\n".join(self.err.read_text().splitlines()[-25:])


def rows(run: Path) -> list[dict]:
    """The rows of metrics.jsonl that a reader finds now, a torn last line left out, without their timing."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [{name: value for name, value in json.loads(line).items() if name not in TIMING} for line in lines]


def reached(run: Path, step: int) -> Callable[[], bool]:
    """Whether the run has logged that step or a later one."""
    return lambda: any(row["step"] >= step for row in rows(run)[-2:])


def saving(run: Path, step: int) -> Callable[[], bool]:
    """Whether a checkpoint of that step or later is being written right now."""

    def now() -> bool:
        drafts = (run / "checkpoints").glob("*.orbax-checkpoint-tmp*")
        return any(int(draft.name.partition(".")[0]) >= step for draft in drafts)

    return now


def checkpoints(run: Path) -> list[int]:
    """The steps that have a folder."""
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal())
