"""What a command found, as a table and a JSON file.

Invariant: both name the machine and the versions; a printed table is Markdown, so that a page takes it as it is.
"""

import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from parallax.storage import write_json
from scripts.benchmarks.settings import cores
from scripts.common.command_line import writing

FOLDER = "benchmarks"
QUIET = 0.2
"""Cores that may be busy before a measurement."""
WIDTH = 200
"""Width of a table at most, in characters, whatever the terminal: a wrapped table is no table to paste."""
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
    """How many cores were busy in these seconds: all of it by others, since this waits."""

    def idle() -> int:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return int(fields[4]) + int(fields[5])

    if not Path("/proc/stat").exists():
        return 0.0
    before, began = idle(), time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - began
    return max(0.0, (os.cpu_count() or 1) - (idle() - before) / os.sysconf("SC_CLK_TCK") / elapsed)


def begin() -> float:
    """Prints the machine and the versions, and warns where others compute; returns how many cores they keep busy.

    Threads that wait for one another take many times as long beside such work.
    """
    found, busy = machine(), round(busy_cores(), 2)
    if busy > QUIET:
        print(f"warning: {busy} cores are busy with other work; measure when the machine is quiet", file=sys.stderr)
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"{found['processor']}, {found['cores']} cores, {found['memory_gib']:.0f} GiB, {found['system']}; {named}")
    return busy


def show(title: str, forms: Mapping[str, str], rows: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """A table on standard output: by row and column the median of some measurements, and their least and most.

    Args:
      forms: the format of each column's numbers, such as .3f.
    """
    table = Table("", box=box.MARKDOWN)
    for column in forms:
        table.add_column(column, justify="right", no_wrap=True)
    for name, columns in rows.items():
        table.add_row(name, *(spread(columns[column], form) for column, form in forms.items()))
    print(f"\n{title}; median (least–most)")
    Console(width=WIDTH).print(table)


def spread(values: Sequence[float], form: str) -> str:
    """`median (least–most)`, each in that format."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def write_report(output: str | None, command: str, results: Any, *, busy: float) -> None:
    """Writes the file, by default benchmarks/COMMAND.json, and reports its path.

    Args:
      busy: from `begin`, before anything was measured.

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
    with writing(f"--output {path}"):
        write_json(path, report)
    print(f"report    {path}", file=sys.stderr)
