"""What a command found, as a JSON file and a table.

Invariant: a result says on which machine, with which versions and by which command it was had.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parallax.storage import write_json
from scripts.benchmark_settings import cores

FOLDER = "benchmarks"
QUIET = 0.2
"""Cores that may be busy before a measurement."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


def machine() -> dict[str, Any]:
    """The processor, its cores, memory in GiB and the system."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of Python and of what is measured, where it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def busy_cores(seconds: float = 1.0) -> float:
    """How many cores were at work in these seconds: all of it by others, since this waits."""

    def idle() -> int:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return int(fields[4]) + int(fields[5])

    if not Path("/proc/stat").exists():
        return 0.0
    before, began = idle(), time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - began
    return max(0.0, (os.cpu_count() or 1) - (idle() - before) / os.sysconf("SC_CLK_TCK") / elapsed)


def expect_quiet() -> float:
    """`busy_cores`, with a warning where others compute: threads that wait for one another suffer many times over."""
    busy = round(busy_cores(), 2)
    if busy > QUIET:
        print(
            f"warning: {busy} cores are busy with other work; measure when the machine is quiet",
            file=sys.stderr,
        )
    return busy


def write_report(output: str | None, command: str, results: Any, *, busy: float) -> Path:
    """Writes the file, by default benchmarks/COMMAND.json, and says where.

    Args:
      busy: from `expect_quiet`, before anything was measured.

    Raises:
      ValueError: it cannot be written.
    """
    path = Path(output or f"{FOLDER}/{command}.json")
    report = {
        "command": shlex.join(["python", "scripts/benchmark.py", command, *sys.argv[1:]]),
        "began": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "busy_cores_before": busy,
        "versions": versions(),
        "results": results,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written: {error.strerror}; choose another") from None
    print(f"report    {path}", file=sys.stderr)
    return path


def read_report(path: Path) -> dict[str, Any]:
    """What `write_report` wrote.

    Raises:
      ValueError: it is not there, or not such a file.
    """
    try:
        report = json.loads(path.read_text())
        return (
            report
            if {"command", "machine", "busy_cores_before", "results"} <= report.keys()
            else {}["results"]
        )
    except (OSError, ValueError, KeyError, AttributeError):
        raise ValueError(f"{path} is not a result of benchmark.py; run its command first") from None


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on standard output; the first column is words, the others are numbers."""
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(f"\n{title}", highlight=False)
    console.print(table)
