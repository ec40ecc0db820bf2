"""Cloud TPUs through the gcloud program: what its command lines are, and what its answers mean.

Invariant: a command line is built here alone, so that what is shown beforehand is what runs; and an answer that cannot
be understood is an error, never taken for "there is nothing".
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from scripts.common.command_line import Switch

RUNTIMES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
    "tpu7x": "v2-alpha-tpu7-ubuntu2404",
}
"""From the generation in an accelerator's name to the software that its hosts start with."""
RENTED_AS = {"v5e": "v5litepod", "v7x": "tpu7x"}
"""What gcloud calls a generation that others, plan.py too, call otherwise."""
PASSING = (
    *("no more capacity", "nsufficient", "tockout", '"code": 8', '"code": 10', '"code": 13'),
    *("UNAVAILABLE", "onnection", "timed out", "nable to find the server"),
)
"""Parts of messages about what may yet be had: stock-outs and what is said for one (aborted, internal error), and a
network that is away."""
SSH_FAILED = 255
"""What ssh, and so gcloud, exits with where a host could not be reached."""
ANSWER_SECONDS = 150
"""How long all hosts together may take to report; ssh would wait for a dead one for many minutes."""
DESCRIBE_SECONDS = 120
"""How long a description may take, which takes a second; a connection that died says nothing."""


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One TPU as flags ask for it: a node of one or more hosts, perhaps through a queued resource of the same name.

    Several slices are nodes NAME-0, NAME-1 … of one queued resource: all are given, and all taken, at once.
    """

    name: str = "parallax-dev-tpu"
    """Of the TPU, and of its queued resource."""
    zone: str = "us-central1-a"
    """Where it is."""
    accelerator: str = "v3-8"
    """GENERATION-SIZE; the size counts cores, but chips for v5e (also v5litepod) and v6e."""
    slices: int = 1
    """How many of these, connected by the data-center network, which one axis of --mesh crosses, as in
    data=2@dcn,fsdp=256. They are asked for together, through a queued resource."""
    runtime: str | None = None
    """Software of its hosts; by default the one for its generation."""
    spot: Switch = False
    """Cheaper, and taken away when Google Cloud needs it."""
    queued: Switch = False
    """Ask through a queued resource, which waits in line."""
    reservation: str | None = None
    """Take it from this reservation, with --queued; any takes it from one that fits."""
    flex_start_hours: float | None = None
    """Ask by flex-start, with --queued: for so many hours at most, after which it is taken back."""
    external_ips: Switch = False
    """Give its hosts public addresses; by default they have none, and are reached by an IAP tunnel."""
    project: str | None = None
    """By default that of gcloud."""
    service_account: str | None = None
    """As whom its hosts act; by default as the project's compute account."""
    network: str | None = None
    """By default the network "default"."""
    subnetwork: str | None = None
    """By default the network's subnetwork in that region."""

    def __post_init__(self):
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", self.name):
            raise ValueError(f"--name {self.name} must be small letters, digits and dashes; try parallax-dev-tpu")
        if not re.fullmatch(r"[a-z]+-[a-z]+\d-[a-z]", self.zone):
            raise ValueError(f"--zone {self.zone} must be a zone of Google Cloud; try us-central1-a")
        generation, _, size = self.accelerator.partition("-")
        generation = RENTED_AS.get(generation, generation)
        if generation not in RUNTIMES or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--accelerator {self.accelerator} must be GENERATION-SIZE with a generation of "
                f"{', '.join([*RUNTIMES, *RENTED_AS])}; try v3-8"
            )
        object.__setattr__(self, "accelerator", f"{generation}-{size}")
        if not 1 <= self.slices <= 256:
            raise ValueError(f"--slices {self.slices} must be from 1 to 256; try --slices 2")
        if self.slices > 1:  # only there can they be asked for together
            object.__setattr__(self, "queued", True)
        self._check_tier()

    def _check_tier(self) -> None:
        flags = {
            "--spot": self.spot,
            f"--reservation {self.reservation}": self.reservation is not None,
            f"--flex-start-hours {self.flex_start_hours or 0:g}": self.flex_start_hours is not None,
        }
        asked = [flag for flag, given in flags.items() if given]
        if len(asked) > 1:
            raise ValueError(f"{asked[0]} and {asked[1]} are two ways to pay for one TPU; leave one out")
        if self._is_alpha() and not self.queued:
            raise ValueError(f"{asked[0]} is had through a queued resource alone; add --queued")
        if self.flex_start_hours is not None and not 0 < self.flex_start_hours <= 168:
            raise ValueError(f"{asked[0]} must be over 0 and at most 168, a week; try --flex-start-hours 6")

    def _is_alpha(self) -> bool:
        """Whether only gcloud's alpha commands know how to ask for it."""
        return self.flex_start_hours is not None or self.reservation not in (None, "any")

    def nodes(self) -> list["Tpu"]:
        """The node of each slice."""
        if self.slices == 1:
            return [self]
        return [dataclasses.replace(self, name=f"{self.name}-{i}", slices=1) for i in range(self.slices)]

    def create(self) -> list[str]:
        runtime = self.runtime or RUNTIMES[self.accelerator.partition("-")[0]]
        if self.queued:
            track = ["alpha"] if self._is_alpha() else []
            nodes = [f"--node-id={self.name}"]
            if self.slices > 1:
                nodes = [f"--node-count={self.slices}", f"--node-prefix={self.name}"]
            argv = self._argv("queued-resources", "create", *nodes, track=track)
            argv.append(f"--runtime-version={runtime}")
        else:
            argv = self._argv("tpu-vm", "create", f"--version={runtime}")
        argv.append(f"--accelerator-type={self.accelerator}")
        for name in ("service_account", "network", "subnetwork"):
            if getattr(self, name) is not None:
                argv.append(f"--{name.replace('_', '-')}={getattr(self, name)}")
        if self.flex_start_hours is not None:
            seconds = round(self.flex_start_hours * 3600)
            argv += ["--provisioning-model=flex-start", f"--max-run-duration={seconds}s"]
        if self.reservation is not None:
            argv.append("--reserved" if self.reservation == "any" else f"--reservation={self.reservation}")
        switches = {"--internal-ips": not self.external_ips, "--spot": self.spot}
        return [*argv, *(switch for switch, on in switches.items() if on), "--quiet"]

    def describe(self) -> list[str]:
        return self._argv("tpu-vm", "describe", "--format=json")

    def describe_queued(self) -> list[str]:
        return self._argv("queued-resources", "describe", "--format=json")

    def delete(self) -> list[str]:
        return self._argv("tpu-vm", "delete", "--quiet")

    def delete_queued(self) -> list[str]:
        """With --force its node is deleted too."""
        return self._argv("queued-resources", "delete", "--force", "--quiet")

    def ssh(self, command: str, worker: str = "all") -> list[str]:
        """A line of bash on one host or, by default, on all of them at once."""
        where = [f"--worker={worker}", f"--command={command}", "--quiet"]
        if self.external_ips:
            return self._argv("tpu-vm", "ssh", *where)
        return self._argv("tpu-vm", "ssh", "--tunnel-through-iap", *where, track=["alpha"])

    def _argv(self, kind: str, verb: str, *flags: str, track: Sequence[str] = ()) -> list[str]:
        argv = ["gcloud", *track, "compute", "tpus", kind, verb, self.name, f"--zone={self.zone}", *flags]
        return argv if self.project is None else [*argv, f"--project={self.project}"]


