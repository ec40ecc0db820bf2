"""Who writes a run folder, where no lock of the file system says so: a file in it, which its owner renews.

Invariant: of all who keep to it, one writes. A lease is over when it is released, when its process is gone from this
machine, or when nobody has renewed it for `EXPIRY` seconds by the clock of who waits; clocks of two machines are never
compared, but for a lease that is too old for any clock.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from etils import epath

from parallax.storage import write_whole

LEASE_FILE = "lease.json"
BEAT = 10.0
"""Seconds between renewals."""
EXPIRY = 45.0
FORGOTTEN = 3600.0
"""Seconds after which a lease is over by the clock that stands in it."""
SETTLE = 1.0
"""Seconds in which another one who found the folder free at the same moment would have written too."""
LOOK = 1.0
"""Seconds between looks at the lease of another process."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """What stands in the file."""

    name: str
    """Of this lease, like no other."""
    host: str
    pid: int
    space: str
    """Where `pid` means something: a start of a machine, and a container on it."""
    time: float
    """Of the last renewal, in seconds since 1970."""

    def is_gone(self) -> bool:
        """Whether it is known to have ended."""
        if time.time() - self.time > FORGOTTEN:
            return True
        if not self.space or self.space != _space():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False


class Lease:
    """That of this process on a folder, once it is taken."""

    def __init__(self, folder: epath.Path):
        self._file, self._name = folder / LEASE_FILE, uuid.uuid4().hex
        self._ended, self._renewal = threading.Event(), threading.Thread(target=self._renew, daemon=True)
        self.rival: Owner | None = None
        """Who took the folder although this process lives, since it did not renew its lease in time."""

    def take(self) -> Owner | None:
        """Takes the lease and renews it until `release`, or returns who has it. Waits for one that may be over."""
        first, limit = self._read(), time.monotonic() + EXPIRY
        held = first
        while held is not None and not held.is_gone() and time.monotonic() < limit:
            if held != first:
                return held
            time.sleep(LOOK)
            held = self._read()
        self._write()
        time.sleep(SETTLE)
        held = self._read()
        if held is not None and held.name != self._name:
            return held
        self._renewal.start()
        return None

    def release(self) -> None:
        """Lets others take it."""
        self._ended.set()
        with contextlib.suppress(Exception):  # of gcsfs and others: then it is over when it was not renewed
            if (held := self._read()) is not None and held.name == self._name:
                self._file.unlink()

    def _renew(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(Exception):  # the storage does not answer: the next time, perhaps
                held = self._read()
                if held is not None and held.name != self._name:
                    self.rival = held
                    return
                if not self._ended.is_set():
                    self._write()

    def _read(self) -> Owner | None:
        try:
            return Owner(**json.loads(self._file.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None  # or it is of nobody who keeps to this

    def _write(self) -> None:
        owner = Owner(self._name, socket.gethostname(), os.getpid(), _space(), round(time.time(), 3))
        write_whole(self._file, json.dumps(dataclasses.asdict(owner)))


def _space() -> str:
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""
