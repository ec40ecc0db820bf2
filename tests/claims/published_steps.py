"""Compares the step times of plan.py with published ones, and fits the figures that it expects them by.

    python tests/claims/published_steps.py --write      # fits; writes calibration.json and docs/planning.md
    python tests/claims/published_steps.py --rows FILE  # other rows of the same columns, by the figures as they are

A row that cannot be laid out is listed with the reason. It needs no accelerator and compiles nothing.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from parallelism.planning.hardware import GIB
from parallelism.planning.step_time import FITTED, calibration
from scripts.common.command_line import errors_in_one_line
from tests.claims.published import ROWS, Published, lay_out, read_rows
from tests.claims.step_time_fit import calibrate, leave_out

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "planning.md"
MARKS = "<!-- published steps -->", "<!-- end of published steps -->"
HEAD = """| run | chip | published s | expected s | off by | MFU | GiB of | fits | ran |
| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    with errors_in_one_line():
        laid, left = lay_out_all(read_rows(asked.rows or ROWS))
        runs = [each.run for each in laid if each.run]
        known = calibration()
        expected = [known.seconds(run.work, run.generation) for run in runs] if asked.rows else leave_out(runs)
        text = report(laid, expected, left)
        print(text)
        if asked.write and not asked.rows:
            FITTED.write_text(json.dumps(dataclasses.asdict(calibrate(runs)), indent=1) + "\n")
            write_between(PAGE, text)
    return 0


def lay_out_all(rows: Sequence[dict[str, str]]) -> tuple[list[Published], list[tuple[str, str]]]:
    """Those that can be laid out, and of the others name and reason."""
    laid, left = [], []
    for row in rows:
        try:
            laid.append(lay_out(row))
        except ValueError as reason:
            left.append((row["id"], str(reason)))
    return laid, left


def report(laid: Sequence[Published], expected: Sequence[float], left: Sequence[tuple[str, str]]) -> str:
    lines, errors, times = [HEAD], [], iter(expected)
    for each in laid:
        cells = [each.name, each.generation]
        if each.seconds is None:
            cells += [""] * 4
        else:
            seconds = next(times)
            errors.append(seconds / each.seconds - 1)
            cells += [f"{each.seconds:.2f}", f"{seconds:.2f}", f"{errors[-1]:+.0%}"]
            cells.append(f"{each.peak_seconds / each.seconds:.0%}")
        cells += [f"{each.memory_bytes / GIB:.1f} of {each.device_memory / GIB:.1f}"]
        cells += ["yes" if holds else "no" for holds in (each.fits, each.ran)]
        lines.append(f"| {' | '.join(cells)} |")
    absolute = [abs(error) for error in errors]
    within = sum(error <= 0.25 for error in absolute) / len(absolute)
    lines += ["", f"Median error {statistics.median(absolute):.1%}; {within:.0%} of {len(errors)} rows within 25%.", ""]
    lines += ["| left out | since it |", "| --- | --- |", *(f"| {name} | {reason} |" for name, reason in left)]
    return "\n".join(lines)


def write_between(page: Path, text: str) -> None:
    """Replaces what stands between the marks of a page."""
    before, _, rest = page.read_text("utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", "utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
