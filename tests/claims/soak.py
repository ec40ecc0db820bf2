"""Breaks a training run again and again, in the ways that machines break one, and compares it with one left alone.

    python tests/claims/soak.py --faults 50 --mounts --output docs/evidence/soak.md

Each fault strikes an attempt on another layout: one process or several, pmap or a mesh. Passing means that every
attempt went on from the newest checkpoint that was intact and ended as it should, and that in the end every loss and
every parameter has the bits of the undisturbed run. `--mounts` adds the faults that need root: a full disk and a
read-only one.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from rich.progress import track

from tests.claims.faults import FAULTS, MOUNT_FAULTS, Fault
from tests.claims.kill_and_resume import write_text
from tests.scripts.runs import Layout, Training, mesh, pmap, rows, single
from tests.scripts.scene import NAME, Scene

LAYOUTS = [
    *(single(), pmap(2), pmap(4), mesh("fsdp=4"), mesh("data=2,fsdp=2"), pmap(4, 2), mesh("fsdp=4", 2)),
    *(mesh("data=2,fsdp=2", 4), mesh("data=4", 4)),
]
STEPS_A_FAULT = 14
FLAGS = [
    *("--config", "tiny", "--model.num-layers", "2", "--model.embed-dim", "32", "--model.num-heads", "2"),
    *("--model.num-kv-heads", "2", "--model.head-dim", "16", "--batch-size", "16", "--seq-len", "16"),
    *("--log-interval", "1", "--eval-interval", "100000", "--checkpoint-interval", "4"),
    *("--check-interval", "3", "--keep", "3", "--reduction", "exact", "--print-param-hash", "--step-timeout", "12"),
]


def soak(
    folder: Path,
    kinds: Sequence[Fault],
    faults: int,
    seed: int,
    mounts: bool = False,
    layouts: Sequence[Layout] = LAYOUTS,
) -> list[str]:
    """A table row a fault, then what the run says of itself. Raises RuntimeError where anything is not as it should."""
    rng = random.Random(seed)
    write_text(folder, rng)
    steps = ["--steps", str(faults * STEPS_A_FAULT + 20)]
    flags = [*FLAGS, *steps, "--dataset", str(folder / "text.txt")]
    expected = Training(folder, "whole", single(), flags).finish()
    drawn = [kinds[number % len(kinds)] for number in range(faults)]
    rng.shuffle(drawn)
    with Scene.open(folder / "disk", mounts) as disk:
        scene, table = Scene(folder, disk, [*flags, "--resume"], rng), []
        for fault in track(drawn, "faults"):
            layout = rng.choice([layout for layout in layouts if fault.suits(layout)])
            table.append(scene.strike(fault, layout))
        found = Training(folder, NAME, single(), scene.flags, disk=disk).finish()
        if found != expected:
            raise RuntimeError(f"parameters differ: {found} is not {expected}")
        record = rows(folder / "whole"), rows(disk / NAME)
        undisturbed, broken = ([row["loss"] for row in run if "loss" in row] for run in record)
        if undisturbed != broken:
            raise RuntimeError("the losses in metrics.jsonl differ")
        summary = json.loads((disk / NAME / "summary.json").read_text())
    shares = {name: f"{spent / summary['wall_seconds']:.0%}" for name, spent in summary["seconds"].items()}
    return [
        *table,
        "",
        f"All {len(broken)} losses and all parameters have the bits of the undisturbed run: {found}.",
        f"Its summary.json counts {len(summary['attempts'])} attempts, {summary['wall_seconds']:.0f} s of wall time: "
        + ", ".join(f"{name} {share}" for name, share in shares.items())
        + ".",
    ]


def report(lines: list[str], args: argparse.Namespace, seconds: float) -> str:
    """docs/evidence/soak.md."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "orbax-checkpoint"))
    command = f"python tests/claims/soak.py --faults {args.faults} --seed {args.seed}"
    command += f"{' --mounts' if args.mounts else ''} --output docs/evidence/soak.md"
    machine = f"{os.cpu_count()} cores of {platform.machine()}, with Python {platform.python_version()}, {versions}"
    return f"""# {args.faults} faults

`{command}` did this in {seconds / 60:.0f} minutes
on {machine}. Each row is an attempt at one run, with a
real process for each process, struck by one fault; `from step` is the checkpoint that it went on from.

| fault | layout | from step | what happened |
| --- | --- | --- | --- |
{chr(10).join(lines)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="decides the faults, their moments and the layouts")
    parser.add_argument("--mounts", action="store_true", help="with a full and a read-only disk; needs root")
    parser.add_argument("--output", type=Path, help="the page to write; by default it is printed")
    args = parser.parse_args()
    began = time.monotonic()
    kinds = [*FAULTS, *(MOUNT_FAULTS if args.mounts else [])]
    with tempfile.TemporaryDirectory() as folder:
        lines = soak(Path(folder), kinds, args.faults, args.seed, args.mounts)
    page = report(lines, args, time.monotonic() - began)
    if args.output:
        args.output.write_text(page)
    else:
        print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