def copy(source: str, destination: str) -> list[str]:
    """Between files and gs:// addresses; - is standard input or output."""
    return ["gcloud", "storage", "cp", source, destination, "--quiet"]


def list_objects(pattern: str) -> list[str]:
    return ["gcloud", "storage", "ls", pattern]


INCOMPLETE = "INCOMPLETE"
"""Our word for the state of slices some of which are not there."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A TPU as Google Cloud describes it, or all of its slices as one."""

    state: str
    accelerator: str
    hosts: int
    health: str

    @property
    def ready(self) -> bool:
        return self.state == "READY"

    @property
    def lost(self) -> bool:
        """Whether it will never be ready again, and must be deleted before another has its name."""
        return self.state in ("PREEMPTED", "TERMINATED", INCOMPLETE)

    @property
    def returning(self) -> bool:
        """Whether it will be ready again by itself: to delete it would mean to queue for another."""
        return self.state in ("REPAIRING", "RESTARTING", "REIMAGING", "STARTING", "UNHIDING")


class GcloudError(RuntimeError):
    """gcloud did not do what it was asked; its message, in one line."""

    def __init__(self, argv: Sequence[str], status: int, words: str):
        self.status, self.words, self.out = status, words, ""
        said = words.rpartition("ERROR:")[2] or f"exit status {status}"
        super().__init__(f"{' '.join(argv[:6])} failed: {' '.join(said.split())[:400]}")

    @property
    def not_found(self) -> bool:
        return "NOT_FOUND" in self.words

    @property
    def may_pass(self) -> bool:
        """Whether the same request may succeed later; a quota that is used up does not count."""
        return "quota" not in self.words.lower() and any(part in self.words for part in PASSING)

    @property
    def unreachable(self) -> bool:
        """Whether gcloud or ssh failed, not the command on the host."""
        failed = re.search(r"ERROR: \(gcloud\.(alpha\.)?compute\.", self.words)  # a host's own gcloud may fail too
        return self.status == SSH_FAILED or failed is not None


