"""Progress: a bar on a terminal, plain lines elsewhere, never on standard output."""

import os
import pty
import re
import subprocess
import sys

from parallax.training.progress import Terminal

SCRIPT = """
import sys, time
from parallax.training.progress import Terminal
progress = Terminal(20, 100)
for step in range(21, 101):
    progress.step(step, {})
    if step % 40 == 0:
        progress.row({"step": step, "loss": 200 / step, "tokens_per_second": 12345.6})
progress.row({"step": 100, "eval_loss": 1.25})
print("sample")
progress.close()
"""


def run(terminal: bool) -> tuple[str, str]:
    """Standard output and standard error of the script, the latter a terminal or a pipe."""
    reading, writing = pty.openpty() if terminal else os.pipe()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=writing, env=environment)
    os.close(writing)
    chunks = []
    while True:
        try:
            chunk = os.read(reading, 4096)
        except OSError:  # how a pseudo-terminal says that its other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(reading)
    out = process.communicate()[0].decode()
    assert process.returncode == 0
    return out, b"".join(chunks).decode()


def test_a_terminal_gets_a_bar():
    out, shown = run(terminal=True)
    assert out == "sample\n"
    assert "\x1b[" in shown
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).strip().splitlines()[-1]
    for part in ("100/100", "loss 2.5000", "eval 1.2500", "12,346 tokens/s", "0:00:0"):
        assert part in last


def test_a_pipe_gets_a_line_for_each_logged_step_and_no_control_codes():
    out, shown = run(terminal=False)
    assert out == "sample\n"
    assert "\x1b" not in shown
    assert "\r" not in shown
    lines = shown.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 40/100", "step 80/100", "step 100/100"]
    assert lines[0].startswith("step 40/100  loss 5.0000  12,346 tokens/s  0:00:0")
    assert "loss 2.5000  eval 1.2500  12,346 tokens/s" in lines[-1]
    assert lines[-1].endswith("gone, 0:00:00 left")


def test_time_left_is_measured_without_the_steps_that_compile(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Terminal(0, 1000)
    for now[0], step in ((100.0, 10), (110.0, 110)):
        progress.row({"step": step, "loss": 1.0})
    progress.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("0:01:40 gone")
    # 100 steps in 10 s after the first update: 890 steps take 89 s.
    assert second.endswith("0:01:50 gone, 0:01:29 left")
