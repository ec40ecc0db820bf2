"""The server as a process: a socket, an engine, an event loop, and how they end.

Invariant: the process ends with status 0 after SIGTERM or Ctrl-C, within a few seconds, and with status 1 when the
engine fails. It never stays without an engine.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING

import uvicorn

from parallax.inference.batching import Batcher
from scripts.compilation_cache import keep_compiled_programs
from scripts.continuation import tell
from scripts.run_folder import Run, load_run
from scripts.serve_api import Api
from scripts.serve_engine import Engine
from scripts.serve_guard import Guard
from scripts.serve_listen import address_of, is_loopback, start_listening
from scripts.serve_metrics import Counts
from scripts.serve_page import asset_routes

if TYPE_CHECKING:
    from scripts.serve import Flags

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 3
"""Seconds that answers under way have to finish once the server is told to end."""


class Server(uvicorn.Server):
    """uvicorn, which says its address when it answers and ends the engine when it ends."""

    def __init__(self, config: uvicorn.Config, engine: Engine, address: str):
        super().__init__(config)
        self._engine, self._address = engine, address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.attach(asyncio.get_running_loop())
        self._engine.on_failure = self._end
        await super().startup(sockets)
        print(self._address, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_engine())
        await super().shutdown(sockets)
        await ending

    def _end(self) -> None:
        self.should_exit = True

    async def _end_engine(self) -> None:
        for _ in range(GRACE * 20):
            if not self._engine.under_way:
                break
            await asyncio.sleep(0.05)
        await self._engine.stop()


def serve(flags: "Flags", key: str, listener: socket.socket) -> int:
    """Serves until a signal; the exit status.

    Raises:
      ValueError: the run or a size cannot be used.
    """
    with listener:
        for number in SIGNALS:  # while it starts: nothing is under way yet
            signal.signal(number, lambda *_: os._exit(0))
        keep_compiled_programs()
        run = load_run(flags.checkpoint, flags.step).prepared()
        engine = Engine(
            lambda: Batcher(run.config, run.params, slots=flags.slots, capacity=flags.capacity),
            flags.limits.queue,
        )
        introduce(run, flags)
        engine.warm_up()
        for number in SIGNALS:  # uvicorn takes them over, and raises them again at its end
            signal.signal(number, lambda *_: None)
        return _run(flags, key, run, engine, listener)


def _run(flags: "Flags", key: str, run: Run, engine: Engine, listener: socket.socket) -> int:
    capacity = min(flags.capacity, run.config.max_seq_len)
    counts = Counts(engine, flags.slots)
    api = Api(run, engine, counts, flags.limits.within(capacity), capacity, with_key=bool(key))
    guard = Guard(
        api.application(),
        frozenset({flags.host.lower()}) if is_loopback(listener.getsockname()[0]) else None,
        key,
        frozenset({"/healthz", *(route.path for route in asset_routes())}),
        lambda status: counts.requests.labels(str(status)).inc(),
    )
    config = uvicorn.Config(
        guard,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level=logging.WARNING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE + 2,
    )
    start_listening(listener, flags.host, flags.port)
    Server(config, engine, address_of(listener)).run([listener])
    if engine.failure is None:
        return 0
    traceback.print_exception(engine.failure)
    print("error: the engine failed, as said above, and the server ended", file=sys.stderr)
    return 1


def introduce(run: Run, flags: "Flags") -> None:
    size, kind = f"{run.config.num_params():,} parameters", f"{run.tokenizer.name} tokens"
    tell(f"model     {run.folder}, step {run.step}: {size}, {kind}")
    tell(f"slots     {flags.slots} of {min(flags.capacity, run.config.max_seq_len)} tokens; compiling …")