def run(argv: Sequence[str], *, stdin: bytes | None = None, seconds: float | None = None) -> str:
    """Runs gcloud to its end; what it printed on standard output.

    It is out of reach of the terminal's Ctrl-C, and killed if an exception, as of a signal, arrives here.

    Raises:
      GcloudError: its exit status is not 0, or it did not end within so many seconds.
      ValueError: there is no gcloud.
    """
    return run_all([argv], stdin=stdin, seconds=seconds)


def run_all(argvs: Sequence[Sequence[str]], *, stdin: bytes | None = None, seconds: float | None = None) -> str:
    """As `run`, several at the same time; what all printed.

    Raises:
      GcloudError: that of the first that failed, once all have ended, with what all printed.
      ValueError: there is no gcloud.
    """
    started: list[subprocess.Popen[bytes]] = []
    until = None if seconds is None else time.monotonic() + seconds
    outs: list[str] = []
    errors: list[GcloudError] = []
    try:
        started += (_start(argv, stdin is not None) for argv in argvs)
        for argv, process in zip(argvs, started, strict=True):
            try:
                out, err = process.communicate(stdin, None if until is None else max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired as late:
                _kill(process)
                outs.append(_text(late.output or b""))
                errors.append(GcloudError(argv, SSH_FAILED, f"ERROR: timed out, no answer within {seconds:g} s"))
                continue
            outs.append(_text(out))
            if process.returncode:
                errors.append(GcloudError(argv, process.returncode, _text(err)))
    finally:
        for process in started:
            if process.poll() is None:
                _kill(process)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
    if errors:
        errors[0].out = "".join(outs)
        raise errors[0]
    return "".join(outs)


def _start(argv: Sequence[str], reads: bool) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603 - gcloud with an argv and no shell
            argv,
            stdin=subprocess.PIPE if reads else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise ValueError(
            f"{argv[0]} is not on PATH; install the Google Cloud CLI, https://cloud.google.com/sdk/docs/install"
        ) from None


def find_node(tpu: Tpu) -> Node | None:
    """The node as it is now, or those of all slices as one; None if there is none. Raises GcloudError."""
    found = [_find_one(node) for node in tpu.nodes()]
    there = [node for node in found if node is not None]
    if not there:
        return None
    # As well as the worst of them: lost, of no use now, coming back, ready.
    worst = min(there, key=lambda node: (not node.lost, node.ready or node.returning, node.ready))
    state = worst.state if len(there) == len(found) else INCOMPLETE
    return dataclasses.replace(worst, state=state, hosts=sum(node.hosts for node in there))


def _find_one(tpu: Tpu) -> Node | None:
    facts = _describe(tpu.describe())
    if facts is None:
        return None
    accelerator = str(facts.get("acceleratorType", "")).rpartition("/")[2]
    hosts = len(facts.get("networkEndpoints", ()))
    return Node(str(facts.get("state", "UNKNOWN")), accelerator, hosts, str(facts.get("health", "")))


def find_queued(tpu: Tpu) -> str | None:
    """The state of the queued resource; None if there is none. Raises GcloudError."""
    facts = _describe(tpu.describe_queued())
    return None if facts is None else str(facts.get("state", {}).get("state", "UNKNOWN"))


def _describe(argv: Sequence[str]) -> dict[str, Any] | None:
    try:
        text = run(argv, seconds=DESCRIBE_SECONDS)
    except GcloudError as error:
        if error.not_found:
            return None
        raise
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError):
        raise GcloudError(argv, 0, f"ERROR: not the description of a TPU: {text[:200]}") from None


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _text(content: bytes) -> str:
    return content.decode(errors="replace")
