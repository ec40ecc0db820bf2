"""Tables on standard output."""

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

WIDTH = 200
"""Characters of a table at most where there is no terminal, whose width would decide."""


def show_numbers(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose columns are aligned to the right."""
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    show_table(table)


def show_table(table: Table) -> None:
    """Prints it, cut off only where a terminal is too narrow."""
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
