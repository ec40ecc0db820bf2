"""Kills a real training run with SIGKILL again and again, resumes it, and compares it with one that was left alone.

    python tests/scripts/kill_and_resume.py --kills 10

Half of the kills come at a random step, half in the middle of writing a checkpoint. Passing means that every row of
metrics.jsonl, the timing fields excepted, and every parameter have the same bits in both runs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TIMING = {"tokens_per_second", "step_time", "mfu"}
STEPS = 240
FLAGS = [
    *("--config", "tiny", "--model.num-layers", "2", "--model.dropout-rate", "0.1", "--steps", str(STEPS)),
    *("--batch-size", "8", "--seq-len", "32", "--log-interval", "1", "--eval-interval", "40"),
    *("--checkpoint-interval", "7", "--keep", "2", "--seed", "5", "--print-param-hash"),
]


def start(folder: Path, run: str, *flags: str) -> subprocess.Popen:
    """train.py on the text in `folder`; compiled programs are kept there, since the same one is started often."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--dataset", "text.txt", *FLAGS]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [*command, "--output-dir", run, *flags],
        cwd=folder,
        env=os.environ | cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """Waits for a run to end well; the last line that it printed."""
    out, err = process.communicate(timeout=300)
    if process.returncode != 0:
        raise RuntimeError(f"exit status {process.returncode}\n{err}")
    return out.splitlines()[-1]


def rows(run: Path) -> list[dict]:
    """The rows of metrics.jsonl that a reader finds now, a torn last line left out, without their timing."""
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    return [{name: value for name, value in json.loads(line).items() if name not in TIMING} for line in lines]


def reached(run: Path, step: int) -> Callable[[], bool]:
    def now() -> bool:
        return (run / "metrics.jsonl").exists() and any(row["step"] >= step for row in rows(run)[-2:])

    return now


def saving(run: Path, step: int) -> Callable[[], bool]:
    """Whether a checkpoint of `step` or later is being written right now."""

    def now() -> bool:
        drafts = (run / "checkpoints").glob("*.orbax-checkpoint-tmp*")
        return any(int(draft.name.partition(".")[0]) >= step for draft in drafts)

    return now


def kill_when(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before it could be killed\n{process.communicate()[1]}")
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def kill_and_compare(folder: Path, kills: int, seed: int) -> list[str]:
    """Runs both; a line a kill. Raises RuntimeError where they differ."""
    rng, report = random.Random(seed), []
    words = ["king", "queen", "crown", "sword", "night", "day", "love", "war", "and", "or", "the", "\n"]
    (folder / "text.txt").write_text(" ".join(rng.choice(words) for _ in range(4000)))
    expected = finish(start(folder, "whole"))

    steps = sorted(rng.sample(range(5, STEPS - 20), kills))
    for number, step in enumerate(steps):
        process = start(folder, "killed", "--resume")
        condition = (saving if number % 2 else reached)(folder / "killed", step)
        kill_when(process, condition)
        saved = sorted(
            int(path.name) for path in (folder / "killed" / "checkpoints").glob("*") if path.name.isdigit()
        )
        how = "in a save" if number % 2 else "between steps"
        report.append(f"killed {how} after step {rows(folder / 'killed')[-1]['step']}; checkpoints {saved}")
    found = finish(start(folder, "killed", "--resume"))

    if rows(folder / "whole") != rows(folder / "killed"):
        raise RuntimeError("metrics.jsonl differs")
    if found != expected:
        raise RuntimeError(f"parameters differ: {found} is not {expected}")
    return [*report, f"{len(rows(folder / 'whole'))} rows and all parameters are equal: {found}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(kill_and_compare(Path(folder), args.kills, args.seed)))


if __name__ == "__main__":
    main()
