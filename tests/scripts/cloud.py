"""A cloud made of fakes for launch.py: gcloud on PATH, a git checkout to ship, and a stand-in for train.py.

Invariant: when a test ends, no process that it started on a host is left.
"""

import contextlib
import functools
import json
import os
import py_compile
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAKES = Path(__file__).parent
# It notes its flags, then plays what the test wrote for this attempt and this worker:
#   "exit N", "kill" (itself, by SIGKILL), "crash" (all of its unit), "wait" (until it is asked to stop), "preempt",
#   "halt" (a preemption by another name), "repair" (which takes three looks), "vanish", "cut off",
#   "save N" (then it ends with 3), "blink N" (as many descriptions fail; then it ends well)
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
world, home = Path(os.environ["FAKE_GCLOUD"]), Path(os.environ["HOME"])
starts = world / f"starts-{home.name}.jsonl"
with starts.open("a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ["JAX_PLATFORMS"]]) + "\\n")
attempt = len(starts.read_text().splitlines())
scenario = json.loads((world / "scenario.json").read_text())
play = scenario["plays"][attempt - 1]
play = play if isinstance(play, str) else play[int(home.name)]
print("attempt", attempt, "of worker", home.name)
print("plays", play, flush=True)
def save(number, frame):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
node = world / f"node-{int(home.name) // scenario.get('hosts', 1)}.json"
node = node if node.exists() else world / "node.json"
if play.startswith("exit"):
    sys.exit(int(play.split()[1]))
elif play == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif play == "crash":
    os.killpg(0, signal.SIGKILL)
elif play.startswith("blink"):
    (world / "blink").write_text(play.split()[1])
    while (world / "blink").read_text() != "0":
        time.sleep(0.01)
    sys.exit(0)
elif play in ("preempt", "halt"):
    state = {"preempt": "PREEMPTED", "halt": "STOPPED"}[play]
    node.write_text(json.dumps(json.loads(node.read_text()) | {"state": state}))
elif play == "repair":
    node.write_text(json.dumps(json.loads(node.read_text()) | {"state": "REPAIRING", "looks_left": 3}))
elif play.startswith("save"):
    run = sys.argv[sys.argv.index("--output-dir") + 1].removeprefix("gs://")
    manifest = world / "bucket" / run / "checkpoints" / play.split()[1] / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    sys.exit(3)
elif play == "vanish":
    node.rename(world / "node-that-was.json")
elif play == "cut off":
    node.write_text(json.dumps(json.loads(node.read_text()) | {"unreachable": [int(home.name)]}))
(home / "training").touch()
time.sleep(600)
"""
FAST = ["--poll-seconds", "0", "--retry-seconds", "0"]


class Cloud:
    """A world for fake_gcloud.py in `folder`, and a git checkout beside it."""

    def __init__(self, folder: Path):
        self.world, self.checkout = folder / "world", folder / "checkout"
        for name in ("bin", "host-bin", "bucket"):
            (self.world / name).mkdir(parents=True)
        self.play()
        for folder in ("bin", "host-bin"):
            python(self.world / folder / "gcloud", compiled_gcloud())
        for name in ("sudo", "systemd-run", "systemctl", "curl", "lsof", "python3", "sleep"):
            (self.world / "host-bin" / name).symlink_to(FAKES / "fake_host.sh")
        python(self.world / "python")  # what a host's environment has
        (self.checkout / "scripts/launching").mkdir(parents=True)
        shutil.copy(ROOT / "scripts/launching/host.sh", self.checkout / "scripts/launching")
        (self.checkout / "scripts" / "train.py").write_text(TRAIN)
        (self.checkout / "requirements.lock").touch()
        self.git("init", "--quiet")
        self.git("add", "--all")
        author = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        self.git(*author, "commit", "--quiet", "--message", "All")
        self.commit = self.git("rev-parse", "HEAD").strip()

    def git(self, *words):
        return subprocess.run(["git", "-C", self.checkout, *words], check=True, capture_output=True, text=True).stdout

    def play(self, **scenario):
        (self.world / "scenario.json").write_text(json.dumps({"plays": ["exit 0"], **scenario}))

    def environment(self):
        return {"FAKE_GCLOUD": str(self.world), "PATH": f"{self.world / 'bin'}:{os.environ['PATH']}"}

    def calls(self):
        """The command lines that launch.py gave to gcloud."""
        path = self.world / "gcloud.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def host_calls(self, worker=0):
        return [shlex.split(line) for line in (self.world / "hosts" / str(worker) / "calls").read_text().splitlines()]

    def starts(self, worker=0):
        """The flags of each start of train.py on a host."""
        path = self.world / f"starts-{worker}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)[0] for line in lines]

    def bills(self):
        """What exists and would be paid for."""
        names = ("node.json", "node-0.json", "node-1.json", "queued.json")
        return [name for name in names if (self.world / name).exists()]

    def objects(self):
        bucket = self.world / "bucket"
        return {str(path.relative_to(bucket)) for path in bucket.rglob("*") if path.is_file()}

    def close(self):
        for pid in (self.world / "hosts").glob("*/unit.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


@functools.cache
def compiled_gcloud():
    """Its bytecode: Python keeps none of a program, and to compile it takes a fifth of the time of a call."""
    return py_compile.compile(str(FAKES / "fake_gcloud.py"), doraise=True)


def python(path, *words):
    """A program at `path`: this Python with its library alone, given these words before its own."""
    path.write_text(f'#!/bin/sh\nexec {" ".join(map(str, [sys.executable, "-I", "-S", *words]))} "$@"\n')
    path.chmod(0o755)
