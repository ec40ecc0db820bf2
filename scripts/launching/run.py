"""`launch.py run`: one training run on a TPU, started again after it was preempted, ended on time, paid for no longer.

Invariant: however it ends, its last lines say whether anything bills, and with --autodelete nothing does. Once a
TPU is being deleted, no signal stops that.
"""

import contextlib
import dataclasses
import datetime
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from parallelism.exit_status import FAILED, OUTSIDE_FAILURE
from scripts.common.command_line import Switch, flag_name, parse, split_at_dashes
from scripts.launching.gcloud import DESCRIBE_SECONDS, GcloudError, copy, find_node, list_objects
from scripts.launching.gcloud import run as run_gcloud
from scripts.launching.local import OWN_FLAGS
from scripts.launching.supervisor import FIRST_PAUSE, keep_running, signal_name
from scripts.launching.tpu import ChangeFlags, deletion, say, show
from scripts.launching.watch import HostCommands, Training

CHECKOUT = Path(__file__).resolve().parent.parent.parent

DESCRIPTION = """Train on a TPU, which is created if it is not there, with the flags of train.py after --:

launch.py run --bucket my-bucket --accelerator v3-32 --spot --autodelete --max-hours 6 -- --strategy mesh --steps 10000

The commit that is checked out runs on every host, with its output in gs://BUCKET/runs/RUN.logs and its run folder in
gs://BUCKET/runs/RUN. After a preemption, or a death from outside, it goes on from its last checkpoint. The first Ctrl-C
lets it save and stop, the second does not wait for that.

Exit status: 0 finished, or stopped as asked; 1 failed; 2 bad input; 3 failed through something outside, 4 lost a
process of the run, 5 lost a device, and each of these may be started again; 128 + n if a process, or this program, was
ended by signal n."""


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


class Interrupted(BaseException):
    """A signal asks for the end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Signals:
    """Turns signals into Interrupted, until closing: then none comes between a TPU and its deletion."""

    def __init__(self):
        self.closing = False

    @contextlib.contextmanager
    def noticed(self, hours: float | None) -> Iterator[None]:
        """Handles signals within, and gives SIGALRM after some hours. What was ignored, as by nohup, stays so."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._note)
        signal.setitimer(signal.ITIMER_REAL, (hours or 0) * 3600)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.closing:
            raise Interrupted(number)
        with contextlib.suppress(OSError):  # not by print, which this may have interrupted
            os.write(2, f"{signal_name(number)}: not now, since a TPU bills until it is deleted\n".encode())


@dataclasses.dataclass(frozen=True)
class RunFlags(ChangeFlags):
    run_name: str | None = None
    """Of the run folder; by default --name."""
    restarts: int = 20
    """How often to go on from the last checkpoint after a preemption or another death from outside; counted from the
    newest checkpoint on. After three crashes in one step it is not started again."""
    max_hours: float | None = None
    """After this long it is stopped, wherever it is; waiting for a TPU counts."""
    autodelete: Switch = False
    """Delete the TPU at the end, whatever the end was."""
    allow_dirty: Switch = False
    """Ship the last commit though the checkout has changes, which stay here."""

    def __post_init__(self):
        super().__post_init__()
        if self.restarts < 0:
            raise ValueError(f"restarts={self.restarts} must be at least 0; try --restarts 20")
        if self.max_hours is not None and not 0 < self.max_hours < 10_000:
            raise ValueError(f"max_hours={self.max_hours:g} must be over 0 and under 10000; try --max-hours 6")
        if not re.fullmatch(r"[A-Za-z0-9][-\w.]*", self.folder_name()):
            raise ValueError(f"--run-name {self.run_name} must be letters, digits, dashes; try --run-name first")

    def folder_name(self) -> str:
        return self.run_name or self.tpu.name


def run(args: Sequence[str], checkout: Path = CHECKOUT) -> int:
    """Trains on a TPU; `args` are what follows the command's name, `checkout` is what it ships.

    Raises ValueError if a flag is wrong, the checkout has changes, or the TPU is another one than was asked for.
    """
    own, train_flags = split_at_dashes(args)
    flags = parse(RunFlags, description=DESCRIPTION, args=own)
    if train_flags is None:
        raise ValueError("-- is missing before the flags of train.py; try launch.py run --bucket B -- --steps 100")
    bucket = flags.required_bucket()
    _check(train_flags)
    commit = _commit(checkout, flags.allow_dirty)
    folder, archive = f"gs://{bucket}/runs/{flags.folder_name()}", f"gs://{bucket}/commits/{commit}.tar.gz"
    began = datetime.datetime.now(datetime.UTC)
    logs = f"{folder}.logs/{began:%Y%m%dT%H%M%SZ}"
    train_flags = [*train_flags, "--output-dir", folder]
    commands = HostCommands(archive, commit)
    if flags.dry_run:
        return show(_plan(flags, checkout, commands, train_flags, f"{logs}/attempt-1"))
    training = Training(flags.keeper(), commands, train_flags, logs)
    signals = Signals()
    with signals.noticed(flags.max_hours):
        return _train(flags, checkout, commands, training, signals)


