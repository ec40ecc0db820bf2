"""A real server process on a small run that is written here.

Invariant: a server started here listens on a free port of the loopback, and is gone after the test.
"""

import contextlib
import json
import os
import re
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai

from parallax.config import TransformerConfig
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.plain import CharTokenizer
from tests.scripts.untrained import one_layer, write_untrained

SERVE = Path(__file__).resolve().parents[3] / "scripts" / "serve.py"
LETTERS = CharTokenizer("\n !?" + string.ascii_uppercase + string.ascii_lowercase + "é☃", has_eos=True)
SMALL = ("--port", "0", "--slots", "4", "--capacity", "96")


def write_run(folder: Path, tokenizer: Tokenizer = LETTERS, config: TransformerConfig | None = None) -> Path:
    """An untrained model, by default a tiny one, with a short history of losses, as a run folder."""
    write_untrained(folder, tokenizer, config or one_layer(tokenizer.vocab_size), step=9)
    rows = [{"step": step, "loss": 4 / step} for step in range(1, 10)] + [{"step": 9, "eval_loss": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10, "lo')
    return folder


class Served:
    """A server under way.

    Args:
      program: what to start in place of serve.py, as Python's arguments.
      python: which Python.
    """

    def __init__(
        self,
        run: Path,
        *flags: str,
        program: tuple[str, ...] = (str(SERVE),),
        python: str = sys.executable,
        key: str = "",
    ):
        command = [python, *program, "--checkpoint", str(run), *SMALL, *flags]
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PARALLAX_API_KEY": key},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            raise RuntimeError(f"no server: {self.process.communicate()[1]}")
        self.model = run.name
        self.http = httpx.Client(base_url=self.address, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.address}/v1", api_key=key or "none", max_retries=0, timeout=60)

    def post(self, **fields) -> httpx.Response:
        """A completion of this model."""
        return self.http.post("/v1/completions", json={"model": self.model, **fields})

    def complete(self, prompt: str, **fields) -> openai.types.Completion:
        return self.openai.completions.create(model=self.model, prompt=prompt, **fields)

    def gauge(self, name: str, label: str = "") -> float:
        """The sum of a metric over its labels, or over those with this one."""
        found = re.findall(
            rf"^parallax_{name}(?:{{.*{label}.*}})? (\S+)$", self.http.get("/metrics").text, re.MULTILINE
        )
        return sum(map(float, found))

    def is_idle(self) -> bool:
        return not any(self.gauge(name) for name in ("slots_busy", "answers_waiting", "answers_open"))

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Ends it by a signal: its exit status and what it said."""
        self.http.close()
        self.openai.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        try:
            _, words = self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, words


@contextlib.contextmanager
def serving(run: Path, *flags: str, number: int = signal.SIGTERM, **options):
    """A server, ended afterwards by a signal; it must end well."""
    served = Served(run, *flags, **options)
    try:
        yield served
    finally:
        status, words = served.end(number)
    assert (status, "Traceback" in words) == (0, False), words


def eventually(condition) -> bool:
    """Whether something becomes true within 20 seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False
