"""What a chip or a card costs, by a table of list prices or by the price that was given.

Invariant: a price comes with its date and its source; a machine without one has no price, never a guess.
"""

import csv
import dataclasses
from pathlib import Path

PRICES = Path(__file__).with_name("prices.csv")


@dataclasses.dataclass(frozen=True)
class Price:
    """Of one chip or card for an hour."""

    usd: float
    source: str
    """For a person to read."""


def price_of(name: str, given: float | None = None) -> Price | None:
    """The price that was given, or that of the table for a generation or a card; None where it has none."""
    if given is not None:
        return Price(given, "--price")
    with PRICES.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["name"] == name:
                return Price(float(row["usd_per_chip_hour"]), f"{row['terms']}, {row['date']}, {row['source']}")
    return None