def _train(flags: RunFlags, checkout: Path, commands: HostCommands, training: Training, signals: Signals) -> int:
    """From the first command to the last lines."""
    status, refused, closed = FAILED, False, None
    try:
        try:
            say(f"shipping commit {commands.commit[:12]} to {commands.archive}")
            archive = _git(checkout, "archive", "--format=tar.gz", commands.commit)
            run_gcloud(copy("-", commands.archive), stdin=archive)
            status = keep_running(
                training.attempt,
                restarts=flags.restarts,
                newest=lambda: _newest_checkpoint(flags),
                pause=min(FIRST_PAUSE, flags.retry_seconds),
            )
            if status and training.started and not flags.autodelete:
                training.stop()
        except Interrupted as interrupt:
            status = 128 + interrupt.number
            status = _stop(flags, training, interrupt.number)
        except GcloudError as error:
            say(f"error: {error}")
        except ValueError:  # the TPU of that name is not one to start on, nor to delete
            refused = True
            raise
    except Interrupted:
        say("not waiting any longer")
    finally:
        while not refused and closed is None:
            with contextlib.suppress(Interrupted):
                signals.closing = True
                closed = _close(flags)
    return status if closed else status or FAILED


def _newest_checkpoint(flags: RunFlags) -> int | None:
    """The step of the newest trusted checkpoint in the bucket; None if there is none, or the bucket does not answer."""
    folder = f"gs://{flags.bucket}/runs/{flags.folder_name()}/checkpoints"
    try:
        found = run_gcloud(list_objects(f"{folder}/*/manifest.json"), seconds=DESCRIBE_SECONDS)
    except GcloudError:
        return None
    return max((int(step) for step in re.findall(r"/(\d+)/manifest\.json", found)), default=None)


def _stop(flags: RunFlags, training: Training, number: int) -> int:
    signal.setitimer(signal.ITIMER_REAL, 0)
    cause = f"{flags.max_hours:g} hours are over" if number == signal.SIGALRM else signal_name(number)
    if not training.started:
        say(f"{cause}, before train.py was started")
        return OUTSIDE_FAILURE if number == signal.SIGALRM else 128 + number
    say(f"{cause}: waiting for train.py to save and stop; a signal ends the wait")
    status = training.stop()
    say("train.py has saved and stopped" if status == 0 else "whether train.py could save is not known")
    return status


def _close(flags: RunFlags) -> bool:
    """Deletes the TPU if that was asked for, and says what bills; False if it should be gone and may not be."""
    try:
        if flags.autodelete:
            deleted = flags.keeper().delete()
            if not deleted:  # one whose creation was cut short may show late
                time.sleep(flags.poll_seconds)
                deleted = flags.keeper().delete()
            say(f"deleted: {', '.join(deleted)}" if deleted else f"there was no TPU {flags.tpu.name} to delete")
        node = find_node(flags.tpu)
    except GcloudError as error:
        say(f"error: {error}")
        say(f"{flags.tpu.name} may still bill; to delete it: {flags.down_command()}")
        return False
    if node is None:
        say(f"no TPU {flags.tpu.name} is left, and none bills; gs://{flags.bucket} does, for what it stores")
    else:
        say(f"{flags.tpu.name} is {node.state} and still bills; to delete it: {flags.down_command()}")
    return True


def _plan(
    flags: RunFlags, checkout: Path, commands: HostCommands, train_flags: Sequence[str], logs: str
) -> Iterator[str]:
    """What a run without mishaps does, in this order."""
    tpu = flags.tpu
    archive = shlex.join(["git", "-C", str(checkout), "archive", "--format=tar.gz", commands.commit])
    yield f"{archive} | {shlex.join(copy('-', commands.archive))}"
    nodes = tpu.nodes()
    describe = [node.describe() for node in nodes]
    creation = [*describe, *([tpu.describe_queued()] if tpu.queued else []), tpu.create(), *describe]
    # How many hosts a slice has, and so the number of its first, is known once it is there; here each has one.
    calls = [
        *(node.ssh(commands.prepare()) for node in nodes),
        *(node.ssh(commands.start(logs, number, train_flags)) for number, node in enumerate(nodes)),
        *(node.ssh(commands.report()) for node in nodes),
    ]
    for argv in [*creation, *calls, *(deletion(tpu) if flags.autodelete else []), *describe]:
        yield shlex.join(argv)


def _check(train_flags: Sequence[str]) -> None:
    """Finds here what train.py would refuse on the TPU. Raises ValueError."""
    for arg in train_flags:
        if flag_name(arg) in OWN_FLAGS:
            raise ValueError(f"{flag_name(arg)} is what the hosts of a TPU know by themselves; leave it out")
        if flag_name(arg) == "--output-dir":
            raise ValueError("--output-dir is chosen by launch.py run; leave it out, and give --run-name before --")
    if "--resume" not in train_flags:  # it takes its other flags from the run folder
        from scripts.training.flags import read_flags

        read_flags(list(train_flags))


def _commit(checkout: Path, allow_dirty: bool) -> str:
    changes = _git(checkout, "status", "--porcelain").decode()
    if changes and not allow_dirty:
        raise ValueError(
            f"{len(changes.splitlines())} file(s) of the checkout are not committed and would not be shipped; commit "
            "them, or add --allow-dirty to run the last commit"
        )
    return _git(checkout, "rev-parse", "HEAD").decode().strip()


def _git(checkout: Path, *words: str) -> bytes:
    try:
        command = ["git", "-C", str(checkout), *words]  # no shell, and the user's own git
        return subprocess.run(command, check=True, capture_output=True).stdout  # noqa: S603 - as above
    except FileNotFoundError:
        raise ValueError("git is not on PATH, and names the commit to ship; install it") from None
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.decode(errors="replace").split())
        raise ValueError(f"git {words[0]} failed in {checkout} ({said}); launch from a git checkout") from None
