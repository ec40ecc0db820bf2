"""`launch.py up`, `status`, `logs` and `down`: a TPU of Google Cloud, from its creation to its deletion.

Invariant: a command that leaves something that bills says so, and how to delete it.
"""

import contextlib
import dataclasses
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import tyro

from parallelism.exit_status import FAILED
from scripts.common.command_line import Switch, parse
from scripts.launching.gcloud import (
    ANSWER_SECONDS,
    GcloudError,
    Node,
    Tpu,
    copy,
    find_node,
    find_queued,
    list_objects,
    run,
    run_all,
)
from scripts.launching.tpu_lifecycle import Keeper


@dataclasses.dataclass(frozen=True)
class TpuFlags:
    tpu: Annotated[Tpu, tyro.conf.arg(name="")] = Tpu()
    bucket: str | None = None
    """Without gs://; holds commits, runs and logs."""
    poll_seconds: float = 30.0
    """Between two looks at what is under way."""
    retry_seconds: float = 30.0
    """Before a request that failed is repeated; doubled every time, up to 15 minutes."""

    def __post_init__(self):
        for name in ("poll_seconds", "retry_seconds"):
            if getattr(self, name) < 0:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} {getattr(self, name):g} must not be negative; try {flag} 30")
        if self.bucket is not None and not re.fullmatch(r"[a-z0-9][-a-z0-9._]+[a-z0-9]", self.bucket):
            raise ValueError(f"--bucket {self.bucket} must be the name of a bucket; leave gs:// out")

    def keeper(self) -> Keeper:
        return Keeper(self.tpu, say, poll=self.poll_seconds, pause=self.retry_seconds)

    def required_bucket(self) -> str:
        if self.bucket is None:
            raise ValueError("--bucket is missing; give the bucket for runs and logs, as in --bucket my-bucket")
        return self.bucket

    def described(self, node: Node) -> str:
        several = f"{self.tpu.slices} × " if self.tpu.slices > 1 else ""
        return f"{several}{node.accelerator}, {node.hosts} host(s)"

    def down_command(self) -> str:
        """What deletes the TPU."""
        tpu, words = self.tpu, ["python", "scripts/launch.py", "down", "--name", self.tpu.name, "--zone", self.tpu.zone]
        words += [] if tpu.project is None else ["--project", tpu.project]
        words += [] if tpu.slices == 1 else ["--slices", str(tpu.slices)]
        return shlex.join(words)


@dataclasses.dataclass(frozen=True)
class ChangeFlags(TpuFlags):
    dry_run: Switch = False
    """Print the commands that would run, one a line, and run none."""


@dataclasses.dataclass(frozen=True)
class LogsFlags(TpuFlags):
    run_name: str | None = None
    """The run; by default --name."""
    worker: int = 0
    """Which host."""


def up(args: Sequence[str]) -> int:
    """Creates the TPU and returns once it is ready. Raises ValueError if a flag is wrong."""
    flags = parse(ChangeFlags, description="Create a TPU, and wait until it is READY.", args=args)
    if flags.dry_run:
        return show([flags.tpu.create(), *(node.describe() for node in flags.tpu.nodes())])
    with gcloud_errors(flags):
        node = flags.keeper().ensure()
    say(f"{flags.tpu.name} is READY: {flags.described(node)}")
    say(f"it bills until it is deleted: {flags.down_command()}")
    return 0


def status(args: Sequence[str]) -> int:
    """Says what there is of the TPU. Raises ValueError if a flag is wrong."""
    flags = parse(TpuFlags, description="Say what the TPU and its hosts do.", args=args)
    with gcloud_errors(flags):
        queued, node = find_queued(flags.tpu), find_node(flags.tpu)
        if queued is not None:
            print(f"queued resource {flags.tpu.name} is {queued}")
        if node is None:
            print(f"there is no TPU {flags.tpu.name} in {flags.tpu.zone}, and none of that name bills")
            return 0
        print(f"{flags.tpu.name} is {node.state}: {flags.described(node)} {node.health}".rstrip())
        if node.ready:
            line = "[ ! -e parallax/current ] || bash parallax/current/scripts/launching/host.sh report"
            try:
                print(run_all([node.ssh(line) for node in flags.tpu.nodes()], seconds=ANSWER_SECONDS), end="")
            except GcloudError as error:
                print(f"its hosts did not all answer: {error}")
    print(f"it bills until it is deleted: {flags.down_command()}")
    return 0


def logs(args: Sequence[str]) -> int:
    """Prints the newest log of one host, from the bucket. Raises ValueError if a flag is wrong or there is none."""
    flags = parse(LogsFlags, description="Print what a host of the run printed last.", args=args)
    folder = f"gs://{flags.required_bucket()}/runs/{flags.run_name or flags.tpu.name}.logs"
    with gcloud_errors(flags):
        try:
            found = run(list_objects(f"{folder}/**/process-{flags.worker}.log")).split()
        except GcloudError as error:
            if "matched no objects" not in error.words:
                raise
            found = []
        if not found:
            raise ValueError(
                f"{folder} has no log of worker {flags.worker} yet; it is copied there every minute of a run"
            )
        newest = max(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path.removeprefix(folder))])
        print(run(copy(newest, "-")), end="")
    return 0


def down(args: Sequence[str]) -> int:
    """Deletes the TPU and its queued resource. Raises ValueError if a flag is wrong."""
    flags = parse(ChangeFlags, description="Delete the TPU and its queued resource, if they exist.", args=args)
    tpu = flags.tpu
    if flags.dry_run:
        return show(deletion(tpu))
    with gcloud_errors(flags):
        deleted = flags.keeper().delete()
    say(f"deleted: {', '.join(deleted)}" if deleted else f"there was no TPU {flags.tpu.name} to delete")
    say(f"{flags.tpu.name} does not bill any more")
    return 0


def deletion(tpu: Tpu) -> list[list[str]]:
    """The commands of a deletion of all that there may be."""
    nodes = [argv for node in tpu.nodes() for argv in (node.describe(), node.delete())]
    return [tpu.describe_queued(), tpu.delete_queued(), *nodes]


@contextlib.contextmanager
def gcloud_errors(flags: TpuFlags) -> Iterator[None]:
    """Ends the program with one line and status 1 where gcloud fails; an interruption says what may be left."""
    try:
        yield
    except GcloudError as error:
        say(f"error: {error}")
        raise SystemExit(FAILED) from None
    except KeyboardInterrupt:
        say(f"interrupted; what was under way may go on and bill; to delete it: {flags.down_command()}")
        raise


def show(commands: Iterable[Sequence[str] | str]) -> int:
    """Prints commands as a shell would take them, one a line."""
    for command in commands:
        print(command if isinstance(command, str) else shlex.join(command))
    return 0


def say(line: str) -> None:
    """A line on standard error; a terminal that is gone must not keep a TPU from being deleted."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
