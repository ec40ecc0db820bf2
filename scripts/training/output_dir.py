"""The folder that a training run writes: which it is, who may write it, and how files reach it, checkpoints aside.

Invariant: a folder that exists is resumed or refused, never overwritten, and nothing is made before all input is known
to be good. A run folder is written by one process at a time, a local one in place. The files of one on gs:// are
written to a temporary folder and sent as they are when the run begins, just before and after each checkpoint is saved,
and at the end. So a run that goes on from a checkpoint finds every row up to it; a kill loses the rows since then,
whose steps are trained again.
"""

import atexit
import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from parallax.prediction import PREDICTION_FILE, read_prediction
from parallax.storage import is_remote, open_folder, reason_of
from parallax.training.metric_writers import METRICS_FILE, SAMPLES_FILE
from scripts.common.command_line import writing
from scripts.training.lease import LEASE_FILE, Lease, Owner
from scripts.training.summary import SUMMARY_FILE
from scripts.training.weights_and_biases import FILE as WANDB_FILE

CONTINUED = (METRICS_FILE, SAMPLES_FILE, SUMMARY_FILE, PREDICTION_FILE, WANDB_FILE)
"""Files that an attempt goes on with, or that were registered before it; the others it writes again, or
under another name."""
PATIENCE = 5.0
"""Seconds that a process which was just killed has to let go of its folder."""


def choose_folder(output_dir: str | None, dataset: str, config: str, *, resume: bool) -> epath.Path:
    """The folder to write: `output_dir`, or the next free runs/DATASET-CONFIG[-N]. Makes nothing.

    Raises ValueError if it exists and is not to be resumed, is not a run, has a prediction that is none or a name that
    is not UTF-8, or is on gs:// and cannot be reached.
    """
    name = output_dir or config
    if name.encode(errors="replace").decode() != name:  # loss.png could not have it as its title
        raise ValueError(f"run folder {name!r} must have a name in UTF-8; choose another with --output-dir")
    if output_dir is None:
        base = epath.Path("runs") / f"{dataset}-{config}"
        folder, number = base, 1
        while folder.exists():
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
        return folder
    folder = open_folder(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {folder} must be a folder and is a file; choose another")
    names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    if folder.exists() and not resume and names != [PREDICTION_FILE]:
        raise ValueError(f"--output-dir {folder} exists already; add --resume, or choose another")
    ours = LEASE_FILE, PREDICTION_FILE
    if "config.json" not in names and any(name not in ours and not name.startswith(".") for name in names):
        raise ValueError(f"--output-dir {folder} holds files but no config.json of a run; choose another")
    if is_remote(folder):
        return folder  # nothing says beforehand what may be written there
    here = folder.absolute()
    above = next(path for path in (here, *here.parents) if path.exists())
    if above == here and not os.access(here, os.W_OK | os.X_OK):
        raise ValueError(f"--output-dir {folder} is not writable; choose another")
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"--output-dir {folder} cannot be made in {above}, which is not writable; choose another")
    if PREDICTION_FILE in names:
        read_prediction(folder)  # refuses a file that is none
    return folder


def require_corpus(folder: epath.Path, sha256: str, edition: str) -> None:
    """Raises ValueError when a run that is resumed learned from another text."""
    path = folder / "config.json"
    if path.exists():
        corpus = json.loads(path.read_text())["corpus"]
        if corpus["sha256"] != sha256:
            raise ValueError(
                f"dataset ({edition}) is not the text that {folder} was trained on ({corpus['edition']}, sha256 "
                f"{corpus['sha256'][:12]}…); give that one back, or start a run in another --output-dir"
            )


class Workspace:
    """The local folder `path`, and the run folder that it stands for.

    Object stores cannot append, so a growing file is sent again as a whole: once a checkpoint, which is larger.
    """

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._is_remote, self.path = is_remote(folder), Path(folder)
        if self._is_remote:
            temporary = tempfile.mkdtemp(prefix="parallax-")
            atexit.register(shutil.rmtree, temporary, ignore_errors=True)
            self.path = Path(temporary, folder.name)
        self._sent: dict[Path, tuple[int, int]] = {}
        self._lock: weakref.finalize | None = None
        self._lease: Lease | None = None

    def hold(self, patience: float = PATIENCE) -> None:
        """Keeps a folder, where there is one yet, from others that would hold it, until it is released.

        A process that ends, however it ends, releases it: at once where the file system has locks, else as `Lease`
        says. Another one that holds a lock has `patience` seconds to end.
        Raises ValueError if another process holds it, or it cannot be written.
        """
        if self._lock is None and self._folder.is_dir():
            self._take(patience)

    def _take(self, patience: float = PATIENCE) -> None:
        if not self._is_remote:
            descriptor = os.open(self.path, os.O_RDONLY)
            self._lock = weakref.finalize(self, os.close, descriptor)
            limit = time.monotonic() + patience
            while (locked := _locked(descriptor)) is False:
                if time.monotonic() > limit:
                    raise self._held_by("another process")
                time.sleep(0.1)
            if locked:
                return
            self._lock()
        lease = Lease(self._folder)
        with writing(f"--output-dir {self._folder}"), _errors_of(self._folder):
            rival = lease.take()
        if rival is not None:
            raise self._held_by(_describe(rival))
        self._lease, self._lock = lease, weakref.finalize(self, lease.release)

    def _held_by(self, whom: str) -> ValueError:
        return ValueError(f"--output-dir {self._folder} is being written by {whom}; stop that one, or choose another")

    def check(self) -> None:
        """Raises OSError if another process has taken the folder: this one was held up for longer than a lease."""
        if self._lease is not None and self._lease.rival is not None:
            raise OSError(errno.EBUSY, f"it was taken by {_describe(self._lease.rival)}", str(self._folder))

    def release(self) -> None:
        """Lets others write the folder."""
        if self._lock is not None:
            self._lock()

    def fetch(self) -> None:
        """Makes `path`, holds it, and brings what an earlier attempt wrote.

        Raises:
          OSError: it cannot be made, or a file cannot be read.
          ValueError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._take()
        for name in CONTINUED if self._is_remote else ():
            source, copy = self._folder / name, self.path / name
            with _errors_of(source):
                if source.exists():
                    copy.write_bytes(source.read_bytes())
                    written = source.stat().mtime
                    os.utime(copy, (written, written))  # the summary tells from it when a killed attempt ended
                    self._sent[copy] = _version(copy)

    def send(self) -> None:
        """Copies what was written since the last time to the run folder; nothing to do where that is local.

        Raises OSError if a file cannot be written there.
        """
        for file in sorted(self.path.rglob("*")) if self._is_remote else ():
            if file.is_file() and self._sent.get(file) != (version := _version(file)):
                target = self._folder / file.relative_to(self.path).as_posix()
                with _errors_of(target):
                    target.write_bytes(file.read_bytes())
                self._sent[file] = version


def _locked(descriptor: int) -> bool | None:
    """False while another process has the lock; None where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _describe(owner: Owner) -> str:
    return f"another process, {owner.pid} on {owner.host}"


def _version(file: Path) -> tuple[int, int]:
    """What changes whenever the file does."""
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


@contextlib.contextmanager
def _errors_of(address: epath.Path) -> Iterator[None]:
    """Whatever gcsfs, aiohttp, google.auth or requests raise, as the OSError of a file."""
    try:
        yield
    except Exception as error:
        reason = "there is no such bucket" if isinstance(error, FileNotFoundError) else reason_of(error)
        raise OSError(errno.EIO, reason, str(address)) from error
