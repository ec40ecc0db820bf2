"""Fakes of the programs that a host of a TPU has and this machine need not have: one file, called by many names.

sudo runs its command; systemd-run and systemctl keep one unit, in a process group of its own; curl is the metadata
server; lsof names a process that was left over; pip installs a uv that makes an environment of this very Python; sleep
takes a hundredth of the time.

Invariant: each notes its command line in $HOME/calls.jsonl, and it needs Python's library alone.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ["HOME"])


def main(name, args):
    with contextlib.suppress(FileNotFoundError), (HOME / "calls.jsonl").open("a") as calls:  # of a host that is gone
        calls.write(json.dumps([name, *args]) + "\n")
    return PROGRAMS[name](args)


def sudo(args):
    os.execvp(args[0], args)


def systemd_run(args):
    at = next(i for i, arg in enumerate(args) if not arg.startswith("--"))
    given = dict(arg.removeprefix("--setenv=").split("=", 1) for arg in args[:at] if arg.startswith("--setenv="))
    unit = subprocess.Popen(
        args[at:],
        cwd="/",
        env={**given, "FAKE_GCLOUD": os.environ["FAKE_GCLOUD"]},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(HOME / "journal").open("a"),
        start_new_session=True,
    )
    (HOME / "unit.pid").write_text(str(unit.pid))


def systemctl(args):
    leader = HOME / "unit.pid"
    pid = int(leader.read_text()) if leader.exists() else 0
    if args[0] == "stop" and is_alive(pid):
        os.killpg(pid, signal.SIGTERM)
        for _ in range(1000):
            if not is_alive(pid):
                break
            time.sleep(0.01)
    if args[0] == "is-active" and is_alive(pid):
        return 0
    if pid:  # nothing of a unit outlives it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return 0 if args[0] == "stop" else 3


def is_alive(pid):
    """A zombie is not: who reaps it is not ours to say."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def curl(args):
    """The worker's number in its slice."""
    hosts = json.loads((Path(os.environ["FAKE_GCLOUD"]) / "scenario.json").read_text()).get("hosts", 1)
    print(int(HOME.name) % hosts, end="")


def lsof(args):
    holder = HOME / "holder"
    if holder.exists() and is_alive(int(holder.read_text())):
        print(holder.read_text())


def python3(args):
    """Only `-m pip install uv`."""
    uv = HOME / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True, exist_ok=True)
    uv.write_text((Path(os.environ["FAKE_GCLOUD"]) / "host-bin" / "sudo").read_text().replace("sudo", "uv"))
    uv.chmod(0o755)


def uv(args):
    if args[0] == "venv":
        python = Path(args[-1]) / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
        python.chmod(0o755)


def sleep(args):
    time.sleep(float(args[0]) / 100)


PROGRAMS = {
    "sleep": sleep,
    "sudo": sudo,
    "systemd-run": systemd_run,
    "systemctl": systemctl,
    "curl": curl,
    "lsof": lsof,
    "python3": python3,
    "uv": uv,
}

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
