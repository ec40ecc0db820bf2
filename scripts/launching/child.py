"""One process that a supervisor started, with its output relayed line by line.

Invariant: it dies with its supervisor (on Linux), and once it is dead nothing that it left behind is waited for.
"""

import contextlib
import dataclasses
import functools
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_CHUNK = 65536  # bytes; what a pipe holds by default
_LAST_CHUNKS = 16  # a pipe never holds more, unless root made it larger

# Asks Linux to kill this process when its parent dies, then becomes the command, with the same pid. A program of its
# own, since Python code between fork and exec is unsafe where threads run. A parent that died before is noticed.
_TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """What a process runs."""

    argv: Sequence[str]
    env: Mapping[str, str]
    """All of its environment."""


def tied(argv: Sequence[str]) -> list[str]:
    """The command as one that dies with this process, on Linux."""
    if sys.platform != "linux":
        return list(argv)
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *argv]


class Child:
    """A process in a session of its own, out of reach of the terminal's Ctrl-C.

    Its whole lines are shown behind "[INDEX] ", each on the stream that it wrote them to, and are kept as they are in
    `log`, a new file. While it runs this happens when `selector` calls back; `key.data()` for each key is the call.
    """

    def __init__(self, index: int, command: Command, log: Path, selector: selectors.BaseSelector):
        self.index, self.log = index, log
        self._selector = selector
        self._asked = self._finished = False
        self._kept: IO[bytes] | None = log.open("xb", buffering=0)
        self._popen = subprocess.Popen(  # noqa: S603 - running what the caller says is its purpose
            tied(command.argv),
            env=command.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._pipes: dict[int, IO[bytes]] = {}  # by the descriptor to show it on, and so is:
        self._partial: dict[int, bytearray] = {}  # a line that has not ended yet
        for screen, pipe in ((1, self._popen.stdout), (2, self._popen.stderr)):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                self._pipes[screen], self._partial[screen] = pipe, bytearray()
                selector.register(pipe, selectors.EVENT_READ, functools.partial(self._relay, screen))

    def status(self) -> int | None:
        """None while it runs, then its exit status, or -n if signal n killed it."""
        return self._popen.poll()

    def terminate(self) -> None:
        """Asks it to stop, by SIGTERM; once, however often this is called."""
        if not self._asked:
            self._asked = True
            self._popen.send_signal(signal.SIGTERM)

    def quit(self) -> None:
        """Ends it by SIGQUIT, at which train.py shows what its threads do."""
        if self.status() is None:
            self._popen.send_signal(signal.SIGQUIT)

    def kill(self) -> None:
        """Kills it, and what it started and left in its process group."""
        if not self._finished:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter on macOS, for the dead
                os.killpg(self._popen.pid, signal.SIGKILL)

    def finish(self) -> None:
        """Kills it if it runs; shows and keeps what it wrote last."""
        if self._finished:
            return
        self.kill()
        self._popen.wait()
        self._finished = True
        for screen in (1, 2):
            # Not up to the end of the file: a grandchild in another session may hold the pipe for ever.
            for _ in range(_LAST_CHUNKS):
                if not self._relay(screen):
                    break
            self._close(screen)
        for screen, line in self._partial.items():
            if line:
                self._write(screen, bytes(line))
        if self._kept is not None:
            self._kept.close()

    def _relay(self, screen: int) -> bool:
        """Takes what has come, and passes whole lines on. Returns whether there may be more."""
        pipe = self._pipes.get(screen)
        chunk = pipe.read(_CHUNK) if pipe is not None else None
        if chunk == b"":
            self._close(screen)
        if not chunk:
            return False
        self._partial[screen] += chunk
        if b"\n" in chunk:
            lines, _, self._partial[screen] = self._partial[screen].rpartition(b"\n")
            self._write(screen, bytes(lines) + b"\n")
        return True

    def _close(self, screen: int) -> None:
        pipe = self._pipes.pop(screen, None)
        if pipe is not None:
            self._selector.unregister(pipe)
            pipe.close()

    def _write(self, screen: int, text: bytes) -> None:
        """Keeps text as it is; shows each line with its prefix and an end."""
        if self._kept is not None:
            try:
                _write_all(self._kept.fileno(), text)
            except OSError as error:  # a full disk, say: the run is worth more than its log
                self._kept.close()
                self._kept = None
                say(f"{self.log} is not written any more: {error.strerror}")
        lines = text.removesuffix(b"\n").split(b"\n")
        _write_all(screen, b"".join(b"[%d] %b\n" % (self.index, line) for line in lines))


def say(line: str) -> None:
    """A line for the person who watches, on standard error."""
    print(line, file=sys.stderr, flush=True)


def _write_all(descriptor: int, text: bytes) -> None:
    view = memoryview(text)
    while view:
        view = view[os.write(descriptor, view) :]
