"""Kills a real training run with SIGKILL again and again, resumes it, and compares it with one that was left alone.

    python tests/claims/kill_and_resume.py --kills 10

Half of the kills come at a random step, half in the middle of writing a checkpoint. Passing means that every row of
metrics.jsonl, the timing fields excepted, and every parameter have the same bits in both runs.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.scripts.runs import Training, checkpoints, reached, rows, saving, single

STEPS = 240
FLAGS = [
    *("--dataset", "text.txt", "--config", "tiny", "--model.num-layers", "2", "--model.dropout-rate", "0.1"),
    *("--model.embed-dim", "32", "--model.mlp-dim", "64", "--model.head-dim", "8"),
    *("--batch-size", "8", "--seq-len", "32", "--log-interval", "1", "--eval-interval", "40", "--seed", "5"),
    *("--checkpoint-interval", "7", "--keep", "2", "--print-param-hash"),
]


def write_text(folder: Path, rng: random.Random) -> None:
    """text.txt: some words in no order."""
    words = ["king", "queen", "crown", "sword", "night", "day", "love", "war", "and", "or", "the", "\n"]
    (folder / "text.txt").write_text(" ".join(rng.choice(words) for _ in range(4000)))


def kill_and_compare(folder: Path, kills: int, seed: int) -> list[str]:
    """Runs both; a line a kill. Raises RuntimeError where they differ."""
    rng, report, flags = random.Random(seed), [], [*FLAGS, "--steps", str(STEPS)]
    write_text(folder, rng)
    expected = Training(folder, "whole", single(), flags).finish()

    run = folder / "killed"
    for number, step in enumerate(sorted(rng.sample(range(5, STEPS - 20), kills))):
        training = Training(folder, "killed", single(), [*flags, "--resume"])
        if not training.wait_for((reached if number % 2 else saving)(run, step)):
            raise RuntimeError(f"the run ended before it could be killed\n{training.words()}")
        training.kill()
        how = "between steps" if number % 2 else "in a save"
        report.append(f"killed {how} after step {rows(run)[-1]['step']}; checkpoints {checkpoints(run)}")
    found = Training(folder, "killed", single(), [*flags, "--resume"]).finish()

    if rows(folder / "whole") != rows(run):
        raise RuntimeError("metrics.jsonl differs")
    if found != expected:
        raise RuntimeError(f"parameters differ: {found} is not {expected}")
    return [*report, f"{len(rows(run))} rows and all parameters are equal: {found}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(kill_and_compare(Path(folder), args.kills, args.seed)))


if __name__ == "__main__":
    main()
