"""The server as a process: a socket, an engine, an event loop, and how they end.

Invariant: the process ends with status 0 after SIGTERM or Ctrl-C, within a few seconds, and with status 1 when the
engine cannot be mended. It never stays without an engine.
"""

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import uvicorn

from parallax.inference.batching import Batcher
from parallax.run_folder import Run, load_adapters, load_run
from parallax.serving.access import Guard, Limits, address_of, is_loopback, start_listening
from parallax.serving.app import Served, application
from parallax.serving.engine import Engine
from parallax.tokenizers.chat_template import choose_template

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 3
"""Seconds that answers under way have to finish once the server has got a signal."""


class Server(uvicorn.Server):
    """uvicorn, which says its address when it answers and ends the engines when it ends."""

    def __init__(self, config: uvicorn.Config, engines: Sequence[Engine], address: str):
        super().__init__(config)
        self._engines, self._address = engines, address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for engine in self._engines:
            engine.attach(asyncio.get_running_loop())
            engine.on_failure = self._end
        await super().startup(sockets)
        print(self._address, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_engines())
        await super().shutdown(sockets)
        await ending

    def _end(self) -> None:
        self.should_exit = True

    async def _end_engines(self) -> None:
        for _ in range(GRACE * 20):
            if not any(engine.under_way for engine in self._engines):
                break
            await asyncio.sleep(0.05)
        await asyncio.gather(*(engine.stop() for engine in self._engines))


def serve(
    checkpoint: str,
    listener: socket.socket,
    *,
    adapters: Sequence[str] = (),
    step: int | None = None,
    param_dtype: str | None = None,
    slots: int = 16,
    capacity: int = 1024,
    context: Literal["crop", "extend"] = "crop",
    prefix_tokens: int = 0,
    limits: Limits = Limits(),
    host: str = "127.0.0.1",
    key: str = "",
    chat_template: str = "",
    notify: Callable[[str], None] = lambda line: None,
) -> int:
    """Serves a run until a signal; the exit status.

    Args:
      listener: from `listen`, for `host`.
      adapters: runs of adapters beside it, each a model of its own by the name of its folder.
      step, param_dtype: as `load_run` takes them.
      slots: how many answers are computed at once, each of at most `capacity` tokens with its prompt.
      context: crop for no more of them than the model reads as it learned to, extend for up to max_seq_len.
      prefix_tokens: as `Batcher` takes it.
      key: what clients must send; empty for none.
      chat_template: as `choose_template` takes it.
      notify: takes a line for the person who watches.

    Raises:
      ValueError: the run or a size cannot be used.
    """
    with listener:
        for number in SIGNALS:  # while it starts: nothing is under way yet
            signal.signal(number, lambda *_: os._exit(0))
        run = load_run(checkpoint, step, param_dtype=param_dtype).prepared()
        runs = [run, *(load_adapters(each, run) for each in adapters)]
        sizes: dict[str, Any] = {"slots": slots, "prefix_tokens": prefix_tokens}
        models = []
        for each in runs:
            model = make_model(each, chat_template, capacity, context, sizes, limits.queue, notify)
            if model.name in (other.name for other in models):
                raise ValueError(f"{each.folder} must have a name that no other model has; rename its folder")
            models.append(model)
            model.engine.warm_up()
        for number in SIGNALS:  # uvicorn takes them over, and raises them again at its end
            signal.signal(number, lambda *_: None)
        names = frozenset({host.lower()}) if is_loopback(listener.getsockname()[0]) else None
        guard = application(models, slots, limits, names, key)
        start_listening(listener)
        return _answer(guard, [model.engine for model in models], listener)


def make_model(
    run: Run,
    chat_template: str,
    capacity: int,
    context: Literal["crop", "extend"],
    sizes: dict[str, Any],
    queue: int,
    notify: Callable[[str], None],
) -> Served:
    """A run with an engine that is not warm yet; arguments as those of `serve`, `sizes` further ones of `Batcher`."""
    template = choose_template(chat_template, run.chat_template, run.tokenizer)
    run = dataclasses.replace(run, chat_template=template)
    asked, most = capacity, run.config.max_seq_len
    capacity = min(asked, run.context_length if context == "crop" else most)
    sizes = sizes | {"capacity": capacity, "grammars": template is not None}
    size, kind = f"{run.config.num_params():,} parameters", f"{run.tokenizer.name} tokens"
    beside = f", adapters of rank {run.config.lora.rank}" if run.config.lora.rank else ""
    notify(f"model     {run.folder}, step {run.step}: {size}{beside}, {kind}")
    why = ", as many as it was trained at" if capacity < min(asked, most) else ""
    notify(f"slots     {sizes['slots']} of {capacity} tokens{why}; compiling …")
    name = run.folder.name or Path.cwd().name  # --checkpoint . has no name
    return Served(name, run, Engine(lambda: Batcher(run.config, run.params, **sizes), queue), capacity)


def _answer(guard: Guard, engines: Sequence[Engine], listener: socket.socket) -> int:
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
    Server(config, engines, address_of(listener)).run([listener])
    failures = [engine.failure for engine in engines if engine.failure is not None]
    if not failures:
        return 0
    traceback.print_exception(failures[0])
    print("error: the engine failed, as said above, and the server ended", file=sys.stderr)
    return 1
