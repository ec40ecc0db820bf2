"""`benchmark.py serve`: tokens a second of serve.py for one client and for many, against generation without a server.

Invariant: all numbers are of one model and of greedy answers of one length; clients ask over HTTP, all at once, and
are done when the last has its answer.
"""

import contextlib
import dataclasses
import http.client
import json
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from scripts.benchmarks.report import begin, show, write_report
from scripts.benchmarks.rounds import (
    BEFORE,
    TREE,
    Compared,
    Rounds,
    Worker,
    environment,
    find,
    measure,
    ratio,
    require_positive,
)
from scripts.benchmarks.runs import last_line, run_train
from scripts.benchmarks.settings import MODELS, prompts
from scripts.common.command_line import parse

CAPACITY = 256
"""Tokens of a slot, at the least."""
PRESETS = ("tiny", "nano", "small")
MANY = 600.0
"""Seconds after which a step of training must be done."""


@dataclasses.dataclass(frozen=True)
class Flags(Compared):
    model: str = "small"
    """Which model, after one step of training: tiny, nano or small."""
    clients: int = 16
    """How many ask at once, and the slots of the server."""
    prompt_tokens: int = 16
    """Length of a prompt."""
    new_tokens: int = 64
    """Length of an answer."""

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "prompt_tokens", "new_tokens")
        if self.model not in PRESETS:
            raise ValueError(f"model {self.model!r} is not one of {', '.join(PRESETS)}; try small")
        if self.clients < 2:
            raise ValueError(f"clients={self.clients} must be at least 2, since one is measured anyway; try 16")


class Server:
    """serve.py of a checkout under way, from its start until `close`; it answers when the constructor returns.

    Raises ValueError if it did not start; with its last line.
    """

    def __init__(self, tree: Path, run: Path, flags: Flags):
        capacity = max(CAPACITY, flags.prompt_tokens + flags.new_tokens)
        more = ["--port", "0", "--slots", str(flags.clients), "--capacity", str(capacity)]
        log = run.with_name("server.log")
        with log.open("w") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - this Python and a file of ours
                [sys.executable, str(find(tree, ["scripts/serve.py"])), "--checkpoint", str(run), *more],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(tree),
            )
        try:
            self.address = self._process.stdout.readline().strip() if self._process.stdout else ""
            if not self.address:
                raise ValueError(f"serve.py of {tree} did not start: {last_line(log)}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@dataclasses.dataclass(frozen=True)
class Clients:
    """Contenders that ask for `model` at an address, one for each of `prompts`, int32 [B, T]."""

    name: str
    address: str
    model: str
    prompts: np.ndarray
    new_tokens: int

    def ask(self, units: int) -> dict[str, float]:
        """Lets all of them ask at once, `units` times."""
        with ThreadPoolExecutor(len(self.prompts)) as pool:
            start = time.perf_counter()
            for _ in range(units):
                list(pool.map(self._complete, self.prompts.tolist()))
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "whole": seconds / units}

    def _complete(self, prompt: list[int]) -> None:
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"))
        body = {"model": self.model, "prompt": prompt, "max_tokens": self.new_tokens, "temperature": 0}
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
        if answer.get("usage", {}).get("completion_tokens") != self.new_tokens:
            raise RuntimeError(f"{self.name} got no answer of {self.new_tokens} tokens: {answer}")


def serve(args: Sequence[str]) -> int:
    """Measures one client and many in turn; returns 0."""
    flags = parse(Flags, description="Compare the speed of the server with that of generation.", args=args)
    busy = begin()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = train_one_step(flags.model, folder)
        trees = {"serve": TREE} | ({BEFORE: Path(flags.against)} if flags.against else {})
        servers = {
            name: stack.enter_context(contextlib.closing(Server(tree, run, flags))) for name, tree in trees.items()
        }
        contenders = []
        for count in (1, flags.clients):
            asked = prompts(MODELS[flags.model], count, flags.prompt_tokens)
            for name, server in servers.items():
                contenders.append(Clients(f"{name} × {count}", server.address, run.name, asked, flags.new_tokens))
            spec = {"model": flags.model, "batch_size": count, "weights": str(folder / "weights")}
            spec |= {"prompt_tokens": flags.prompt_tokens, "new_tokens": flags.new_tokens}
            contenders.append(Worker(f"generate × {count}", "decode-parallax", **spec))
            stack.callback(contenders[-1].close)
        found = measure(contenders, flags, flags.model)
    rows = result(flags.new_tokens, found)
    title = f"{flags.model}, clients or rows: {flags.new_tokens} tokens after {flags.prompt_tokens}"
    show(f"{title}; ratio = speed of serve / speed, with as many", FORMS, rows)
    write_report(flags.output, "serve", rows, busy=busy)
    return 0


def train_one_step(preset: str, folder: Path) -> Path:
    """A run of a text with as many characters as the model has token ids; answers have no end of text."""
    text = folder / "text.txt"
    text.write_text(string.printable[: MODELS[preset].vocab_size] * 20)
    shape = f"--config {preset} --steps 1 --batch-size 1 --seq-len 8".split()
    run_train([*shape, "--dataset", str(text)], folder / preset, MANY)
    return folder / preset


FORMS = {"tokens/s": ",.0f", "ratio": ".3f", "times those of one": ".2f"}


def result(new_tokens: int, found: Rounds) -> dict[str, dict[str, list[float]]]:
    """Under FORMS what was measured, round by round, for each contender `KIND × COUNT`."""
    kinds = {name: name.split(" × ") for name in found}
    speeds = {
        name: [int(count) * new_tokens / each["whole"] for each in found[name]] for name, (_, count) in kinds.items()
    }
    return {
        name: {
            "tokens/s": speeds[name],
            "ratio": ratio(speeds[f"serve × {count}"], speeds[name]),
            "times those of one": ratio(speeds[name], speeds[f"{kind} × 1"]),
        }
        for name, (kind, count) in kinds.items()
    }
