"""A ladder that is killed gives the fit of one that is not: `python tests/claims/ladder_kills.py LADDER FOLDER`.

LADDER is a ladder whose runs are finished, as `tests/claims/forecasts.py` leaves one. Its design is copied to FOLDER
and run again, and ladder.py is killed with SIGKILL five times on the way, each time after another sixth of all
evaluations. It takes as long as the ladder and five starts more, on as many cores, by which XLA rounds on a CPU. Exit
status: 0 where fit.json has the same bytes.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

KILLS = 5
COMMAND = Path(__file__).resolve().parents[2] / "scripts" / "ladder.py"


def evaluations(ladder: Path) -> int:
    """So many rows of metrics with a held-out loss that runs of the ladder have written."""
    files = ladder.glob("runs/*/metrics.jsonl")
    return sum('"eval_loss"' in line for file in files for line in file.read_text().splitlines())


def kill_at(ladder: Path, wanted: int) -> bool:
    """Runs the ladder, and kills it at this number of evaluations; False where it ended before."""
    process = subprocess.Popen([sys.executable, str(COMMAND), "run", str(ladder)])
    while process.poll() is None:
        if evaluations(ladder) >= wanted:
            process.kill()
            process.wait()
            return True
        time.sleep(0.05)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ladder", type=Path)
    parser.add_argument("folder", type=Path)
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True)
    shutil.copy(flags.ladder / "ladder.json", flags.folder)
    total, killed = evaluations(flags.ladder), 0
    for number in range(1, KILLS + 1):
        killed += kill_at(flags.folder, number * total // (KILLS + 1))
    hashes = []
    for ladder in (flags.folder, flags.ladder):
        for command in ("run", "fit"):
            subprocess.run([sys.executable, str(COMMAND), command, str(ladder)], check=True)
        hashes.append(hashlib.sha256((ladder / "fit.json").read_bytes()).hexdigest())
    runs = len(json.loads((flags.folder / "ladder.json").read_text())["members"])
    print(f"killed {killed} times in {runs} runs; fit.json {hashes[0][:16]}, without kills {hashes[1][:16]}")
    return 0 if killed == KILLS and hashes[0] == hashes[1] else 1


if __name__ == "__main__":
    raise SystemExit(main())
