"""A supervisor in a process of its own, over small Python programs, and what came of it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
HANG = 60  # seconds; far more than anything here takes

# The programs can wait for each other by files, and leave a file for each of their pids.
PRELUDE = """
import os, signal, subprocess, sys, time
from pathlib import Path

INDEX, ATTEMPT = (int(os.environ[name]) for name in ("INDEX", "ATTEMPT"))
def mark(name):
    Path(name).touch()
def wait(name):
    while not Path(name).exists():
        time.sleep(0.002)
def hang(*ignored):
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    mark(f"pid-{os.getpid()}")
    mark(f"up-{INDEX}")
    while True:
        time.sleep(600)
def leave_grandchild(new_session):
    child = subprocess.Popen(["sleep", "600"], start_new_session=new_session)  # it holds the pipes
    mark(f"pid-{child.pid}")
def save_on_sigterm(status=0):
    def note(number, frame):
        os.write(1, f"{signal.Signals(number).name}\\n".encode())
        if number == signal.SIGTERM:
            wait("saved")
            os._exit(status)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    hang()
"""

DRIVER = """
import json, os, resource, sys
from pathlib import Path
from scripts.launching.child import Command
from scripts.launching.supervisor import supervise

programs, restarts, log_dir, log_bytes, pause = json.loads(sys.argv[1])
if log_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (log_bytes, resource.RLIM_INFINITY))
def commands(attempt):
    return [
        Command([sys.executable, "-u", "-I", "-S", "-c", text],
                {**os.environ, "INDEX": str(index), "ATTEMPT": str(attempt)})
        for index, text in enumerate(programs)
    ]
raise SystemExit(supervise(commands, restarts=restarts, log_dir=Path(log_dir), pause=pause))
"""


def supervisions(tmp_path):
    """A fixture: starts programs under a supervisor, and leaves none of them behind."""
    groups = []

    def start(*programs, **settings):
        groups.append(Supervision(tmp_path, *programs, **settings))
        return groups[-1]

    yield start
    for group in groups:
        group.close()


class Supervision:
    """Programs under a supervisor that runs in `folder`, one process each."""

    def __init__(self, folder, *programs, restarts=0, log_dir="logs", log_bytes=0, pause=0):
        self.folder = folder
        arguments = json.dumps([[PRELUDE + text for text in programs], restarts, log_dir, log_bytes, pause])
        self.driver = subprocess.Popen(
            [sys.executable, "-S", "-c", DRIVER, arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def until(self, *names):
        """Waits for files of these names."""
        wait_until(lambda: all((self.folder / name).exists() for name in names))

    def mark(self, name):
        (self.folder / name).touch()

    def end(self):
        """Exit status and lines of standard error of the supervisor; `out` is then its standard output."""
        self.out, err = self.driver.communicate(timeout=HANG)
        return self.driver.returncode, err.decode().splitlines()

    def log(self, index, attempt=1):
        return (self.folder / "logs" / f"attempt-{attempt}" / f"process-{index}.log").read_bytes()

    def alive(self):
        """Pids of the processes that said that they exist, and still do."""
        pids = [int(path.name.removeprefix("pid-")) for path in self.folder.glob("pid-*")]
        return [pid for pid in pids if is_alive(pid)]

    def close(self):
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.driver.kill()
        self.driver.wait()
        self.driver.stdout.close()
        self.driver.stderr.close()


def state(pid):
    """Linux's letter for what a process does; Z is dead."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def is_alive(pid):
    """A zombie is not: who reaps an orphan is not ours to say."""
    try:
        os.kill(pid, 0)
        return not Path("/proc/self/stat").exists() or state(pid) != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until(condition):
    limit = time.monotonic() + HANG
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError("nothing happened")
        time.sleep(0.002)
