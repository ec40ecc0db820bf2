"""Machines beside each other: the best plan of each, by the time and the money that so many tokens take.

Invariant: what stands for a machine was compiled for it and fits; a machine without such a plan has no time.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
from rich.console import Console
from rich.table import Table

from parallelism.planning.compiler import check_compiler
from parallelism.planning.gpus import GIB
from parallelism.planning.hardware import Machine, machine
from parallelism.planning.planner import Row, name_of
from scripts.common.command_line import writing
from scripts.common.tables import show_table
from scripts.planning.flags import Flags
from scripts.planning.plan import Plan
from scripts.planning.report import bill, commands, plan_file, row_to_json, sought


class Best(NamedTuple):
    """A machine with its best plan, if it has one, and what that takes."""

    machine: Machine
    row: Row | None
    hours: float | None
    usd: float | None


def compare(flags: Flags) -> int:
    """Plans for each machine of --compare, and shows the best of each. The exit status: 0 where one fits, else 1.

    Raises ValueError if a machine cannot be planned for, or the files cannot be written.
    """
    console = Console(stderr=True)
    for name in flags.compared:
        check_compiler(machine(name))
    path = plan_file(flags, f"compare-{flags.name}-{flags.batch_size}x{flags.seq_len}.json")
    found = []
    for name in flags.compared:
        asked, sliced = dataclasses.replace(flags, topology=name), machine(name)
        row = Plan(asked).best(console)
        found.append(Best(sliced, row, *(bill(row, sliced, asked) if row else (None, None))))
    found.sort(key=lambda best: (best.hours is None, best.hours))
    show_table(comparison(found, flags))
    with writing(f"--output {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([_to_json(best, flags) for best in found], indent=1) + "\n")
        plot(found, flags, path.with_suffix(".png"))
    console.print(f"The comparison is also in {path}, drawn in {path.with_suffix('.png')}.", highlight=False)
    for best in found:
        if best.row:
            print("\n".join((f"On {best.machine.name}, and rehearsed:", *commands(best.row, best.machine, flags))))
    return 0 if any(best.row for best in found) else 1


def comparison(found: Sequence[Best], asked: Flags) -> Table:
    """One row a machine, the fastest first, with its places by time and by money."""
    table = Table(
        title=f"{asked.name}, {asked.batch_size} × {asked.seq_len} tokens a step, {asked.tokens or 0:,.0f} in all",
        caption="The best plan that was compiled and fits, in the time that is expected of it (docs/planning.md). "
        "Money by list prices (scripts/planning/prices.csv) or by --price, for the steps alone. None of this has run.",
    )
    for name in ("machine", "layout", *sought(asked), "remat", "micro", "attention"):
        table.add_column(name, no_wrap=True)
    for name in ("devices", "HBM", "step ms", "tokens/s", "MFU", "hours", "by time", "USD", "by money"):
        table.add_column(name, justify="right", no_wrap=True)
    by_time, by_money = ([best[field] for best in found if best[field] is not None] for field in (2, 3))
    for best in found:
        row = best.row
        if row is None:
            table.add_row(best.machine.name, "nothing that was compiled fits")
            continue
        money = ("no price", "-") if best.usd is None else (f"{best.usd:,.2f}", _place(best.usd, by_money))
        table.add_row(
            *(best.machine.name, name_of(row.choice)),
            *([str(getattr(row.choice.layout, asked.sought))] if asked.sought else ()),
            *(row.choice.remat, str(row.choice.layout.accumulate)),
            *(row.attention, str(best.machine.devices), f"{row.needed_bytes / GIB:.1f}"),
            *(f"{row.expected.seconds * 1e3:,.0f}", f"{row.tokens / row.expected.seconds:,.0f}"),
            *(f"{row.utilisation:.0%}", f"{best.hours:,.2f}", _place(best.hours, by_time), *money),
        )
    return table


def _place(value: Any, among: Sequence[Any]) -> str:
    return str(sorted(among).index(value) + 1)


def plot(found: Sequence[Best], asked: Flags, path: Path) -> None:
    """Hours and dollars, a bar a machine; without a plan or a price there is none."""
    figure = matplotlib.figure.Figure((8, 1 + 0.4 * len(found)), layout="constrained")
    names = [best.machine.name for best in found]
    hours, usd = figure.subplots(1, 2, sharey=True)
    hours.barh(names, [best.hours or 0.0 for best in found])
    usd.barh(names, [best.usd or 0.0 for best in found], color="tab:orange")
    hours.set(title=f"hours to {asked.tokens or 0:.3g} tokens", xlim=(0, None))
    usd.set(title="USD", xlim=(0, None))
    hours.invert_yaxis()
    figure.savefig(path, dpi=150)


def _to_json(best: Best, asked: Flags) -> dict[str, Any]:
    what = {"topology": best.machine.name, "devices": best.machine.devices}
    if best.row is None:
        return what | {"fits": False}
    command, _ = commands(best.row, best.machine, asked)
    return what | row_to_json(best.row, best.machine, asked) | {"command": command}
