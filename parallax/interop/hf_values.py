"""Values of a config.json, each of the kind that it must have.

Invariant: a value of another kind is named, with its file.
"""

import math
from typing import Any

Values = dict[str, Any]


def whole_number(values: Values, name: str) -> int:
    """Raises ValueError where it is missing or another kind of value."""
    found = values.get(name)
    if type(found) is not int:
        raise ValueError(f"{name}={found!r} in config.json must be a whole number; restore the model's file")
    return found


def number(values: Values, name: str, default: float | None = None) -> float:
    """The default where it is missing. Raises ValueError where there is none, or for another kind of value."""
    found = values.get(name, default)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise ValueError(f"{name}={found!r} in config.json must be a number; restore the model's file")
    return float(found)


def mapping(values: Values, name: str) -> Values:
    """An empty one where it is missing or null. Raises ValueError for another kind of value."""
    found = values.get(name)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{name}={found!r} in config.json must be an object; restore the model's file")
    return found or {}


def given(values: Values) -> Values:
    """Without what is null, which stands for what is missing."""
    return {name: value for name, value in values.items() if value is not None}


def flag(values: Values, name: str) -> bool:
    """False where it is missing or null."""
    return bool(values.get(name, False))
